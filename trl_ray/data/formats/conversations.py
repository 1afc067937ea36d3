"""Checks that messages are messages; in which order they may follow each other is for the chat template to say.

list of objects ─ check_messages ─► Message...   role, content as text, tool calls that name their functions
answer ─ check_completion ─► something of the assistant to train
conversation ─ split_conversation ─► what is asked, what is answered at last
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from trl_ray.config.sections import ROLES
from trl_ray.data.chat.tool_schemas import read_call
from trl_ray.data.validation import check_message, show
from trl_ray.errors import DataError
from trl_ray.types import Message

THINKING_KEYS = ("thinking", "reasoning_content")
"""Where an assistant message keeps its thoughts: gpt-oss and Qwen name it differently, and so do their templates."""


def check_messages(value: object, *, where: str, roles: Collection[str] = ROLES) -> tuple[Message, ...]:
    """The messages of one field, each with a known role and text or tool calls; their order is not looked at.

    A message that only calls tools or thinks has the content "", whether it was None or left out, and the arguments of
    calls are objects, whether they were written so or as JSON.

    Raises:
        DataError: not a list, empty, or with a message that is not one; names the message.
    """
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where} must be a list of messages, got {show(value)}. Mend or remove the row.")
    if not value:
        raise DataError(f"{where} must have at least one message, got []. Fill it or remove the row.")
    return tuple(_check_one(message, f"{where}, message {i}", roles) for i, message in enumerate(value))


def _check_one(message: object, where: str, roles: Collection[str]) -> Message:
    if isinstance(message, Mapping) and any(message.get(key) for key in ("tool_calls", *THINKING_KEYS)):
        # Some chat templates, gpt-oss's among them, search in the content whenever there is a key for it.
        silent = message.get("content") is None
        calls = {"tool_calls": _check_calls(message, where)} if message.get("tool_calls") else {}
        message = {**message, **({"content": ""} if silent else {}), **calls}
    return check_message(message, where, roles=roles)


def _check_calls(message: Mapping[str, object], where: str) -> list[Mapping[str, object]]:
    calls = message["tool_calls"]
    if message.get("role") != "assistant":
        raise DataError(f"{where} must be the assistant's to call tools, got role {message.get('role')!r}. Mend it.")
    if not isinstance(calls, (list, tuple)):
        raise DataError(f"{where} must have a list as tool_calls, got {show(calls)}. Mend the row.")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}, tool call {index} must name its function, got {show(call)}. Mend the row.")
    return [read_call(call) for call in calls]


def check_completion(prompt: Sequence[Message], completion: Sequence[Message], *, where: str) -> None:
    """Check that there is something of the assistant's in an answer, and that it does not say its prompt again.

    Raises:
        DataError: no message is the assistant's, or the first ones are the whole prompt.
    """
    if not any(message["role"] == "assistant" for message in completion):
        roles = ", ".join(repr(message["role"]) for message in completion)
        raise DataError(
            f"{where} must have a message of the assistant, got {roles}. Move what comes before the answer to the "
            "prompt, or remove the row."
        )
    if prompt and tuple(completion[: len(prompt)]) == tuple(prompt):
        raise DataError(
            f"{where} must go on from its prompt, got all of the prompt again ({len(prompt)}) and then the answer. "
            "Leave the prompt's column out: column_mapping={prompt: null}, and completion: messages where there is one "
            "answer; or cut the prompt off here."
        )


def split_conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """What stands before the assistant's last turn, and the rest; all of it where that turn is answered already."""
    last = messages[-1]
    answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers or last.get("role") in ("user", "system", "developer"):
        return list(messages), []
    return list(messages[: answers[-1]]), list(messages[answers[-1] :])
