"""Rows of a known format, checked one by one and turned into records; lazily, so that streams can be read.

    Mapping ─► RecordReader(name, format).read(row number, row) ─► Document | PromptOnly | PromptCompletion
                                                                   PreferencePair | UnpairedPreference | SteppedSolution

What is said is text, or a tuple of messages where the dataset is conversational.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from trl_ray.config.sections import ROLES
from trl_ray.data.chat.tool_schemas import Tool, check_tools
from trl_ray.data.formats.conversations import check_completion, check_messages
from trl_ray.data.formats.detection import (
    FORMAT_COLUMNS,
    QUESTIONS,
    SYSTEM_TEXTS,
    DatasetFormat,
    DatasetType,
    Form,
    check_form,
)
from trl_ray.data.formats.shared_prompts import shared_prompt
from trl_ray.data.formats.transcripts import Written
from trl_ray.data.validation import check_no_media, check_unicode, show
from trl_ray.errors import DataError
from trl_ray.types import Message

_WORDS = {"true": True, "false": False, "1": True, "0": False, "+": True, "-": False}
Said: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What every record brings along."""

    tools: tuple[Tool, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns that the format does not know, as they came."""
    written: Written | None = field(default=None, compare=False)
    """What messages were read from, where that was text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Carried):
    """Something to be learnt as a whole: a text, or a conversation."""

    content: Said


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOnly(Carried):
    """Something to be answered."""

    prompt: Said


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCompletion(Carried):
    """A prompt and the answer to learn."""

    prompt: Said
    completion: Said


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair(Carried):
    """A prompt, the better answer and the worse one."""

    prompt: Said
    chosen: Said
    rejected: Said

    @property
    def is_tie(self) -> bool:
        """Whether there is nothing to prefer."""
        return self.chosen == self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedPreference(Carried):
    """A prompt and an answer that is wanted or not."""

    prompt: Said
    completion: Said
    label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedSolution(Carried):
    """A prompt and a solution in steps, each right or wrong."""

    prompt: Said
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


Record: TypeAlias = Document | PromptOnly | PromptCompletion | PreferencePair | UnpairedPreference | SteppedSolution


