"""Finds the prompt of every row: in its own column, or in a conversation up to the assistant's last turn.

    {prompt: text or messages}  ──────────────────────────────► prompt, the other columns
    {messages: [.., user, assistant]}  ─ split_conversation ──► prompt [.., user], completion [assistant], the others
    {instruction, input, output}  ─ alpaca_to_messages ───────► prompt [user], completion [assistant], the others

A conversation's last answer is what was given as an example: whoever is to write answers does not begin with it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.config.sections import ROLES, PromptConfig
from trl_ray.data.formats.conversations import check_messages, split_conversation
from trl_ray.data.formats.detection import QUESTIONS
from trl_ray.data.formats.foreign_formats import alpaca_to_messages, to_messages, unwritten, with_system
from trl_ray.data.formats.written_messages import read_messages
from trl_ray.data.sources.dataset_loading import Rows
from trl_ray.data.validation import check_no_media, check_prompt, require_column, show
from trl_ray.errors import DataError
from trl_ray.types import Message

CONVERSATIONS = ("messages", "conversations")
_PROMPT, _COMPLETION = "prompt", "completion"
_INSTRUCTION, _OUTPUT = "instruction", "output"
_INSTRUCTED = (_INSTRUCTION, "input", "system", "history")
"""Columns of Alpaca's rows that make up a prompt."""


class PromptLayout(enum.StrEnum):
    """Where a row has its prompt."""

    COLUMN = "column"
    """In a column of its own."""
    CONVERSATION = "conversation"
    """In a whole conversation, whose last answer is no part of it."""
    ALPACA = "alpaca"
    """In an instruction with its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """Reads the prompts of one dataset; it remembers nothing between rows."""

    column: str
    """The column that holds them."""
    layout: PromptLayout
    config: PromptConfig
    completion_column: str = _COMPLETION
    """Where an answer that is split off is put."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it adds to a row."""
        has_own = self.layout is PromptLayout.COLUMN
        return () if has_own else (self.config.dataset_prompt_column, self.completion_column)

    def read(self, row: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """The row with a checked prompt in the run's prompt column.

        Raises:
            DataError: there is no prompt, or it cannot be used; names row and field.
        """
        check_no_media(row, where=where)
        at = f"{where}, field {self.column!r}"
        if self.layout is PromptLayout.CONVERSATION:
            row = self._split(row, where=where, at=at)
        elif self.layout is PromptLayout.ALPACA:
            row = self._instructed(row, where=where)
        else:
            row = {**row, self.column: self._spoken(read_messages(row.get(self.column), where=at), where=where)}
        name = self.config.dataset_prompt_column
        return {**self._begun(row, where=where), name: self._checked(row, at=at, where=where)}

    def _split(self, row: Mapping[str, Any], *, where: str, at: str) -> dict[str, Any]:
        whole = {key: row[key] for key in (self.column, "system") if key in row}
        messages = to_messages(unwritten(whole, where=where), where=where, role_mapping=self.config.role_mapping).get(
            "messages"
        )
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{at} must be a list of messages, got {show(messages)}. Mend or remove the row.")
        prompt, answer = split_conversation(messages)
        if not prompt:
            raise DataError(f"{at} must have a message before the answer, got {show(messages)}. Remove the row.")
        kept = {key: value for key, value in row.items() if key != self.column}
        if self.column == "conversations":
            kept.pop("system", None)  # it is the first message now
        if answer:
            kept[self.completion_column] = answer
        return {**kept, self.config.dataset_prompt_column: prompt}

    def _instructed(self, row: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        answer = row.get(_OUTPUT)
        made = alpaca_to_messages({**row, _OUTPUT: answer or ""}, where=where)
        kept = {key: value for key, value in row.items() if key not in _INSTRUCTED}
        if answer is not None:
            kept[self.completion_column] = made[_COMPLETION]
        return {**kept, self.config.dataset_prompt_column: made[_PROMPT]}

    def _spoken(self, value: Any, *, where: str) -> Any:
        found: Any = to_messages({_PROMPT: value}, where=where, role_mapping=self.config.role_mapping)[_PROMPT]
        return found

    def _begun(self, row: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
        return {key: value for key, value in row.items() if key != "system"} if self._has_system else row

    @property
    def _has_system(self) -> bool:
        return "system" in self.config.column_mapping.values()

    def _checked(self, row: Mapping[str, Any], *, at: str, where: str) -> str | tuple[Message, ...]:
        prompt = row[self.config.dataset_prompt_column]
        if self._has_system:
            prompt = with_system({_PROMPT: prompt, "system": row.get("system")}, where=where)[_PROMPT]
        if isinstance(prompt, (list, tuple)):
            return check_messages(prompt, where=at, roles=(*ROLES, *self.config.role_mapping.values()))
        return check_prompt(prompt, where=at)


def prompt_readers(rows: Rows, config: PromptConfig, *, completion_column: str | None) -> dict[str, PromptReader]:
    """How to read each source of a mixture, or the one dataset: by name.

    Raises:
        DataError: there is no column with prompts; offers the nearest.
    """
    readers = {}
    for source in rows.sources or (rows,):
        column, layout = _found(source.columns, config.dataset_prompt_column)
        require_column(source.columns, column, name=source.name, aliases=(*QUESTIONS, *CONVERSATIONS))
        readers[source.name] = PromptReader(
            column=column, layout=layout, config=config, completion_column=completion_column or _COMPLETION
        )
    return readers


def _found(columns: Sequence[str], named: str) -> tuple[str, PromptLayout]:
    """The column that prompts are read from, and how."""
    if named not in columns and named == _PROMPT:
        whole = next((name for name in CONVERSATIONS if name in columns), None)
        if whole is not None:
            return whole, PromptLayout.CONVERSATION
        if _INSTRUCTION in columns and {"input", _OUTPUT} & set(columns):
            return _INSTRUCTION, PromptLayout.ALPACA
    return named, PromptLayout.CONVERSATION if named in CONVERSATIONS else PromptLayout.COLUMN
