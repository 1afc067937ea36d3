"""Mixes several streams into one while they are read; nobody knows how long they are.

    streams ─ joined_rows: one after the other ───────────────────────────────┬─► DrawnRow, DrawnRow, ...
    streams, weights, seed ─ drawn_rows: as datasets.interleave_datasets does ─┘

What is drawn is what `mixtures.mix` draws of the same rows. A place is reached by drawing all before it anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trl_ray.config.sections import MixtureStopping
from trl_ray.data.sources.dataset_files import Row
from trl_ray.errors import DataError

_DRAWN_TOGETHER = 1000
"""Of the library: sources that are drawn by one call."""
ReadRows = Callable[[int], Iterator[Row]]
"""The rows of a stream from a number on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRow:
    """A row, the place of its stream among the others, and its number there."""

    source: int
    number: int
    row: Row


class _Reading:
    """A stream that is known to end one row before it does."""

    def __init__(self, read: ReadRows, name: str) -> None:
        self._read, self._name = read, name
        self.is_exhausted = False
        self._begin()

    def _begin(self) -> None:
        self._number, self._rows = 0, self._read(0)
        self._ahead = list(itertools.islice(self._rows, 1))
        if not self._ahead:
            raise DataError(f"A dataset must have at least one row, {self._name} has none. Leave it out.")

    def take(self) -> tuple[int, Row]:
        """The next row; of a stream that has ended, the first one again."""
        if not self._ahead:
            self._begin()
        number, row = self._number, self._ahead[0]
        self._number, self._ahead = number + 1, list(itertools.islice(self._rows, 1))
        self.is_exhausted = self.is_exhausted or not self._ahead
        return number, row


def joined_rows(reads: Sequence[ReadRows]) -> Iterator[DrawnRow]:
    """One stream after the other."""
    for source, read in enumerate(reads):
        for number, row in enumerate(read(0)):
            yield DrawnRow(source=source, number=number, row=row)


def drawn_rows(
    reads: Sequence[ReadRows],
    names: Sequence[str],
    *,
    weights: Sequence[float],
    seed: int,
    stopping: MixtureStopping = MixtureStopping.FIRST_EXHAUSTED,
) -> Iterator[DrawnRow]:
    """Rows of the streams, each drawn with a probability proportional to its weight; their order is kept.

    Raises:
        DataError: a stream is empty.
    """
    streams = [_Reading(read, name) for read, name in zip(reads, names, strict=True)]
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    rng = np.random.default_rng(seed)
    once = stopping is MixtureStopping.ALL_EXHAUSTED_WITHOUT_REPLACEMENT
    ends = any if stopping is MixtureStopping.FIRST_EXHAUSTED else all
    while True:
        for source in rng.choice(len(streams), size=_DRAWN_TOGETHER, p=shares).tolist():
            if ends(stream.is_exhausted for stream in streams):
                return
            if once and streams[source].is_exhausted:
                continue
            number, row = streams[source].take()
            yield DrawnRow(source=source, number=number, row=row)
