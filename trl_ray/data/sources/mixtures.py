"""Mixes several datasets with weights into one sequence; only places are drawn, rows stay where they are.

    sources, weights, seed ─ datasets.interleave_datasets over places ─► Mixture: place ─► (source, row number) ─► row

Each row is found by its place alone, so that a resumed run goes on at a row number, and errors can name the row in
the dataset that it came from. Streams have no places: mix them with `datasets.interleave_datasets` itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.sections import MixtureStopping
from trl_ray.data.validation import show
from trl_ray.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One dataset of a mixture and its share."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    weight: float = 1.0
    """Relative to the other weights; above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRow:
    """A row and where it came from."""

    source: str
    number: int
    """The row's number in its source."""
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """The rows of several sources in one order."""

    sources: tuple[Source, ...]
    source_ids: NDArray[np.int64]
    """[N]"""
    row_numbers: NDArray[np.int64]
    """[N]"""

    def __len__(self) -> int:
        """N, repetitions included."""
        return len(self.source_ids)

    def __getitem__(self, place: int) -> MixedRow:
        """The row at one place; IndexError beyond the end, so that a mixture can be iterated."""
        source = self.sources[self.source_ids[place]]
        number = int(self.row_numbers[place])
        return MixedRow(source=source.name, number=number, row=source.rows[number])


def mix(
    sources: Sequence[Source], *, seed: int, stopping: MixtureStopping = MixtureStopping.FIRST_EXHAUSTED
) -> Mixture:
    """Draw the source of every place with probabilities proportional to the weights; rows keep their order.

    Raises:
        DataError: there is no source, one is empty, two have one name, or a weight is not above 0.
    """
    from datasets import Dataset, interleave_datasets

    _check(sources)
    places = [
        Dataset.from_dict({"source": np.full(len(source.rows), index), "number": np.arange(len(source.rows))})
        for index, source in enumerate(sources)
    ]
    total = math.fsum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    drawn = interleave_datasets(places, probabilities=shares, seed=seed, stopping_strategy=str(stopping))
    columns = drawn.with_format("numpy")[:]
    return Mixture(sources=tuple(sources), source_ids=columns["source"], row_numbers=columns["number"])


def _check(sources: Sequence[Source]) -> None:
    if not sources:
        raise DataError("A mixture must have at least one dataset, got none. Name one.")
    names = [source.name for source in sources]
    for source in sources:
        if not math.isfinite(source.weight) or source.weight <= 0:
            raise DataError(
                f"The weight of {source.name} must be a number above 0, got {show(source.weight)}. Change it, or leave "
                "the dataset out."
            )
        if not len(source.rows):
            raise DataError(f"A dataset must have at least one row, {source.name} has none. Leave it out.")
        if names.count(source.name) > 1:
            raise DataError(f"The datasets of a mixture must have names of their own, got {source.name!r} twice.")
