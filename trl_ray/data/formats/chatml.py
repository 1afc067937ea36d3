"""What Hermes and Qwen write inside a ChatML turn: thoughts, tool calls and what the tools answered.

assistant: <think>\\nthoughts\\n</think>\\n\\ncontent\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>
user:      <tool_response>\\nanswer\\n</tool_response>  (one per call)                     ─► messages of the tool
"""

from __future__ import annotations

import json
import re
from typing import Any

from trl_ray.data.json_text import parse_json
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import Message

_THINK = re.compile(r"\s*<think>\n?(?P<thoughts>.*?)\n?</think>\s*", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\s*(?P<call>.*?)\s*</tool_call>", re.DOTALL)
_RESPONSE = re.compile(r"\s*<tool_response>\n?(?P<answer>.*?)\n?</tool_response>", re.DOTALL)


def read_assistant(message: Message, *, where: str) -> Message:
    """An assistant's message with `reasoning_content` and `tool_calls` taken out of its content.

    Raises:
        DataError: a tool call is not the JSON of a name and arguments, or content follows the calls.
    """
    content, found = message["content"], {}
    think = _THINK.match(content)
    if think:
        content = content[think.end() :]
        if think["thoughts"].strip():
            found["reasoning_content"] = think["thoughts"]
    calls = list(_CALL.finditer(content))
    if not calls:
        return {**message, "content": content, **found}
    after = _CALL.sub("", content[calls[0].start() :])
    if after.strip():
        raise DataError(f"{where} must have nothing after its tool calls, got {after.strip()[:40]!r}. Mend the row.")
    read = [_read_call(match["call"], where=where) for match in calls]
    return {**message, "content": content[: calls[0].start()], **found, "tool_calls": read}


def _read_call(text: str, *, where: str) -> dict[str, Any]:
    try:
        call = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} must have JSON in <tool_call>, column {error.colno} is broken: {error.msg}, got {show(text)}. "
            "Mend the row."
        ) from error
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not set(call) <= {"name", "arguments"}:
        raise DataError(
            f"{where} must have an object with name and arguments in <tool_call>, got {show(call)}. Mend the row."
        )
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def read_tool_results(message: Message) -> tuple[Message, ...]:
    """A user's turn that holds nothing but tool responses as messages of the tool; any other as it is."""
    content = message["content"]
    answers = list(_RESPONSE.finditer(content))
    if not answers or _RESPONSE.sub("", content).strip():
        return (message,)
    return tuple({"role": "tool", "content": match["answer"]} for match in answers)
