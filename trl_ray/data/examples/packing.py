"""Packs tokenised examples into rows of at most `max_length` tokens whose pieces never see each other.

    lengths [N] -- pack --> rows of pieces (example, start, stop) -- gather --> ids [T], boundaries [P+1]

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
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.example_options import PackingStrategy
from trl_ray.errors import ConfigError
from trl_ray.types import IntArray

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPiece:
    """The tokens ``[start, stop)`` of one example."""

    example: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Pieces that share one row, in the order they stand there."""

    pieces: tuple[PackedPiece, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def boundaries(self) -> IntArray:
        """Where pieces begin in the row, and its end: ``[P+1]``, what attention kernels call `cu_seqlens`."""
        return np.cumsum([0, *map(len, self.pieces)], dtype=np.int32)

    def positions(self) -> IntArray:
        """The position of each token ``[T]`` within its piece."""
        return np.concatenate([np.arange(len(piece), dtype=np.int32) for piece in self.pieces])

    def piece_ids(self) -> IntArray:
        """The number of the piece that each token ``[T]`` belongs to, from 0."""
        return np.repeat(np.arange(len(self.pieces), dtype=np.int32), list(map(len, self.pieces)))

    def gather(self, columns: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
        """The row of one per-token column: `columns[example]` is ``[length of the example]``; answers ``[T]``."""
        return np.concatenate([columns[piece.example][piece.start : piece.stop] for piece in self.pieces])

    def gather_targets(self, loss_masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """The row's loss mask ``[T]``, without the first token of every piece, which nothing predicts."""
        mask = self.gather(loss_masks)
        mask[self.boundaries()[:-1]] = False
        return mask


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

    @property
    def rows(self) -> tuple[PackedRow, ...]:
        """All rows as objects; of many examples, rather look at `pieces`."""
        found: list[list[PackedPiece]] = [[] for _ in range(self.num_rows)]
        for row, (example, start, stop) in zip(self.row_numbers.tolist(), self.pieces.tolist(), strict=True):
            found[row].append(PackedPiece(example=example, start=start, stop=stop))
        return tuple(PackedRow(pieces=tuple(pieces)) for pieces in found)

    def fill(self) -> float:
        """The share of the rows' room that holds tokens, 0 to 1; 1.0 where there is no row."""
        room = self.max_length * self.num_rows
        return int(_sizes(self.pieces).sum(dtype=np.int64)) / room if room else 1.0


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
