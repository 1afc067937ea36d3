"""The rows of a packing as objects, which tell what pieces share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trl_ray.data.examples.packing import Packing
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


def rows_of(packing: Packing) -> tuple[PackedRow, ...]:
    """All rows."""
    found: list[list[PackedPiece]] = [[] for _ in range(packing.num_rows)]
    for row, (example, start, stop) in zip(packing.row_numbers.tolist(), packing.pieces.tolist(), strict=True):
        found[row].append(PackedPiece(example=example, start=start, stop=stop))
    return tuple(PackedRow(pieces=tuple(pieces)) for pieces in found)


def fill(packing: Packing) -> float:
    """The share of the rows' room that holds tokens, 0 to 1; 1.0 where there is no row."""
    room = packing.max_length * packing.num_rows
    return int((packing.pieces[:, 2] - packing.pieces[:, 1]).sum()) / room if room else 1.0
