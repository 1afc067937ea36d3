"""Turns rows that other tools wrote into rows of TRL's formats: ShareGPT, Alpaca, and conversations written as text.

    {messages: "[{\"role\": ...}]"} ────────────► {messages: [{role, content}]}        written_messages.py
    {conversations: [{from, value}]} ───────────► {messages: [{role, content}]}
    {conversations: ["question", "answer"]} ────► {messages: [user, assistant]}
    {instruction, input, output} ───────────────► {prompt: [user], completion: [assistant]}
    {messages: [.., user, assistant], label} ───► {prompt: [.., user], completion: [assistant], label}
    {instruction, input, chosen, rejected} ─────► {prompt: [user], chosen: [assistant], rejected: [assistant]}
    {text: "<|im_start|>user\\n..."} ────────────► {messages: [...]}
    {prompt: "[INST] ...", completion: "..."} ──► {prompt: [...], completion: [...]}

What the first row is, all rows must be.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.config.sections import ROLES
from trl_ray.data.formats.conversations import split_conversation
from trl_ray.data.formats.transcripts import TextFormat, read_transcript, recognise
from trl_ray.data.formats.written_calls import calls_to_messages
from trl_ray.data.formats.written_messages import read_list, read_messages
from trl_ray.data.json_text import parse_json
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import Message

Row = Mapping[str, Any]

MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_CONVERSATIONS = ("messages", "conversations")
"""Of these, those that hold both sides."""
_ANSWERS = ("completion", "chosen", "rejected")
_WHOLE = ("text", "prompt", "chosen")
"""A row's conversation starts in the first of these that it has."""
_LISTS = ("completions", "labels")
_SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""What speakers are called elsewhere, in small letters: their roles here."""
_CALLER = "function_call"
_EXCHANGES = (
    ("input", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
)
"""How the two sides are called where an entry of a conversation is a question with its answer."""


class RowConvention(enum.StrEnum):
    """Who wrote the rows."""

    NATIVE = "native"
    """TRL's columns, with messages of any speakers."""
    ALPACA = "alpaca"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConverter:
    """Converts the rows of one dataset; it remembers nothing between rows."""

    name: str
    """Names the dataset in messages."""
    convention: RowConvention
    text_format: TextFormat | None
    """How the texts are written; None where they are not looked at."""
    is_literal: bool = False
    """Texts are taken as they are, even where they spell messages."""
    role_mapping: Mapping[str, str] = field(default_factory=dict)
    """What a run's own speakers stand for, before `_SPEAKERS`."""
    has_system: bool = False
    """A column was said to hold what the system says."""
    has_text_answers: bool = False
    """Conversations are answered by texts."""
    is_rated: bool = False
    """Of each conversation the last answer is rated; what stands before it is the prompt."""

    def convert(self, number: int, row: Row) -> Row:
        """One row in TRL's columns.

        Raises:
            DataError: it is not written as the first row is; names the row and what was seen.
        """
        where = f"Row {number} of {self.name}"
        if self.convention is RowConvention.ALPACA:
            return alpaca_to_messages(row, where=where)
        if not self.is_literal:
            row = unwritten(row, where=where)
        row = to_messages(row, where=where, role_mapping=self.role_mapping)
        if self.has_system:
            row = with_system(row, where=where)
        row = asked(row)
        if self.has_text_answers and is_answered_in_text(row):
            row = said_by_assistant(row)
        if self.is_rated:
            row = answered(row, where=where)
        if self.text_format in (None, TextFormat.PLAIN) and not self.is_literal:
            row = calls_to_messages(row)
        if self.text_format is None:
            return row
        first = _first_text(row)
        if first is not None:
            self._check_same(row, first, where)
        return row if self.text_format is TextFormat.PLAIN else texts_to_messages(row, self.text_format, where=where)

    def _check_same(self, row: Row, first: str, where: str) -> None:
        fields = [first]
        if self.text_format is TextFormat.PLAIN:  # then its answers must be plain as well
            fields += [column for column in _ANSWERS if column != first and isinstance(row.get(column), str)]
        for column in fields:
            found = recognise(row[column], where=f"{where}, field {column!r}")
            if _family(found) is not _family(self.text_format):
                raise DataError(
                    f"{where}, field {column!r} must be written as {self.text_format}, as the first row is, got "
                    f"{found}: {show(row[column])}. Use one way for all rows, or name the way."
                )


def _family(kind: TextFormat | None) -> TextFormat | None:
    """A single exchange looks alike in Llama 2 and Mistral."""
    return TextFormat.MISTRAL if kind is TextFormat.LLAMA2 else kind


