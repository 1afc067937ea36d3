"""Makes checked, tokenised prompts of rows: of a whole dataset, or of a window of a stream.

Rows ─ PromptLoading: read, check, render ─► drafts ─ tokenise, cut, check lengths ─► MadePrompts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trl_ray.config.sections import PromptConfig
from trl_ray.data.bad_rows import BadRows
from trl_ray.data.examples.tokenisation import ExampleTokenizer
from trl_ray.data.formats.detection import Form
from trl_ray.data.prompts.given_completions import GivenCompletions, GivenRow, require_completions
from trl_ray.data.prompts.prompt_drafts import ColumnCheck, PromptDraft, PromptLoading, PromptRow
from trl_ray.data.prompts.prompt_notes import prompt_notes
from trl_ray.data.prompts.prompt_rows import PromptReader, prompt_readers
from trl_ray.data.prompts.prompt_tokens import encode_prompts
from trl_ray.data.sources.dataset_loading import Rows
from trl_ray.errors import DataError
from trl_ray.types import IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptRules:
    """What rows are made into prompts by."""

    config: PromptConfig
    """Names the prompt column, and what the chat template is told."""
    tokenizer: ExampleTokenizer
    """Of the policy, its chat template set."""
    max_prompt_tokens: int | None = None
    """What the model holds minus max_completion_length; None does not check."""
    max_prompt_length: int | None = None
    """Of longer prompts the last tokens are kept; messages and texts stay whole."""
    completions: GivenCompletions | None = None
    """Prompts of which a share comes with the dataset's completion; None: none does."""
    check_columns: ColumnCheck | None = None
    """Says what is wrong with a row's other columns."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MadePrompts:
    """The prompts of some rows."""

    rows: tuple[PromptRow, ...]
    numbers: tuple[int, ...]
    """[N] of their rows."""
    num_left_out: int
    """Rows that cannot be used, where such rows are dropped."""
    notes: tuple[str, ...]
    """What a user should know of the rows, a sentence each."""
    first: PromptDraft
    """The first row that could be read: all others must be of its kind."""


def readers_of(rows: Rows, rules: PromptRules) -> dict[str, PromptReader]:
    """How to read each source of a mixture, or the one dataset, by name.

    Raises:
        DataError: there is no column with prompts, or none with completions where they are asked for.
    """
    completions = rules.completions
    readers = prompt_readers(rows, rules.config, completion_column=None if completions is None else completions.column)
    for source in rows.sources or (rows,):
        if completions is not None:
            require_completions(source, completions.column, added=readers[source.name].columns)
    return readers


def make_prompts(
    rows: Rows,
    rules: PromptRules,
    readers: Mapping[str, PromptReader],
    *,
    first: PromptDraft | None = None,
    columns: Sequence[str] = (),
    may_be_empty: bool = False,
) -> MadePrompts:
    """Read, check, render and tokenise rows.

    Args:
        rows: with at least one.
        rules: of the run.
        readers: of the datasets that the rows come from, by name.
        first: of a row before these, whose kind they must be of.
        columns: which every prompt has, beside those of the rows.
        may_be_empty: with `first`; where bad rows are dropped, all of these may be.

    Raises:
        DataError: a row cannot be used; names row and field.
        ModelError: conversational prompts and no chat template, or one that refuses a row.
    """
    config, tokenizer, total = rules.config, rules.tokenizer, len(rows.rows)
    bad = BadRows(config.on_bad_row)
    loading = PromptLoading(
        config=config, tokenizer=tokenizer, completions=rules.completions, check=rules.check_columns, bad=bad
    )
    drafts = loading.drafts(rows, readers, first=first)
    if not drafts:
        bad.settle(total=total, may_be_all=may_be_empty)
        assert first is not None, "rows that may all be dropped have one before them"
        return MadePrompts(rows=(), numbers=(), num_left_out=total, notes=bad.report(), first=first)
    standard = isinstance(drafts[0].prompt, str)
    if config.system_prompt is not None and standard:
        raise DataError(
            f"system_prompt needs conversational prompts, those of {rows.name} are plain text that is taken as it "
            "stands, as there is no chat template or the dataset's completions are taught. Write it into the "
            "text, make each prompt a list of messages, or remove system_prompt."
        )
    texts = [draft.text for draft in drafts]
    token_ids = encode_prompts(tokenizer, texts) if standard else _encode_rendered(tokenizer, texts)
    given = loading.given(drafts, Form.STANDARD if standard else Form.CONVERSATIONAL)
    # Of the prompt's last tokens, as many as are wanted.
    kept = slice(None) if rules.max_prompt_length is None else slice(-rules.max_prompt_length, None)
    every = dict.fromkeys((*columns, *(column for draft in drafts for column in draft.columns)))
    ready = [
        PromptRow(
            token_ids=ids[kept],
            num_cut=len(ids) - len(ids[kept]),
            given=None if (row := given.get(draft.place)) is None else _cut(row, kept),
            messages=None if isinstance(draft.prompt, str) else draft.prompt,
            text=draft.prompt if isinstance(draft.prompt, str) else None,
            columns={column: draft.columns.get(column) for column in every},
            where=draft.where,
        )
        for draft, ids in zip(drafts, token_ids, strict=True)
    ]
    loading.check_lengths(drafts, ready, rules.max_prompt_tokens)
    bad.settle(total=total, may_be_all=may_be_empty)
    good = [(draft.place, row) for draft, row in zip(drafts, ready, strict=True) if draft.place not in bad.places]
    cut = [row.num_cut for row in ready]
    kept_rows = tuple(row for _, row in good)
    return MadePrompts(
        rows=kept_rows,
        numbers=tuple(place for place, _ in good),
        num_left_out=len(bad.places),
        notes=(*bad.report(), *prompt_notes(rows.name, drafts, kept_rows, cut, sum(map(len, token_ids)))),
        first=drafts[0] if first is None else first,
    )


def _cut(row: GivenRow, kept: slice) -> GivenRow:
    ids = row.prompt_ids[kept]
    return replace(row, prompt_ids=ids, num_cut_off_prompt=len(row.prompt_ids) - len(ids))


def _encode_rendered(tokenizer: ExampleTokenizer, texts: Sequence[str]) -> list[IntArray]:
    """Token ids ``[P]`` of each; a template writes its special tokens itself."""
    return [np.asarray(ids, np.int32) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
