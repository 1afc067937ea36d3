"""Sums and positions over completions whose tokens stand in one row."""

from __future__ import annotations

import torch

from trl_ray.algorithms.batches.sequences import TokenSequences, means_of

TOKENS = TokenSequences(sample_index=torch.tensor([0, 0, 0, 2, 2]), num_sequences=4)
VALUES = torch.tensor([1.0, 2.0, 6.0, 8.0, 10.0])


def test_completions_without_tokens_have_count_sum_and_mean_0() -> None:
    assert TOKENS.counts().tolist() == [3, 0, 2, 0]
    assert TOKENS.sums(VALUES).tolist() == [9.0, 0.0, 18.0, 0.0]
    assert TOKENS.means(VALUES).tolist() == [3.0, 0.0, 9.0, 0.0]


def test_positions_count_within_each_completion() -> None:
    assert TOKENS.positions().tolist() == [0, 1, 2, 0, 1]


def test_means_weigh_as_many_as_there_are_entries() -> None:
    found = means_of({"numbers": VALUES, "truths": VALUES > 5, "nothing": VALUES[:0]})
    assert {name: (metric.value, metric.weight) for name, metric in found.items()} == {
        "numbers": (5.4, 5),
        "truths": (0.6, 5),
        "nothing": (0.0, 0),
    }
