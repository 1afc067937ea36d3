"""Which examples a step trains on: every one once per epoch, in an order that only seed and epoch decide."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from trl_ray.data.examples.example_set import StreamedExample
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.errors import DataError
from trl_ray.pipelines.supervised.example_feed import Fed, ShuffledFeed, StreamFeed, StreamPlace, place_of, state_of
from trl_ray.types import Example, TrainingSample


def example(row: int) -> Example:
    sample = TrainingSample(
        group_id=row,
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.array([2], np.int32),
        loss_mask=np.ones(1, np.bool_),
    )
    return Example(row=row, samples=(sample,))


def rows(fed: Fed) -> list[int]:
    return [one.row for one in fed.examples]


def feed(count: int = 7, **options: object) -> ShuffledFeed:
    values = {"per_step": 3, "seed": 5, "shuffle": True, **options}
    return ShuffledFeed([example(row) for row in range(count)], **values)  # type: ignore[arg-type]


def test_every_example_comes_once_in_an_epoch_and_the_last_step_takes_what_is_left() -> None:
    made = feed()
    taken = [rows(made.take(step)) for step in (1, 2, 3)]
    assert made.steps_per_epoch == 3
    assert [len(one) for one in taken] == [3, 3, 1]
    assert sorted(itertools.chain(*taken)) == list(range(7))


def test_every_epoch_has_an_order_of_its_own() -> None:
    made = feed(count=30, per_step=30)
    first, second = rows(made.take(1)), rows(made.take(2))
    assert first != second and sorted(first) == sorted(second)


def test_a_step_depends_on_nothing_but_seed_and_number() -> None:
    assert rows(feed().take(5)) == rows(feed().take(5))
    assert rows(feed(count=30).take(2)) != rows(feed(count=30, seed=6).take(2))


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    made = feed(shuffle=False)
    assert [rows(made.take(step)) for step in (1, 3, 4)] == [[0, 1, 2], [6], [0, 1, 2]]


def test_the_epoch_counts_passes_over_the_data() -> None:
    made = feed(count=4, per_step=2)
    assert [made.take(step).epoch for step in (1, 2, 3)] == [0.5, 1.0, 1.5]


WINDOWS = ((0, 1, 2), (3, 4), (5,))
"""Rows of each window; one row of window 1 cannot be trained on."""
WITH_A_GAP = ((0, 1, 2), (), (3, 4, 5))
"""Window 1 has no row that can be trained on."""


def stream(epoch: int, start_window: int, windows: Any = WINDOWS) -> Iterator[StreamedExample]:
    untrained: dict[Untrained, int] = {}
    losses: Counter[str] = Counter()
    for window, numbers in list(enumerate(windows))[start_window:]:
        before = {"untrained_before": untrained, "losses_before": dict(losses)}
        if window == 1:
            untrained = {Untrained.NO_TARGET: 1}
        losses += Counter({"tokens": 10 * len(numbers), "tokens_cut": window})
        for place, row in enumerate(numbers):
            yield StreamedExample(
                example=example(100 * epoch + row),
                window=window,
                place=place,
                next_row=row + 1,
                untrained=untrained,
                losses=dict(losses),
                **before,
            )


def streamed(place: StreamPlace | None = None, windows: Any = WINDOWS) -> StreamFeed:
    return StreamFeed(partial(stream, windows=windows), per_step=4, place=place or StreamPlace())


def test_a_stream_begins_again_where_it_ends() -> None:
    made = streamed()
    assert [rows(made.take(step)) for step in (1, 2, 3)] == [[0, 1, 2, 3], [4, 5, 100, 101], [102, 103, 104, 105]]


@pytest.mark.parametrize("windows", [WINDOWS, WITH_A_GAP])
def test_a_stream_goes_on_from_the_place_that_a_checkpoint_kept(windows: Any) -> None:
    whole, first = streamed(windows=windows), streamed(windows=windows)
    expected = [whole.take(step) for step in range(1, 8)]
    for step in range(1, 7):
        resumed = streamed(place_of(state_of(first.take(step).place)), windows).take(step + 1)
        assert rows(resumed) == rows(expected[step])
        assert resumed.untrained == expected[step].untrained
        assert resumed.losses == expected[step].losses


def test_rows_that_are_left_out_are_counted_in_every_pass() -> None:
    made = streamed()
    counts = [dict(made.take(step).untrained or {}) for step in (1, 2, 3)]
    assert counts == [{"no_target": 1}, {"no_target": 1}, {"no_target": 2}]


def test_lost_tokens_are_added_up_over_windows_and_passes() -> None:
    made = streamed()
    losses = [made.take(step).losses for step in (1, 2, 3)]
    assert losses == [
        {"tokens": 50, "tokens_cut": 1},  # windows 0 and 1
        {"tokens": 90, "tokens_cut": 3},  # all of them, and the first once more
        {"tokens": 120, "tokens_cut": 6},
    ]


def test_a_place_of_a_checkpoint_that_knew_nothing_of_losses_is_taken() -> None:
    assert place_of({"epoch": 1, "window": 2, "taken": 3, "untrained": {}}).losses == {}


def test_a_stream_without_examples_is_refused() -> None:
    empty = StreamFeed(lambda epoch, window: iter(()), per_step=1, place=StreamPlace())
    with pytest.raises(DataError, match="at least one example"):
        empty.take(1)