def first_said(record: Record) -> Said:
    """What a record begins with."""
    return record.content if isinstance(record, Document) else record.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReader:
    """Reads the rows of one dataset; it remembers nothing between rows, so any row may be read at any time."""

    name: str
    """Names the dataset in messages."""
    format: DatasetFormat
    written: Mapping[str, str] = field(default_factory=dict)
    """How a column was called before the rows were converted, for messages."""
    roles: tuple[str, ...] = ROLES
    """Who may speak."""

    def read(self, number: int, row: Mapping[str, Any]) -> Record:
        """One row as a record.

        Raises:
            DataError: names the row, the field, what it must be and what it is.
        """
        for column in self.format.columns:
            if row.get(column) is None:
                given = "None" if column in row else "no such column"
                raise DataError(f"{self._at(number, column)} must be given, got {given}. Fill it or remove the row.")
        readers: dict[DatasetType, Callable[[int, Mapping[str, Any]], Record]] = {
            DatasetType.LANGUAGE_MODELING: self._document,
            DatasetType.PROMPT_ONLY: self._prompt_only,
            DatasetType.PROMPT_COMPLETION: self._prompt_completion,
            DatasetType.PREFERENCE: self._pair,
            DatasetType.IMPLICIT_PREFERENCE: self._implicit_pair,
            DatasetType.UNPAIRED_PREFERENCE: self._unpaired,
            DatasetType.STEPWISE_SUPERVISION: self._stepped,
        }
        return readers[self.format.type](number, row)

    def _document(self, number: int, row: Mapping[str, Any]) -> Document:
        (column,) = self.format.columns
        content = self._said(number, row, column)
        return Document(content=content, **self._carried(number, row))

    def _prompt_only(self, number: int, row: Mapping[str, Any]) -> PromptOnly:
        return PromptOnly(prompt=self._said(number, row, "prompt"), **self._carried(number, row))

    def _prompt_completion(self, number: int, row: Mapping[str, Any]) -> PromptCompletion:
        prompt = self._said(number, row, "prompt")
        completion = self._answer(number, row, "completion", prompt)
        return PromptCompletion(prompt=prompt, completion=completion, **self._carried(number, row))

    def _pair(self, number: int, row: Mapping[str, Any]) -> PreferencePair:
        prompt = self._said(number, row, "prompt")
        chosen = self._answer(number, row, "chosen", prompt)
        rejected = self._answer(number, row, "rejected", prompt)
        return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, **self._carried(number, row))

    def _implicit_pair(self, number: int, row: Mapping[str, Any]) -> PreferencePair:
        chosen, rejected = self._said(number, row, "chosen"), self._said(number, row, "rejected")
        where = f"Row {number} of {self.name}, fields 'chosen' and 'rejected'"
        split = shared_prompt(chosen, rejected)
        prompt, chosen, rejected = split.prompt, split.chosen, split.rejected
        if chosen == rejected:  # nobody asks where the prompt of a tie ends
            return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, **self._carried(number, row))
        self._check_question(number, row, prompt)
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise DataError(
                f"{where} must start with the prompt they share, they share nothing. Add a column with the prompt, or "
                "name it: column_mapping={THEIRS: prompt}."
            )
        if not isinstance(prompt, str):
            self._check_repeated_prompt(number, row, prompt)
        for column, answer in (("chosen", chosen), ("rejected", rejected)):
            self._check_answer(number, column, (), answer)
        return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, **self._carried(number, row))

    def _check_question(self, number: int, row: Mapping[str, Any], prompt: Said) -> None:
        """A question beside two answers is their prompt, unless they begin with it themselves."""
        if "prompt" in self.format.columns:
            return
        said = prompt if isinstance(prompt, str) else "\n".join(message["content"] or "" for message in prompt)
        for column in (*(_spoken_columns(row) if isinstance(prompt, str) else ()), *QUESTIONS):
            value = row.get(column)
            is_said = isinstance(value, str) and (not value.strip() or value.strip() in said)
            if not is_said and isinstance(value, (str, list, tuple)) and value:
                system = next((f", {name}: system" for name in SYSTEM_TEXTS if isinstance(row.get(name), str)), "")
                raise DataError(
                    f"{self._at(number, column)} must stand in what 'chosen' and 'rejected' begin with, or be the "
                    f"prompt, got {show(value)}. Set column_mapping={{{column}: prompt{system}}}, or {column}: null "
                    "there to leave it out."
                )

    def _check_repeated_prompt(self, number: int, row: Mapping[str, Any], prompt: tuple[Message, ...]) -> None:
        if "prompt" not in self.format.columns:
            return
        given = row["prompt"]
        check_form(given, Form.STANDARD, where=self._at(number, "prompt"))
        if given.strip() not in [message["content"].strip() for message in prompt if message["content"]]:
            raise DataError(
                f"{self._at(number, 'prompt')} must be a message that 'chosen' and 'rejected' start with, or a list of "
                f"messages that they follow, got {show(given)}. Mend it or remove the column."
            )

    def _unpaired(self, number: int, row: Mapping[str, Any]) -> UnpairedPreference:
        prompt = self._said(number, row, "prompt")
        completion = self._answer(number, row, "completion", prompt)
        label = _label(row["label"], where=self._at(number, "label"))
        return UnpairedPreference(prompt=prompt, completion=completion, label=label, **self._carried(number, row))

    def _stepped(self, number: int, row: Mapping[str, Any]) -> SteppedSolution:
        prompt = self._said(number, row, "prompt")
        steps, labels = row["completions"], row["labels"]
        for column, value in (("completions", steps), ("labels", labels)):
            if not isinstance(value, (list, tuple)) or not value:
                raise DataError(
                    f"{self._at(number, column)} must be a list with one entry per step, got {show(value)}. Mend the "
                    "row."
                )
        if len(steps) != len(labels):
            raise DataError(
                f"{self._at(number, 'labels')} must have one label per step, got {len(labels)} labels for {len(steps)} "
                "steps in 'completions'. Mend the row."
            )
        return SteppedSolution(
            prompt=prompt,
            steps=tuple(_text(s, where=f"{self._at(number, 'completions')}, step {i}") for i, s in enumerate(steps)),
            labels=tuple(_label(v, where=f"{self._at(number, 'labels')}, step {i}") for i, v in enumerate(labels)),
            **self._carried(number, row),
        )

    def _answer(self, number: int, row: Mapping[str, Any], column: str, prompt: Said) -> Said:
        answer = self._said(number, row, column)
        self._check_answer(number, column, prompt, answer)
        return answer

    def _check_answer(self, number: int, column: str, prompt: Said, answer: Said) -> None:
        if not isinstance(answer, str) and not isinstance(prompt, str):
            check_completion(prompt, answer, where=self._at(number, column))

    def _said(self, number: int, row: Mapping[str, Any], column: str) -> Said:
        value, where = row[column], self._at(number, column)
        check_form(value, self.format.form, where=where)
        return check_unicode(value, where) if isinstance(value, str) else self._messages(value, where)

    def _messages(self, value: object, where: str) -> tuple[Message, ...]:
        return check_messages(value, where=where, roles=self.roles)

    def _carried(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        check_no_media(row, where=f"Row {number} of {self.name}")
        where = self._at(number, "tools")
        tools = check_tools(row.get("tools"), where=where)
        if tools and self.format.form is Form.STANDARD:
            raise DataError(f"{where} must be empty, because text has no place for tools. Use messages.")
        known = {*self.format.columns, "tools"}
        return {"tools": tools, "columns": {str(key): value for key, value in row.items() if key not in known}}

    def _at(self, number: int, column: str) -> str:
        return f"Row {number} of {self.name}, field {self.written.get(column, column)!r}"


def _text(value: object, *, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, got {show(value)}. Mend or remove the row.")
    if not value.strip():
        raise DataError(f"{where} must not be empty, got {value!r}. Fill it or remove the row.")
    return check_unicode(value, where)


def _spoken_columns(row: Mapping[str, Any]) -> list[str]:
    """Columns of messages that no format reads."""
    return [
        column
        for column, value in row.items()
        if column not in FORMAT_COLUMNS and isinstance(value, (list, tuple)) and value and all(map(_is_message, value))
    ]


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and bool({"role", "from"} & set(item))


def _label(value: object, *, where: str) -> bool:
    if isinstance(value, (bool, np.bool_, int, float, np.number)) and value in (0, 1):  # a table with gaps holds 1.0
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:  # all that a table of text can hold
        return _WORDS[value.strip().lower()]
    raise DataError(f"{where} must be true or false (or 1 or 0), got {show(value)}. Map or remove the row.")
