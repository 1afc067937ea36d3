"""Rows are told from others by their content, and a long dataset by as many rows as tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

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


def test_of_many_rows_some_are_looked_at_the_first_and_the_last_among_them() -> None:
    class Many(Sequence[Example]):
        def __init__(self, last: int) -> None:
            self.seen: list[int] = []
            self._last = last

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, place):  # type: ignore[no-untyped-def]
            self.seen.append(place)
            return example(place, word=self._last if place == 999_999 else 7)

    first, other = Many(7), Many(8)
    assert rows_fingerprint(first) != rows_fingerprint(other)
    assert len(first.seen) == 4096 and first.seen[0] == 0 and first.seen[-1] == 999_999