def converter_for(
    row: Row,
    *,
    name: str,
    number: int = 0,
    columns: Collection[str],
    text_format: TextFormat | None,
    role_mapping: Mapping[str, str] | None = None,
    has_system: bool = False,
    is_rated: bool = False,
) -> RowConverter:
    """How to convert a dataset, told from its columns and row `number`; a given `text_format` is taken as told.

    With `is_rated`, conversations beside a label are answers that it rates.

    Raises:
        DataError: the columns are those of two conventions, or a text looks like an unknown chat template.
    """
    is_literal = text_format is TextFormat.PLAIN
    where = f"Row {number} of {name}"
    convention = _convention_of(name=name, columns=columns)
    if text_format is not None or convention is RowConvention.ALPACA:
        # What was told is not asked again, and plain texts are not looked into.
        found = None if is_literal else text_format
    else:
        first = _first_text(unwritten(row, where=where))
        found = recognise(row[first], where=f"{where}, field {first!r}") if first is not None else None
    return RowConverter(
        name=name,
        convention=convention,
        text_format=found,
        is_literal=is_literal,
        role_mapping=role_mapping or {},
        has_system=has_system,
        has_text_answers=not is_literal and is_answered_in_text(unwritten(row, where=where)),
        is_rated=is_rated,
    )


def unwritten(row: Row, *, where: str) -> Row:
    """The row with those messages and lists read that a table of text holds as text.

    Raises:
        DataError: a list of messages is broken or cut off; names the field.
    """
    read = {
        **{
            column: read_messages(row[column], where=f"{where}, field {column!r}")
            for column in MESSAGE_COLUMNS
            if isinstance(row.get(column), str)
        },
        **{column: read_list(row[column]) for column in _LISTS if isinstance(row.get(column), str)},
    }
    return {**row, **read} if read else row


def _first_text(row: Row) -> str | None:
    return next((field for field in _WHOLE if isinstance(row.get(field), str)), None)


def _convention_of(*, name: str, columns: Collection[str]) -> RowConvention:
    whole = {*_WHOLE, *MESSAGE_COLUMNS} & set(columns)
    if {"instruction", "output"} <= set(columns) and not whole:
        return RowConvention.ALPACA
    if "instruction" in columns and whole == {"chosen", "rejected"}:
        return RowConvention.ALPACA
    if "conversations" in columns and "messages" in columns:
        raise DataError(
            f"The columns of {name} must mean one thing, they have both 'conversations' and 'messages'. Leave one out: "
            "column_mapping={conversations: null}."
        )
    return RowConvention.NATIVE


def to_messages(row: Row, *, where: str, role_mapping: Mapping[str, str] | None = None) -> Row:
    """A row whose messages have `role` and `content` (TRL's `maybe_convert_to_chatml`), `conversations` renamed.

    Beyond TRL, speakers become roles (human: user, gpt and ai: assistant, observation: tool; `role_mapping` first), a
    `function_call` becomes a tool call of the assistant, the column `functions` is `tools`, and the text of a `system`
    column the first message. A row without any of this comes back as it is.

    Raises:
        DataError: `conversations` is no list, an unknown speaker, or a function call that is not the JSON of a name
            and arguments.
    """
    mapping = role_mapping or {}
    converted = dict(row)
    if _are_functions(converted.get("functions")) and converted.get("tools") is None:
        converted["tools"] = converted.pop("functions")
    for column in MESSAGE_COLUMNS:
        value = _listed(row.get(column), is_whole=column in _CONVERSATIONS)
        if isinstance(value, (list, tuple)):
            at = f"{where}, field {column!r}"
            converted[column] = [_message(item, f"{at}, message {index}", mapping) for index, item in enumerate(value)]
    if "conversations" in converted:
        messages = converted.pop("conversations")
        if not isinstance(messages, list):
            raise DataError(
                f"{where}, field 'conversations' must be a list of messages, got {show(messages)}. Mend or remove the "
                "row."
            )
        system = converted.pop("system", None)
        if isinstance(system, str) and system.strip():
            messages = [{"role": "system", "content": system}, *messages]
        converted["messages"] = messages
    return converted


