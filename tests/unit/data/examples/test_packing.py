"""Packing loses no token, doubles none, fills no row beyond its length, and keeps examples apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packed_rows import PackedPiece, PackedRow, fill, rows_of
from trl_ray.config.example_options import PackingStrategy
from trl_ray.data.examples.packing import Packing, pack
from trl_ray.errors import ConfigError

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
MAX_LENGTH = st.integers(2, 24)


def layout(packing: Packing) -> list[list[tuple[int, int, int]]]:
    return [[(piece.example, piece.start, piece.stop) for piece in row.pieces] for row in rows_of(packing)]


def tokens(packing: Packing) -> Counter[tuple[int, int]]:
    return Counter(
        (piece.example, place)
        for row in rows_of(packing)
        for piece in row.pieces
        for place in range(piece.start, piece.stop)
    )


def test_best_fit_decreasing_cuts_what_is_too_long_and_fills_the_tightest_row() -> None:
    packing = pack([5, 2, 3, 1], max_length=4, strategy="bfd")
    assert layout(packing) == [[(0, 0, 4)], [(2, 0, 3), (3, 0, 1)], [(1, 0, 2)]]
    assert packing.cut_tokens == 1


def test_split_keeps_the_rest_of_a_long_example_as_a_piece_of_its_own() -> None:
    packing = pack([5, 2, 3, 1], max_length=4, strategy="bfd_split")
    assert layout(packing) == [[(0, 0, 4)], [(2, 0, 3), (0, 4, 5)], [(1, 0, 2), (3, 0, 1)]]
    assert packing.cut_tokens == 0


def test_wrapped_keeps_the_order_and_cuts_where_a_row_is_full() -> None:
    packing = pack([5, 2, 3, 1], max_length=4, strategy="wrapped")
    assert layout(packing) == [[(0, 0, 4)], [(0, 4, 5), (1, 0, 2), (2, 0, 1)], [(2, 1, 3), (3, 0, 1)]]
    assert fill(packing) == 11 / 12


def test_a_row_tells_its_boundaries_positions_and_pieces() -> None:
    row = PackedRow(pieces=(PackedPiece(example=1, start=0, stop=3), PackedPiece(example=0, start=2, stop=4)))
    assert row.boundaries().tolist() == [0, 3, 5]
    assert row.positions().tolist() == [0, 1, 2, 0, 1]
    assert row.piece_ids().tolist() == [0, 0, 0, 1, 1]
    assert row.gather([np.array([10, 11, 12, 13]), np.array([20, 21, 22])]).tolist() == [20, 21, 22, 12, 13]


def test_the_first_token_of_a_piece_is_never_a_target_and_the_given_masks_stay_as_they_are() -> None:
    row = PackedRow(pieces=(PackedPiece(example=1, start=0, stop=3), PackedPiece(example=0, start=2, stop=4)))
    masks = [np.ones(4, dtype=np.bool_), np.array([True, False, True])]
    assert row.gather_targets(masks).tolist() == [False, False, True, False, True]
    assert masks[0].all()


@given(LENGTHS, MAX_LENGTH, st.sampled_from(PackingStrategy))
def test_no_row_is_empty_or_longer_than_allowed(lengths: list[int], max_length: int, strategy: PackingStrategy) -> None:
    assert all(0 < len(row) <= max_length for row in rows_of(pack(lengths, max_length=max_length, strategy=strategy)))


@given(LENGTHS, MAX_LENGTH, st.sampled_from([PackingStrategy.BFD_SPLIT, PackingStrategy.WRAPPED]))
def test_splitting_strategies_place_every_token_exactly_once(
    lengths: list[int], max_length: int, strategy: PackingStrategy
) -> None:
    packing = pack(lengths, max_length=max_length, strategy=strategy)
    assert tokens(packing) == Counter((example, place) for example, size in enumerate(lengths) for place in range(size))
    assert packing.cut_tokens == 0


@given(LENGTHS, MAX_LENGTH)
def test_best_fit_places_the_head_of_every_example_exactly_once_and_counts_what_it_cuts(
    lengths: list[int], max_length: int
) -> None:
    packing = pack(lengths, max_length=max_length, strategy="bfd")
    heads = [min(size, max_length) for size in lengths]
    assert tokens(packing) == Counter((example, place) for example, size in enumerate(heads) for place in range(size))
    assert packing.cut_tokens == sum(lengths) - sum(heads)
    assert all(piece.start == 0 for row in rows_of(packing) for piece in row.pieces)


@given(LENGTHS, MAX_LENGTH)
def test_best_fit_opens_a_row_only_when_no_other_has_room(lengths: list[int], max_length: int) -> None:
    """Of any two rows, the later one's first piece did not fit into the earlier one as it then was."""
    rows = rows_of(pack(lengths, max_length=max_length, strategy="bfd"))
    for later in range(len(rows)):
        opening = len(rows[later].pieces[0])
        for earlier in rows[:later]:
            # Pieces come in descending order, so what is longer or equal had been placed before.
            before = sum(len(piece) for piece in earlier.pieces if len(piece) > opening)
            same = sum(len(piece) for piece in earlier.pieces if len(piece) == opening)
            assert before + same + opening > max_length


@given(LENGTHS, MAX_LENGTH)
def test_wrapped_leaves_room_in_the_last_row_only(lengths: list[int], max_length: int) -> None:
    packing = pack(lengths, max_length=max_length, strategy="wrapped")
    assert all(len(row) == max_length for row in rows_of(packing)[:-1])


@given(LENGTHS, MAX_LENGTH, st.sampled_from(PackingStrategy))
def test_positions_restart_at_every_boundary(lengths: list[int], max_length: int, strategy: PackingStrategy) -> None:
    for row in rows_of(pack(lengths, max_length=max_length, strategy=strategy)):
        starts = np.flatnonzero(row.positions() == 0)
        assert starts.tolist() == row.boundaries()[:-1].tolist()
        assert len(row.piece_ids()) == len(row)


def test_nothing_to_pack_makes_no_row() -> None:
    assert rows_of(pack([], max_length=4, strategy="bfd")) == ()
    assert rows_of(pack([0, 0], max_length=4, strategy="wrapped")) == ()
    assert fill(pack([0], max_length=4, strategy="bfd")) == 1.0


def test_wrong_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"max_length must be at least 2 for packing, got 1"):
        pack([1], max_length=1, strategy="bfd")
    with pytest.raises(ConfigError, match=r"packing_strategy must be one of bfd, bfd_split, wrapped, got 'ffd'"):
        pack([1], max_length=4, strategy="ffd")
