"""Packs tokenised examples into rows of at most `max_length` tokens whose pieces never see each other.

    lengths [N] -- pack --> pieces (example, start, stop) [P, 3], the row of each [P]

    examples       aaaaa bb ccc d         max_length 4
    bfd            aaaa | cccd | bb       the fifth `a` is cut off
    bfd_split      aaaa | ccca | bbd      it becomes a piece of its own
    wrapped        aaaa | abbc | ccd      examples end and begin wherever a row does

Every piece is attended to by itself: its positions start at 0, and its first token, which nothing precedes, is
never a target. What a cut costs is therefore context, not correctness.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.example_options import PackingStrategy
from trl_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packing:
    """All rows of a data set, and what they leave over."""

    pieces: NDArray[np.int32]
    """[P, 3] example, start, stop of each piece, row by row in the order they stand there."""
    row_numbers: NDArray[np.int32]
    """[P] the row of each piece, from 0 on without gaps."""
    max_length: int
    cut_tokens: int
    """Tokens of examples beyond `max_length` that are in no row; only `bfd` cuts."""

    @property
    def num_rows(self) -> int:
        return int(self.row_numbers[-1]) + 1 if len(self.row_numbers) else 0


def pack(lengths: Sequence[int] | NDArray[Any], *, max_length: int, strategy: PackingStrategy | str) -> Packing:
    """Distribute examples of `lengths` tokens over rows of at most `max_length` tokens.

    Examples without tokens are in no row. The result is a function of the arguments alone: equally long examples
    keep their order. Best fit decreasing as in "Fewer Truncations Improve Language Modeling", arXiv:2404.10830:
    from the longest piece on, each goes where the least room is left that still holds it.

    Raises:
        ConfigError: `max_length` is below 2 (one token has nothing to predict), or there is no such strategy.
    """
    if max_length < 2:
        raise ConfigError(
            f"max_length must be at least 2 for packing, got {max_length}. Raise it or set packing=false."
        )
    if strategy not in list(PackingStrategy):
        known = ", ".join(PackingStrategy)
        raise ConfigError(f"packing_strategy must be one of {known}, got {strategy!r}.")
    sizes = np.asarray(lengths, dtype=np.int64)
    if strategy == PackingStrategy.WRAPPED:
        pieces, rows = _wrapped(sizes, max_length)
    else:
        pieces = _pieces(sizes, max_length, split=strategy == PackingStrategy.BFD_SPLIT)
        pieces, rows = _best_fit_decreasing(pieces, max_length)
    cut = int(sizes.sum()) - int(_sizes(pieces).sum(dtype=np.int64))
    return Packing(pieces=pieces, row_numbers=rows, max_length=max_length, cut_tokens=cut)


def _sizes(pieces: NDArray[np.int32]) -> NDArray[np.int32]:
    return pieces[:, 2] - pieces[:, 1]


def _pieces(sizes: NDArray[np.int64], max_length: int, *, split: bool) -> NDArray[np.int32]:
    """[P, 3] the examples, cut to `max_length` or split at its multiples, in order."""
    counts = -(-sizes // max_length) if split else np.minimum(sizes, 1)
    examples = np.repeat(np.arange(len(sizes)), counts)
    starts = (np.arange(len(examples)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_length
    return np.stack([examples, starts, np.minimum(starts + max_length, sizes[examples])], axis=1).astype(np.int32)


def _best_fit_decreasing(pieces: NDArray[np.int32], max_length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The pieces row by row, and the row of each."""
    pieces = pieces[np.argsort(-_sizes(pieces), kind="stable")]
    numbers = np.empty(len(pieces), np.int32)
    waiting: dict[int, deque[int]] = defaultdict(deque)  # rows by the room they have left, oldest first
    rooms: list[int] = []  # the keys of `waiting` in ascending order: fewer than max_length, however many rows
    opened = 0
    for index, size in enumerate(_sizes(pieces).tolist()):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, number = max_length, opened
            opened += 1
        else:
            room = rooms[place]
            number = waiting[room].popleft()
            if not waiting[room]:
                del waiting[room], rooms[place]
        numbers[index] = number
        left = room - size
        if left:
            if left not in waiting:
                insort(rooms, left)
            waiting[left].append(number)
    order = np.argsort(numbers, kind="stable")
    return pieces[order], numbers[order]


def _wrapped(sizes: NDArray[np.int64], max_length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The examples one behind the other, cut where a row is full: the pieces, and the row of each."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.sort(np.concatenate([[0], ends, np.arange(0, total, max_length), [total]]))
    borders = borders[np.diff(borders, prepend=-1) > 0]  # `unique` takes ten times as long
    starts, stops = borders[:-1], borders[1:]
    examples = np.searchsorted(ends, starts, side="right")
    begins = (ends - sizes)[examples]
    pieces = np.stack([examples, starts - begins, stops - begins], axis=1).astype(np.int32)
    return pieces, (starts // max_length).astype(np.int32)
