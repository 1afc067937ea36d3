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
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """All rows of a data set, and what they leave over."""

    rows: tuple[PackedRow, ...]
    max_length: int
    cut_tokens: int
    """Tokens of examples beyond `max_length` that are in no row; only `bfd` cuts."""

    def fill(self) -> float:
        """The share of the rows' room that holds tokens, 0 to 1; 1.0 where there is no row."""
        room = self.max_length * len(self.rows)
        return sum(map(len, self.rows)) / room if room else 1.0


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
    sizes = [int(length) for length in lengths]
    if strategy == PackingStrategy.WRAPPED:
        return Packing(rows=tuple(_wrapped(sizes, max_length)), max_length=max_length, cut_tokens=0)
    split = strategy == PackingStrategy.BFD_SPLIT
    pieces = [piece for example, size in enumerate(sizes) for piece in _pieces(example, size, max_length, split=split)]
    rows = _best_fit_decreasing(pieces, max_length)
    return Packing(rows=tuple(rows), max_length=max_length, cut_tokens=sum(sizes) - sum(map(len, pieces)))


def _pieces(example: int, size: int, max_length: int, *, split: bool) -> Iterator[PackedPiece]:
    for start in range(0, size if split else min(size, 1), max_length):
        yield PackedPiece(example=example, start=start, stop=min(start + max_length, size))


def _best_fit_decreasing(pieces: Sequence[PackedPiece], max_length: int) -> Iterator[PackedRow]:
    rows: list[list[PackedPiece]] = []
    waiting: dict[int, deque[int]] = defaultdict(deque)  # rows by the room they have left, oldest first
    rooms: list[int] = []  # the keys of `waiting` in ascending order: fewer than max_length, however many rows
    for piece in sorted(pieces, key=len, reverse=True):
        place = bisect_left(rooms, len(piece))
        if place == len(rooms):
            room, number = max_length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            number = waiting[room].popleft()
            if not waiting[room]:
                del waiting[room], rooms[place]
        rows[number].append(piece)
        left = room - len(piece)
        if left:
            if left not in waiting:
                insort(rooms, left)
            waiting[left].append(number)
    return (PackedRow(pieces=tuple(row)) for row in rows)


def _wrapped(sizes: Sequence[int], max_length: int) -> Iterator[PackedRow]:
    row: list[PackedPiece] = []
    room = max_length
    for example, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            row.append(PackedPiece(example=example, start=start, stop=stop))
            room -= stop - start
            start = stop
            if not room:
                yield PackedRow(pieces=tuple(row))
                row, room = [], max_length
    if row:
        yield PackedRow(pieces=tuple(row))
