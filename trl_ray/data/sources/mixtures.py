"""Mixes several datasets into one sequence; only places are chosen, rows stay where they are.

    sources ─ join: one after the other, whole ─────────────────────────┐
    sources, fractions ─ join: the first rows of each ──────────────────┼─► Mixture: place ─► (source, number) ─► row
    sources, shares ─ join: some rows of each, by its own share ────────┤
    sources, weights, seed ─ mix: datasets.interleave_datasets ─────────┤
    sources, places ─ hold_out: some of a mixture's places, the others ─┘

Each row is found by its place alone, so that a resumed run goes on at a row number, and errors can name the row in
the dataset that it came from. Streams have no places: mixed_streams.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.sections import MixtureStopping
from trl_ray.data.sources.row_sequences import GatheredRows, RowSequence
from trl_ray.data.validation import show
from trl_ray.errors import DataError

_HOLDING_OUT = 0x68656C64
"""Keeps these random numbers apart from others of the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One dataset of a mixture and its share."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    weight: float = 1.0
    """Relative to the other weights; above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of one dataset's own rows."""

    size: float
    """In (0, 1]."""
    seed: int | None = None
    """Of a draw at random; None takes the first rows."""

    def rows_of(self, source: Source) -> NDArray[np.int64]:
        """Their numbers: of a draw, those that ``datasets.Dataset.shuffle(seed)`` has first.

        Raises:
            DataError: it leaves nothing.
        """
        count = int(self.size * len(source.rows))
        if not count:
            raise DataError(
                f"The share of {source.name} must leave at least one of its {len(source.rows)} rows, {self.size} "
                "leaves none. Raise it, or leave the dataset out."
            )
        if self.seed is None:
            return np.arange(count)
        return np.random.default_rng(self.seed).permutation(len(source.rows))[:count]


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

    def unused(self) -> dict[str, int]:
        """How many rows of each source are in no place; sources of which all rows are there have no entry."""
        found = {}
        for index, source in enumerate(self.sources):
            used = len(np.unique(self.row_numbers[self.source_ids == index]))
            if used < len(source.rows):
                found[source.name] = len(source.rows) - used
        return found


def join(
    sources: Sequence[Source],
    *,
    fractions: Sequence[float] | None = None,
    shares: Sequence[Share | None] | None = None,
) -> Mixture:
    """One source after the other; whole, or with fractions as TRL takes them: of each its first rows.

    Fractions are relative to each other. The mixture is as long as it can be without repeating a row.

    Args:
        sources: in their order.
        fractions: of the mixture, one a source.
        shares: of its own rows, one a source; None is all of them. Not with fractions.

    Raises:
        DataError: there is no source, one is empty, two have one name, or a fraction or share leaves nothing of one.
    """
    _check(sources)
    if shares is not None:
        kept = [
            np.arange(len(source.rows)) if share is None else share.rows_of(source)
            for source, share in zip(sources, shares, strict=True)
        ]
        drawn = [
            replace(source, rows=GatheredRows(source.rows, numbers))
            if share is not None and share.seed is not None and isinstance(source.rows, RowSequence)
            else source
            for source, share, numbers in zip(sources, shares, kept, strict=True)
        ]
        return Mixture(
            sources=tuple(drawn),
            source_ids=np.repeat(np.arange(len(sources)), [len(each) for each in kept]),
            row_numbers=np.concatenate(kept),
        )
    counts = [len(source.rows) for source in sources]
    if fractions is not None:
        total = math.fsum(fractions)
        parts = [fraction / total for fraction in fractions]
        length = min(count / part for count, part in zip(counts, parts, strict=True))
        counts = [round(part * length) for part in parts]
        for source, count, fraction in zip(sources, counts, fractions, strict=True):
            if not count:
                raise DataError(
                    f"The fraction of {source.name} must leave at least one of its rows, {fraction} leaves none beside "
                    f"the others' {', '.join(map(str, fractions))}. Raise it, or leave the dataset out."
                )
    return Mixture(
        sources=tuple(sources),
        source_ids=np.repeat(np.arange(len(sources)), counts),
        row_numbers=np.concatenate([np.arange(count) for count in counts]),
    )


def hold_out(mixture: Mixture, *, size: float, seed: int) -> tuple[Mixture, Mixture]:
    """Training and held-out places, both in the order of the mixture; which ones depends on the seed alone.

    Args:
        mixture: of all rows.
        size: a share below 1, of which the next whole number is taken, or a number of rows.
        seed: of the draw.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = math.ceil(size * len(mixture)) if size < 1 else int(size)
    if count >= len(mixture):
        raise DataError(
            f"test_split_size must leave rows to train on, got {size:g} with {len(mixture)} rows. Lower it."
        )
    held = np.zeros(len(mixture), np.bool_)
    held[np.random.default_rng([seed, _HOLDING_OUT]).permutation(len(mixture))[:count]] = True
    train, test = (
        Mixture(sources=mixture.sources, source_ids=mixture.source_ids[chosen], row_numbers=mixture.row_numbers[chosen])
        for chosen in (~held, held)
    )
    return train, test


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
