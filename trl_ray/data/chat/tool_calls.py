"""Reads a generated turn as a message: what was said, what was thought, which tools are called.

    tokenizer ─ tool_call_format ─► format          text, special tokens kept ─ parse_turn ─► {role, content, ...}

    hermes    <tool_call>{"name": .., "arguments": {..}}</tool_call> ...               Qwen, Hermes
    llama3    {"name": .., "parameters": {..}}  or  <|python_tag|>name.call(a="b")     Llama 3.1 and later
    harmony    to=functions.name<|channel|>commentary json<|message|>{..}<|call|>      GPT-OSS
    mistral   [TOOL_CALLS] [{"name": .., "arguments": {..}}, ..]  or  [TOOL_CALLS]name[ARGS]{..}

A model may write anything: a turn that is not wholly in its format is content, word for word, and never an error.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable
from typing import Any

from trl_ray.data.chat.chat_rendering import ChatFormat, ChatTokenizer, own_template, render_chat
from trl_ray.data.json_text import parse_json
from trl_ray.errors import ModelError

Call = dict[str, Any]
Turn = dict[str, Any]


class ToolCallFormat(enum.StrEnum):
    """How a family of models writes tool calls."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    HARMONY = "harmony"
    MISTRAL = "mistral"


class _NotAFormat(ValueError):
    """The text is not wholly in the format; `parse_turn` makes it content."""


_STOP_TOKENS = {
    ToolCallFormat.HERMES: ("<|im_end|>", "<|endoftext|>"),
    ToolCallFormat.LLAMA3: ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ToolCallFormat.HARMONY: ("<|return|>", "<|end|>", "<|call|>"),
    ToolCallFormat.MISTRAL: ("</s>",),
}
_DECODER = json.JSONDecoder()


