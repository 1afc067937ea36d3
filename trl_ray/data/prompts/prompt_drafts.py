"""Makes prompts of rows: read, checked, rendered, with the dataset's completions; bad rows are gathered on the way.

row ─ PromptReader ─► prompt, columns ─ chat template ─► PromptDraft ─ tokenizer ─► PromptRow
                                                              └─ write_given, read_given ─► GivenRow
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from trl_ray.config.sections import PromptConfig
from trl_ray.data.bad_rows import BadRows
from trl_ray.data.chat.faithful_rendering import Finding
from trl_ray.data.chat.row_format import TOOLS
from trl_ray.data.chat.tool_schemas import check_tools
from trl_ray.data.examples.record_writer import Writer
from trl_ray.data.examples.tokenisation import ExampleTokenizer, Text, TextRules, encode
from trl_ray.data.formats.detection import Form
from trl_ray.data.formats.records import PromptOnly
from trl_ray.data.prompts.given_completions import GivenAnswer, GivenCompletions, GivenRow, read_given, write_given
from trl_ray.data.prompts.prompt_rows import PromptLayout, PromptReader
from trl_ray.data.sources.dataset_loading import Origin, Rows
from trl_ray.data.validation import check_kind, check_length, count_longer, plain_columns
from trl_ray.errors import DataError
from trl_ray.types import IntArray, Message

ColumnCheck = Callable[[Mapping[str, Any]], str | None]
"""Says what is wrong with the columns of a row ("field 'answer' must ..."); None where nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptRow:
    """One checked and tokenised row of a dataset."""

    token_ids: IntArray
    """[P] chat template applied."""
    num_cut: int = 0
    """Tokens that `max_prompt_length` cut off its beginning."""
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    given: GivenRow | None = None
    """The dataset's completion, where prompts may come with one."""
    where: str = "A row"
    """How messages name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDraft:
    """A row that is ready to be tokenised."""

    place: int
    """In the dataset or mixture."""
    origin: Origin
    prompt: str | tuple[Message, ...]
    """The system prompt inserted."""
    text: str
    columns: Mapping[str, Any]
    completion: Any = None
    """Of the dataset, where it is asked for."""
    is_asked: bool = False
    """The prompt was a text, and became the user's message after the system prompt."""
    is_split: bool = False
    """The prompt is a conversation without its last answer."""
    findings: tuple[Finding, ...] = ()
    """What the chat template does not write as the row has it."""

    @property
    def where(self) -> str:
        return f"Row {self.origin.number} of {self.origin.name}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptLoading:
    """What is done to each row of a dataset; rows that cannot be used are gathered."""

    config: PromptConfig
    tokenizer: ExampleTokenizer
    completions: GivenCompletions | None
    check: ColumnCheck | None
    bad: BadRows

    @property
    def asks_texts(self) -> bool:
        """Whether texts become messages of the user: a system prompt can stand before nothing else."""
        has_template = bool(self.tokenizer.chat_template)
        return self.config.system_prompt is not None and self.completions is None and has_template

    def _guard(self, origin: Origin, place: int) -> AbstractContextManager[None]:
        return self.bad.guard(name=origin.name, number=origin.number, place=place)

    def drafts(
        self, rows: Rows, readers: Mapping[str, PromptReader], *, first: PromptDraft | None = None
    ) -> list[PromptDraft]:
        """Every row's prompt, all text or all conversations as that of `first`, as text, and its columns."""
        drafts: list[PromptDraft] = []
        for index, row in enumerate(rows.rows):
            origin, place = rows.origin(index), rows.start + index
            with self._guard(origin, place):
                drafts.append(self._draft(row, readers[origin.name], origin, place, first))
                first = first or drafts[0]
        return drafts

    def _draft(
        self, row: Mapping[str, Any], reader: PromptReader, origin: Origin, place: int, first: PromptDraft | None
    ) -> PromptDraft:
        config, where = self.config, f"Row {origin.number} of {origin.name}"
        read = reader.read(row, where=where)
        prompt = read[config.dataset_prompt_column]
        is_asked = isinstance(prompt, str) and self.asks_texts
        if is_asked:
            prompt = ({"role": "user", "content": prompt},)
        check_kind(prompt, prompt if first is None else first.prompt, where=f"{where}, field {reader.column!r}")
        if not isinstance(prompt, str):
            prompt = with_system_prompt(prompt, config.system_prompt)
        columns = plain_columns(read, config.dataset_prompt_column, where=where)
        problem = None if self.check is None else self.check(columns)
        if problem is not None:
            raise DataError(f"{where}, {problem}")
        text = self._text(prompt, columns, where)
        return PromptDraft(
            place=place,
            origin=origin,
            prompt=prompt,
            text=text.text,
            columns=columns,
            completion=None if self.completions is None else read.get(self.completions.column),
            is_asked=is_asked,
            is_split=reader.layout is PromptLayout.CONVERSATION and reader.completion_column in read,
            findings=text.findings,
        )

    def _text(self, prompt: str | tuple[Message, ...], columns: Mapping[str, Any], where: str) -> Text:
        """Ready to be continued; a row's own tools and values for the chat template go before those of the run."""
        at = f"{where}, field {TOOLS!r}"
        tools = () if isinstance(prompt, str) else check_tools(columns.get(TOOLS), where=at)
        record = PromptOnly(prompt=prompt, tools=tools, columns=columns)
        rules = TextRules(template_kwargs=self.config.chat_template_kwargs)
        return Writer(record=record, tokenizer=self.tokenizer, rules=rules, where=where).opened(prompt)

    def given(self, drafts: Sequence[PromptDraft], form: Form) -> dict[int, GivenRow]:
        """The dataset's completions by place; none where none are asked for."""
        if self.completions is None:
            return {}
        written: list[tuple[PromptDraft, tuple[Text, ...]]] = []
        for draft in drafts:
            with self._guard(draft.origin, draft.place):
                answer = GivenAnswer(
                    prompt=draft.prompt, completion=draft.completion, origin=draft.origin, columns=draft.columns
                )
                texts = write_given(answer, form, self.completions, config=self.config, tokenizer=self.tokenizer)
                written.append((draft, texts))
        encoded = iter(encode(self.tokenizer, [text for _, texts in written for text in texts]))
        found = {}
        for draft, texts in written:
            pair = list(itertools.islice(encoded, len(texts)))
            with self._guard(draft.origin, draft.place):
                found[draft.place] = read_given(pair, self.completions, where=draft.where)
        return found

    def check_lengths(self, drafts: Sequence[PromptDraft], rows: Sequence[PromptRow], limit: int | None) -> None:
        """See that each prompt has a token and leaves room for a completion."""
        for lengths in (
            {place: len(row.given.prompt_ids) for place, row in enumerate(rows) if row.given is not None},
            {place: len(row.token_ids) for place, row in enumerate(rows)},
        ):
            longer = 0 if limit is None else count_longer(list(lengths.values()), limit)
            for place, length in lengths.items():
                draft = drafts[place]
                if draft.place in self.bad.places:
                    continue
                with self._guard(draft.origin, draft.place):
                    if length == 0:
                        raise DataError(f"{draft.where} must have at least one token after tokenisation, it has none.")
                    check_length(length, limit, where=draft.where, longer=longer)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """Put `system_prompt` first unless the conversation brings a system or developer message of its own."""
    if system_prompt is None or messages[0]["role"] in {"system", "developer"}:
        return tuple(messages)
    return ({"role": "system", "content": system_prompt}, *messages)
