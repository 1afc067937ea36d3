"""Takes out of tool calls what Arrow put in: it gives every call the arguments of all calls, None where it had none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ray.data.chat.tool_schemas import without_none


def without_filled_arguments(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, its messages' calls without arguments that are None, at any depth."""
    return {key: _messages(value) if isinstance(value, list) else value for key, value in row.items()}


def _messages(value: list[Any]) -> list[Any]:
    if not any(isinstance(item, Mapping) and item.get("tool_calls") for item in value):
        return value
    return [
        {**item, "tool_calls": [_call(call) for call in item["tool_calls"]]}
        if isinstance(item, Mapping) and isinstance(item.get("tool_calls"), list)
        else item
        for item in value
    ]


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    return {**call, "arguments": without_none(call["arguments"])} if "arguments" in call else call