def tool_call_format(tokenizer: ChatTokenizer, chat: ChatFormat | None = None) -> ToolCallFormat | None:
    """The format in which the chat template writes a call; None where it writes none, or one not known here.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    chat = chat or ChatFormat(template=own_template(tokenizer))
    function = {"name": "probe_4f1c", "arguments": {"key_9d27": "value_e803"}}
    # Mistral's templates ask for an id of nine characters; the others do not look at it.
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "a1b2c3d4e", "function": function}],
    }
    try:
        text = render_chat(tokenizer, [{"role": "user", "content": "hi"}, call], chat).text
    except ModelError:
        return None
    before = text[: text.find("probe_4f1c")] if "probe_4f1c" in text else ""
    signs = {
        ToolCallFormat.HERMES: before.endswith('<tool_call>\n{"name": "'),
        ToolCallFormat.HARMONY: before.endswith(" to=functions."),
        ToolCallFormat.MISTRAL: "[TOOL_CALLS]" in before,
        ToolCallFormat.LLAMA3: before.endswith('<|end_header_id|>\n\n{"name": "'),
    }
    return next((found for found, present in signs.items() if present), None)


def parse_turn(text: str, form: ToolCallFormat) -> Turn:
    """A turn, decoded with its special tokens, as ``{"role": "assistant", "content": ..., "tool_calls": [...]}``.

    `tool_calls` is absent where there are none; each is ``{"type": "function", "function": {"name", "arguments"}}``,
    the arguments an object, with its ``id`` where the model wrote one. Thoughts stand where the family's template
    reads them: `reasoning_content`, for Harmony `thinking`. Text that is not wholly in the format becomes the content.
    """
    try:
        return _PARSERS[form](text)
    except _NotAFormat:
        return _turn(_without_stop(text, form))


def _turn(content: str, calls: list[Call] | None = None, **thoughts: str) -> Turn:
    turn: Turn = {"role": "assistant", "content": content}
    turn |= {key: value for key, value in thoughts.items() if value}
    if calls:
        turn["tool_calls"] = calls
    return turn


def _without_stop(text: str, form: ToolCallFormat) -> str:
    stripped = text.rstrip("\n")
    for token in _STOP_TOKENS[form]:
        if stripped.endswith(token):
            return stripped.removesuffix(token)
    return text


def _value_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends; a closing tag inside its strings ends nothing."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:  # also of too many digits
        raise _NotAFormat("no JSON value") from error


def _call(value: Any, *, arguments_key: str = "arguments") -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise _NotAFormat("a call has a name")
    arguments = value.get(arguments_key)
    if isinstance(arguments, str):  # some models write the object as JSON inside a string
        try:
            arguments = parse_json(arguments)
        except json.JSONDecodeError as error:
            raise _NotAFormat("arguments are an object") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _NotAFormat("arguments are an object")
    call: Call = {"type": "function", "function": {"name": value["name"], "arguments": arguments}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def _skip_blanks(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


_THOUGHTS = re.compile(r"\s*<think>\n?(?P<thoughts>.*?)\n?</think>\s*", re.DOTALL)


def _hermes(text: str) -> Turn:
    text = _without_stop(text, ToolCallFormat.HERMES)
    found = _THOUGHTS.match(text)
    thoughts = found["thoughts"].strip("\n") if found else ""
    text = text[found.end() :] if found else text
    content, tag, _ = text.partition("<tool_call>")
    calls, place = [], len(content)
    while place < len(text):
        if not text.startswith("<tool_call>", place):
            raise _NotAFormat("only calls follow a call")
        value, place = _value_at(text, _skip_blanks(text, place + len("<tool_call>")))
        calls.append(_call(value))
        place = _skip_blanks(text, place)
        if not text.startswith("</tool_call>", place):
            raise _NotAFormat("a call is closed")
        place = _skip_blanks(text, place + len("</tool_call>"))
    # The line end before the first call belongs to the format, not to what was said.
    return _turn(content.removesuffix("\n") if tag else content, calls, reasoning_content=thoughts)


_BUILT_IN = re.compile(r"(?P<name>[\w.]+?)\.call\((?P<arguments>.*)\)", re.DOTALL)
_BUILT_IN_ARGUMENT = re.compile(r'(?P<key>\w+)="(?P<value>.*?)"(?:, (?=\w+=")|$)', re.DOTALL)


def _llama3(text: str) -> Turn:
    body = _without_stop(text, ToolCallFormat.LLAMA3).strip()
    tagged = body.startswith("<|python_tag|>")
    body = body.removeprefix("<|python_tag|>").lstrip()
    built_in = _BUILT_IN.fullmatch(body) if tagged else None
    if built_in:
        found = list(_BUILT_IN_ARGUMENT.finditer(built_in["arguments"]))
        if "".join(match[0] for match in found) != built_in["arguments"]:
            raise _NotAFormat('arguments are key="value"')
        arguments = {match["key"]: match["value"] for match in found}
        return _turn("", [_call({"name": built_in["name"], "arguments": arguments})])
    if not body.startswith("{"):
        raise _NotAFormat("a call is a bare object")
    value, end = _value_at(body, 0)
    if body[end:].strip() or not isinstance(value, dict) or not {"parameters", "arguments"} & value.keys():
        raise _NotAFormat("a call is the whole turn")
    return _turn("", [_call(value, arguments_key="parameters" if "parameters" in value else "arguments")])


_SEGMENT = re.compile(
    r"(?:<\|start\|>assistant)?(?: to=functions\.(?P<before>[^\s<]+))?"
    r"<\|channel\|>(?P<channel>analysis|commentary|final)(?: to=functions\.(?P<after>[^\s<]+))?"
    r"(?:\s*<\|constrain\|>)?\s*(?P<kind>\w+)?\s*<\|message\|>"
    r"(?P<body>.*?)(?P<stop><\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)


def _harmony(text: str) -> Turn:
    text = text.rstrip("\n")
    thoughts, said, calls, place = [], [], [], 0
    while place < len(text):
        segment = _SEGMENT.match(text, place)
        if segment is None:
            raise _NotAFormat("a segment has a channel and a message")
        place, name = segment.end(), segment["before"] or segment["after"]
        if name is None and segment["stop"] == "<|call|>":
            raise _NotAFormat("a call has a recipient")
        if name is not None:
            value, end = _value_at(segment["body"], _skip_blanks(segment["body"], 0))
            if segment["body"][end:].strip():
                raise _NotAFormat("arguments are one object")
            calls.append(_call({"name": name, "arguments": value}))
        elif segment["channel"] == "analysis":
            thoughts.append(segment["body"])
        else:
            said.append(segment["body"])
    return _turn("\n".join(said), calls, thinking="\n".join(thoughts))


_NAMED_CALL = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?\[ARGS\]\s*")


def _mistral(text: str) -> Turn:
    text = _without_stop(text, ToolCallFormat.MISTRAL)
    content, mark, rest = text.partition("[TOOL_CALLS]")
    if not mark:
        return _turn(text)
    if rest.lstrip().startswith("["):
        values, end = _value_at(rest, _skip_blanks(rest, 0))
        if rest[end:].strip() or not values:
            raise _NotAFormat("calls are one list")
        return _turn(content.rstrip(), [_call(value) for value in values])
    calls: list[Call] = []
    for part in rest.split("[TOOL_CALLS]"):
        named = _NAMED_CALL.match(part)
        if named is None:
            raise _NotAFormat("a call has a name and arguments")
        value, end = _value_at(part, named.end())
        if part[end:].strip():
            raise _NotAFormat("arguments are one object")
        calls.append(_call({"name": named["name"], "arguments": value, "id": named["id"]}))
    return _turn(content.rstrip(), calls)


_PARSERS: dict[ToolCallFormat, Callable[[str], Turn]] = {
    ToolCallFormat.HERMES: _hermes,
    ToolCallFormat.LLAMA3: _llama3,
    ToolCallFormat.HARMONY: _harmony,
    ToolCallFormat.MISTRAL: _mistral,
}