def _are_functions(value: Any) -> bool:
    """Whether a column of that name describes what may be called; it may hold code as well."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(each, Mapping) and {"name", "parameters"} <= set(each) for each in value)
    )


def _listed(value: Any, *, is_whole: bool) -> Any:
    """What is written in another way as a list of messages; others as they are.

    A single message, lists of roles and contents, and texts or exchanges in turn (LIMA's, Capybara's conversations).
    """
    if is_whole and isinstance(value, (list, tuple)) and value:
        if all(isinstance(item, str) for item in value):
            return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(value)]
        pair = next((pair for pair in _EXCHANGES if all(_is_exchange(item, pair) for item in value)), None)
        if pair is not None:
            sides = tuple(zip(("user", "assistant"), pair, strict=True))
            return [{"role": role, "content": item[side]} for item in value for role, side in sides]
    if not isinstance(value, Mapping) or not {"role", "from"} & set(value):
        return value
    columns = [item for item in value.values() if item is not None]
    if not all(isinstance(item, (list, tuple)) and len(item) == len(columns[0]) for item in columns):
        return [value]
    return [
        {key: None if item is None else item[place] for key, item in value.items()} for place in range(len(columns[0]))
    ]


def _is_exchange(item: Any, pair: tuple[str, str]) -> bool:
    return isinstance(item, Mapping) and set(item) == set(pair)


def answered(row: Row, *, where: str) -> Row:
    """A conversation beside a label as the last answer that it rates, and what it answers.

    Raises:
        DataError: the conversation does not end with the assistant.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        return row
    prompt, answer = split_conversation(messages)
    if not answer:
        raise DataError(
            f"{where}, field 'messages' must end with the answer of the assistant that 'label' rates, got a message of "
            f"{_speaker(messages[-1])!r}. Mend or remove the row."
        )
    kept = {column: value for column, value in row.items() if column != "messages"}
    return {"prompt": prompt, "completion": answer, **kept}


def asked(row: Row) -> Row:
    """The row with its prompt as messages, where what follows it are messages of the assistant.

    A prompt of text is the user's message; where there is none, the conversation beside the answers is the prompt.
    """
    answers = [row[column] for column in _ANSWERS if row.get(column) is not None]
    if not answers or not all(
        isinstance(answer, list) and answer and _speaker(answer[0]) == "assistant" for answer in answers
    ):
        return row
    if isinstance(row.get("prompt"), str):
        return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    if "prompt" not in row and isinstance(row.get("messages"), list):
        return {("prompt" if column == "messages" else column): value for column, value in row.items()}
    return row


def is_answered_in_text(row: Row) -> bool:
    """Whether the prompt is a conversation, and all that answers it text."""
    prompt, answers = row.get("prompt"), [row[column] for column in _ANSWERS if row.get(column) is not None]
    return isinstance(prompt, list) and bool(prompt and answers) and all(isinstance(each, str) for each in answers)


def said_by_assistant(row: Row) -> Row:
    """The row with its answers of text as messages."""
    said = {column: [{"role": "assistant", "content": row[column]}] for column in _ANSWERS if column in row}
    return {**row, **said}


