"""Rows are told from others by their content, all of them, however they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from trl_ray.data.examples.made_examples import RowExamples
from trl_ray.data.examples.token_table import RowState, RowTokens, TokenTable, as_table
from trl_ray.pipelines.supervised.rows_fingerprint import rows_fingerprint
from trl_ray.types import Example, SampleLabel, TrainingSample


def example(row: int, *, word: int = 7, heard: bool = True, desirable: bool | None = None) -> Example:
    sample = TrainingSample(
        group_id=row,
        prompt_ids=np.array([row], np.int32),
        completion_ids=np.array([word, 9], np.int32),
        loss_mask=np.array([heard, True]),
        label=None if desirable is None else SampleLabel(desirable=desirable),
    )
    return Example(row=row, samples=(sample,))


ROWS = [example(row) for row in range(5)]


def test_the_same_rows_are_the_same() -> None:
    assert rows_fingerprint(ROWS) == rows_fingerprint([example(row) for row in range(5)])
    assert rows_fingerprint([]) == rows_fingerprint([])


def test_a_word_a_target_a_label_an_order_and_a_number_tell() -> None:
    rated = [example(row, desirable=True) for row in range(5)]
    mismatched = [replace(ROWS[0], mismatched=ROWS[1].samples[0]), *ROWS[1:]]
    others: Sequence[Sequence[Example]] = (
        [*ROWS[:4], example(4, word=8)],
        [*ROWS[:4], example(4, heard=False)],
        rated,
        [*rated[:4], example(4, desirable=False)],
        mismatched,
        ROWS[::-1],
        ROWS[:4],
    )
    assert len({rows_fingerprint(rows) for rows in (ROWS, *others)}) == 8


def table(count: int = 5000, *, changed: int | None = None, parts: int = 1) -> RowExamples:
    """Examples of a table in so many batches, of whose rows one has another last token."""
    rows = [
        RowTokens(state=RowState.KEPT, samples=example(row, word=8 if row == changed else 7).samples)
        for row in range(count)
    ]
    size = count // parts
    tables = [as_table(rows[start : start + size]) for start in range(0, count, size)]
    return RowExamples(TokenTable(pa.concat_tables(tables)))


def test_of_many_rows_every_one_is_looked_at_and_not_how_they_are_kept() -> None:
    whole = rows_fingerprint(table())
    assert whole == rows_fingerprint(table(parts=7))
    # Of 5000 evenly spaced rows 4096 leave out 904.
    others = {rows_fingerprint(table(changed=row)) for row in (0, 5, 2501, 2502, 2503, 4999)}
    assert len(others | {whole, rows_fingerprint(table(4999))}) == 8


def test_lengths_tell_where_the_tokens_are_the_same() -> None:
    def split(border: int) -> RowExamples:
        ids = np.arange(5, dtype=np.int32)
        sample = TrainingSample(
            group_id=0, prompt_ids=ids[:border], completion_ids=ids[border:], loss_mask=np.ones(5 - border, np.bool_)
        )
        return RowExamples(TokenTable(as_table([RowTokens(state=RowState.KEPT, samples=(sample,))])))

    assert rows_fingerprint(split(2)) != rows_fingerprint(split(3))
