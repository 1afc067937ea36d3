"""Checks that the messages of a conversation follow each other as a chat template expects.

[system] [developer]  user ─► assistant ─► user ─► ...
                                │  ▲
                   (tool calls) ▼  │
                                tool ─┐
                                 ▲────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trl_ray.data.chat.tool_schemas import read_call
from trl_ray.data.validation import check_message, show
from trl_ray.errors import DataError
from trl_ray.types import Message

THINKING_KEYS = ("thinking", "reasoning_content")
"""Where an assistant message keeps its thoughts: gpt-oss and Qwen name it differently, and so do their templates."""


def check_messages(value: object, *, where: str) -> tuple[Message, ...]:
    """The messages of one field, each with a known role and text or tool calls; their order is not looked at.

    A message that only calls tools has the content "", whether it was None or left out, and the arguments of calls are
    objects, whether they were written so or as JSON.

    Raises:
        DataError: not a list, empty, or with a message that is not one; names the message.
    """
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where} must be a list of messages, got {show(value)}. Mend or remove the row.")
    if not value:
        raise DataError(f"{where} must have at least one message, got []. Fill it or remove the row.")
    return tuple(_check_one(message, f"{where}, message {i}") for i, message in enumerate(value))


def _check_one(message: object, where: str) -> Message:
    if isinstance(message, Mapping) and message.get("tool_calls"):
        # Some chat templates, gpt-oss's among them, search in the content whenever there is a key for it.
        silent = message.get("content") is None
        message = {**message, **({"content": ""} if silent else {}), "tool_calls": _check_calls(message, where)}
    clean = check_message(message, where)
    says = clean["content"].strip()
    if clean["role"] == "assistant" and not (says or any(clean.get(key) for key in ("tool_calls", *THINKING_KEYS))):
        raise DataError(f"{where} must not be empty, got {clean['content']!r}. Fill it or remove the row.")
    return clean


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


def check_order(messages: Sequence[Message], *, where: str) -> None:
    """Check the roles from the first message of a conversation on.

    Raises:
        DataError: names the first message that may not stand where it stands, and who may.
    """
    previous = "start"
    for index, message in enumerate(messages):
        allowed = _followers(previous)
        if message["role"] not in allowed:
            came = "at the start" if index == 0 else f"after {_described(messages[index - 1])}"
            raise DataError(
                f"{where}, message {index} must be of {' or '.join(allowed)} {came}, got {message['role']!r}. "
                "Put the messages in order, merge neighbours of one role, or remove the row."
            )
        calls = message["role"] == "assistant" and message.get("tool_calls")
        previous = "call" if calls else str(message["role"])


def _followers(previous: str) -> tuple[str, ...]:
    return {
        "start": ("system", "developer", "user"),
        "system": ("developer", "user"),
        "developer": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
        "call": ("tool",),
        "tool": ("tool", "assistant"),
    }[previous]


def _described(message: Message) -> str:
    return "a tool call" if message.get("tool_calls") else str(message["role"])


def check_completion(prompt: Sequence[Message], completion: Sequence[Message], *, where: str) -> None:
    """Check that a completion goes on where its prompt stops and ends with the assistant.

    Raises:
        DataError: it starts with another role, breaks the order, or ends with another role.
    """
    if completion[0]["role"] != "assistant":
        raise DataError(
            f"{where} must start with the assistant, got {completion[0]['role']!r}. Move what comes before to the "
            "prompt."
        )
    check_order([*prompt, *completion], where=f"{where} (counted from the start of the prompt)")
    if completion[-1]["role"] != "assistant":
        raise DataError(f"{where} must end with the assistant, got {completion[-1]['role']!r}. Cut or mend the row.")


def check_prompt_order(prompt: Sequence[Message], *, where: str) -> None:
    """Check the order of a prompt and that an assistant can go on from its end.

    Raises:
        DataError: the order is broken, or the last message is of the system or the developer.
    """
    check_order(prompt, where=where)
    if prompt[-1]["role"] in ("system", "developer"):
        raise DataError(
            f"{where} must end with one of the roles user, tool, assistant, got {prompt[-1]['role']!r}. Add a user "
            "message or remove the row."
        )