def _speaker(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def with_system(row: Row, *, where: str) -> Row:
    """The row with the text of its column `system` as the first message of what is asked; texts become messages.

    Raises:
        DataError: it is no text, there is no prompt that it could begin, or the conversation has another one.
    """
    converted = dict(row)
    said = converted.pop("system", None)
    if said is not None and not isinstance(said, str):
        raise DataError(f"{where}, field 'system' must be text, got {show(said)}. Mend or remove the row.")
    for column, role in (("prompt", "user"), *((answer, "assistant") for answer in _ANSWERS)):
        if isinstance(converted.get(column), str) and "prompt" in converted:
            converted[column] = [{"role": role, "content": converted[column]}]
    if said is None or not said.strip():
        return converted
    begun = ["prompt"] if "prompt" in converted else ["messages"] if "messages" in converted else ["chosen", "rejected"]
    for column in begun:
        messages = converted.get(column)
        if not isinstance(messages, list) or not messages:
            raise DataError(
                f"{where}, field 'system' must have a prompt or messages that it can begin, got {show(messages)} as "
                f"{column!r}. Name the prompt's column in column_mapping, or leave system out: null."
            )
        first = messages[0] if isinstance(messages[0], Mapping) else {}
        if first.get("role") in ("system", "developer") and first.get("content") != said:
            raise DataError(
                f"{where}, field {column!r} must not begin with a system message beside a column for it, got "
                f"{show(first.get('content'))} and {show(said)}. Leave the column out: null in column_mapping."
            )
        if first.get("role") not in ("system", "developer"):
            converted[column] = [{"role": "system", "content": said}, *messages]
    return converted


def _message(item: Any, where: str, role_mapping: Mapping[str, str]) -> Any:
    if not isinstance(item, Mapping):
        return item
    if isinstance(item.get(_CALLER), Mapping) and not item.get("tool_calls"):
        # As OpenAI wrote a call before there could be several.
        kept = {key: kept for key, kept in item.items() if key != _CALLER}
        item = {**kept, "content": item.get("content") or "", "tool_calls": [_call(item[_CALLER], where)]}
    # Arrow gives every message the keys of all messages.
    speaker = item.get("role") if item.get("from") is None else item["from"]
    value = item.get("content") if item.get("value") is None else item["value"]
    foreign = {"from", "value"} & set(item)
    if speaker == _CALLER and speaker not in role_mapping:
        kept = {key: kept for key, kept in item.items() if key not in ("from", "value")}
        return {**kept, "role": "assistant", "content": "", "tool_calls": [_call(value, where)]}
    role = role_mapping.get(speaker) or _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        if not foreign:
            return item  # what is wrong with it is told where messages are checked
        known = (*_SPEAKERS, _CALLER)
        guess = nearest(speaker, known) if isinstance(speaker, str) else None
        hint = f"Did you mean {guess!r}? " if guess else ""
        raise DataError(
            f"{where} must be from one of {', '.join(known)}, got {speaker!r}. {hint}Mend the row, or say what it "
            f"stands for: role_mapping={{{speaker}: user}}."
        )
    if not foreign and role == speaker:
        return item
    return {**{key: kept for key, kept in item.items() if key not in ("from", "value")}, "role": role, "content": value}


def _call(value: object, where: str) -> dict[str, Any]:
    try:
        call = parse_json(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} must have the JSON of a function call, column {error.colno} is broken: {error.msg}, got "
            f"{show(value)}. Mend the row."
        ) from error
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise DataError(f"{where} must have a function call with a name and arguments, got {show(call)}. Mend the row.")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def alpaca_to_messages(row: Row, *, where: str) -> dict[str, Any]:
    """An Alpaca row as conversational prompt and completion, or as prompt, chosen and rejected.

    The user says `instruction`, and `input` after an empty line if there is one; `system` and `history` (pairs of
    question and answer) come before, where the row has them. The assistant says `output`; in a ranking `chosen` and
    `rejected`.

    Raises:
        DataError: a field is not text, or instruction or an answer are None.
    """
    ranked = [column for column in ("chosen", "rejected") if column in row]
    answers = {column: column for column in ranked} or {"output": "completion"}
    texts = {key: _alpaca_text(row, key, where) for key in ("system", "instruction", "input", *answers)}
    for key in ("instruction", *answers):
        if row.get(key) is None:
            raise DataError(
                f"{where}, field {key!r} must not be empty, got {row.get(key)!r}. Fill it or remove the row."
            )
    before = [{"role": "system", "content": texts["system"]}] if texts["system"].strip() else []
    for index, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(
                f"{where}, field 'history', entry {index} must be a pair of question and answer, got {show(pair)}. "
                "Mend the row."
            )
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n\n".join(texts[key] for key in ("instruction", "input") if texts[key].strip())
    kept = {key: value for key, value in row.items() if key not in (*texts, "history")}
    return {
        "prompt": [*before, {"role": "user", "content": question}],
        **{column: [{"role": "assistant", "content": texts[key]}] for key, column in answers.items()},
        **kept,
    }


def _alpaca_text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}, field {key!r} must be text, got {show(value)}. Mend or remove the row.")
    return value


def texts_to_messages(row: Row, kind: TextFormat, *, where: str) -> dict[str, Any]:
    """A row whose texts are read as conversations in the format `kind`; `text` becomes `messages`.

    An answer beside a text prompt goes on from where the prompt stops, so the two are read as one.

    Raises:
        DataError: a text is not in that format, or an answer adds nothing to its prompt.
    """
    converted: dict[str, Any] = {}
    prompt = row.get("prompt")
    asked = read_transcript(prompt, kind, where=f"{where}, field 'prompt'") if isinstance(prompt, str) else None
    for column, value in row.items():
        at = f"{where}, field {column!r}"
        if column == "prompt" and asked is not None:
            converted[column] = list(asked)
        elif column == "text" and isinstance(value, str):
            converted["messages"] = list(read_transcript(value, kind, where=at))
        elif column in _ANSWERS and isinstance(value, str):
            converted[column] = _answer(prompt if asked is not None else None, asked or (), value, kind, at)
        else:
            converted[column] = value
    return converted


def _answer(prompt: str | None, asked: tuple[Message, ...], value: str, kind: TextFormat, where: str) -> list[Message]:
    messages = read_transcript((prompt or "") + value, kind, where=where, closed=prompt is None)
    if messages[: len(asked)] != asked or len(messages) == len(asked):
        raise DataError(
            f"{where} must go on from where the prompt stops, got {show(value)} after {(prompt or '')[-40:]!r}. Mend "
            "the row."
        )
    return list(messages[len(asked) :])
