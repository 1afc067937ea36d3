"""Reads answers that are the JSON of calls, beside a text prompt and the tools that are called (xLAM's rows).

{prompt: "Weather?", completion: '[{"name": "look", "arguments": {...}}]', tools: '[{"name": "look", ...}]'}
                                  ─► {prompt: [user], completion: [assistant that calls look], tools: ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trl_ray.data.json_text import parse_json

_ANSWERS = ("completion", "chosen", "rejected")


def calls_to_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with question and calls as messages; a row of another kind as it is."""
    prompt, tools = row.get("prompt"), row.get("tools")
    texts = {column: row[column] for column in _ANSWERS if isinstance(row.get(column), str)}
    if not isinstance(prompt, str) or not tools or not texts:
        return row
    names = {_name(tool) for tool in _list(tools)}
    calls = {column: _list(text) for column, text in texts.items()}
    if not all(found and all(_is_call(call, names) for call in found) for found in calls.values()):
        return row
    answers = {column: [_answer(found)] for column, found in calls.items()}
    return {**row, "prompt": [{"role": "user", "content": prompt}], **answers}


def _list(value: Any) -> Sequence[Any]:
    """A list that may be written as JSON; empty where it is none."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except json.JSONDecodeError:
            return ()
    return value if isinstance(value, (list, tuple)) else ()


def _name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _is_call(call: Any, names: set[str | None]) -> bool:
    name = call.get("name") if isinstance(call, Mapping) and set(call) <= {"name", "arguments"} else None
    return isinstance(name, str) and name in names


def _answer(calls: Sequence[Any]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }
