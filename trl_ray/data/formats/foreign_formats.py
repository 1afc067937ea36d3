"""Turns rows that other tools wrote into rows of TRL's formats: ShareGPT, Alpaca, and conversations written as text.

    {conversations: [{from, value}]} ───────────► {messages: [{role, content}]}
    {instruction, input, output} ───────────────► {prompt: [user], completion: [assistant]}
    {text: "<|im_start|>user\\n..."} ────────────► {messages: [...]}
    {prompt: "[INST] ...", completion: "..."} ──► {prompt: [...], completion: [...]}

What the first row is, all rows must be.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.data.formats.transcripts import TextFormat, read_transcript, recognise
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import Message

Row = Mapping[str, Any]

MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_ANSWERS = ("completion", "chosen", "rejected")
_WHOLE = ("text", "prompt", "chosen")
"""A row's conversation starts in the first of these that it has."""
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALLER = "function_call"


class RowConvention(enum.StrEnum):
    """Who wrote the rows."""

    NATIVE = "native"
    """TRL's columns."""
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConverter:
    """Converts the rows of one dataset; it remembers nothing between rows."""

    name: str
    """Names the dataset in messages."""
    convention: RowConvention
    text_format: TextFormat | None
    """How the texts are written; None where they are not looked at."""

    def convert(self, number: int, row: Row) -> Row:
        """One row in TRL's columns.

        Raises:
            DataError: it is not written as the first row is; names the row and what was seen.
        """
        where = f"Row {number} of {self.name}"
        if self.convention is RowConvention.ALPACA:
            return alpaca_to_messages(row, where=where)
        if self.convention is RowConvention.SHAREGPT:
            row = to_messages(row, where=where)
        if self.text_format is None:
            return row
        field = _first_text(row)
        if field is not None:
            self._check_same(row, field, where)
        return row if self.text_format is TextFormat.PLAIN else texts_to_messages(row, self.text_format, where=where)

    def _check_same(self, row: Row, first: str, where: str) -> None:
        fields = [first]
        if self.text_format is TextFormat.PLAIN:  # then its answers must be plain as well
            fields += [field for field in _ANSWERS if field != first and isinstance(row.get(field), str)]
        for field in fields:
            found = recognise(row[field], where=f"{where}, field {field!r}")
            if _family(found) is not _family(self.text_format):
                raise DataError(
                    f"{where}, field {field!r} must be written as {self.text_format}, as the first row is, got "
                    f"{found}: {show(row[field])}. Use one way for all rows, or name the way."
                )


def _family(kind: TextFormat | None) -> TextFormat | None:
    """A single exchange looks alike in Llama 2 and Mistral."""
    return TextFormat.MISTRAL if kind is TextFormat.LLAMA2 else kind


def converter_for(row: Row, *, name: str, columns: Collection[str], text_format: TextFormat | None) -> RowConverter:
    """How to convert a dataset, told from its columns and its first row; a given `text_format` is taken as told.

    Raises:
        DataError: the columns are those of two conventions, or a text looks like an unknown chat template.
    """
    convention = _convention_of(row, name=name, columns=columns)
    if text_format is not None:
        # What was told is not asked again, and plain texts are not looked into.
        kept = None if text_format is TextFormat.PLAIN else text_format
        return RowConverter(name=name, convention=convention, text_format=kept)
    if convention is RowConvention.ALPACA:
        return RowConverter(name=name, convention=convention, text_format=None)
    field = _first_text(row)
    found = recognise(row[field], where=f"Row 0 of {name}, field {field!r}") if field is not None else None
    return RowConverter(name=name, convention=convention, text_format=found)


def _first_text(row: Row) -> str | None:
    return next((field for field in _WHOLE if isinstance(row.get(field), str)), None)


def _convention_of(row: Row, *, name: str, columns: Collection[str]) -> RowConvention:
    alpaca = {"instruction", "output"} <= set(columns)
    whole = [column for column in ("text", "messages", "conversations") if column in columns]
    if alpaca and whole:
        raise DataError(
            f"The columns of {name} must mean one thing, they can be read as instruction, output (Alpaca) or as "
            f"{', '.join(whole)}. Remove or rename the columns that are not meant."
        )
    if alpaca and not {"prompt", *_ANSWERS} & set(columns):
        return RowConvention.ALPACA
    if "conversations" in columns and "messages" in columns:
        raise DataError(
            f"The columns of {name} must mean one thing, they have both 'conversations' and 'messages'. Remove one."
        )
    speakers = any(_has_speakers(row.get(column)) for column in MESSAGE_COLUMNS)
    return RowConvention.SHAREGPT if "conversations" in columns or speakers else RowConvention.NATIVE


def _has_speakers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) and "from" in item for item in value)


def to_messages(row: Row, *, where: str) -> dict[str, Any]:
    """A row whose messages have `role` and `content` (TRL's `maybe_convert_to_chatml`), `conversations` renamed.

    Beyond TRL, the speakers of ShareGPT become roles (human: user, gpt: assistant, observation: tool), a
    `function_call` becomes a tool call of the assistant, and the text of a `system` column the first message. A row
    without any of this comes back as it is.

    Raises:
        DataError: `conversations` is no list, an unknown speaker, or a function call that is not the JSON of a name
            and arguments.
    """
    converted = dict(row)
    for column in MESSAGE_COLUMNS:
        value = row.get(column)
        if isinstance(value, (list, tuple)):
            at = f"{where}, field {column!r}"
            converted[column] = [_message(item, f"{at}, message {index}") for index, item in enumerate(value)]
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


def _message(item: Any, where: str) -> Any:
    if not isinstance(item, Mapping) or not {"from", "value"} & set(item):
        return item
    kept = {key: value for key, value in item.items() if key not in ("from", "value")}
    speaker = item.get("from", item.get("role"))
    value = item.get("value", item.get("content"))
    if speaker == _CALLER:
        return {**kept, "role": "assistant", "content": "", "tool_calls": [_call(value, where)]}
    if speaker not in _SPEAKERS:
        known = (*_SPEAKERS, _CALLER)
        guess = nearest(speaker, known) if isinstance(speaker, str) else None
        hint = f"Did you mean {guess!r}?" if guess else "Mend the row."
        raise DataError(f"{where} must be from one of {', '.join(known)}, got {speaker!r}. {hint}")
    return {**kept, "role": _SPEAKERS[speaker], "content": value}


def _call(value: object, where: str) -> dict[str, Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} must have the JSON of a function call, column {error.colno} is broken: {error.msg}, got "
            f"{show(value)}. Mend the row."
        ) from error
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise DataError(f"{where} must have a function call with a name and arguments, got {show(call)}. Mend the row.")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def alpaca_to_messages(row: Row, *, where: str) -> dict[str, Any]:
    """An Alpaca row as conversational prompt and completion.

    The user says `instruction`, and `input` after an empty line if there is one; `system` and `history` (pairs of
    question and answer) come before, where the row has them.

    Raises:
        DataError: a field is not text, or instruction or output are empty.
    """
    texts = {key: _alpaca_text(row, key, where) for key in ("system", "instruction", "input", "output")}
    for key in ("instruction", "output"):
        if not texts[key].strip():
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
        "completion": [{"role": "assistant", "content": texts["output"]}],
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
