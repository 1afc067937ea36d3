"""Reward models: pairs with margin and centring, rated steps, and one reward out of those of steps."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.loss import LossOutput
from trl_ray.algorithms.metric_merging import merge_metrics
from trl_ray.algorithms.preference.reward_losses import (
    bradley_terry_loss,
    step_loss,
    step_rewards,
    trajectory_rewards,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepAggregation

LN9 = math.log(9)


def loss(
    chosen: list[float], rejected: list[float], margin: list[float] | None = None, coefficient: float | None = None
) -> LossOutput:
    return bradley_terry_loss(
        torch.tensor(chosen),
        torch.tensor(rejected),
        RewardLossConfig(center_rewards_coefficient=coefficient),
        margin=None if margin is None else torch.tensor(margin),
        num_pairs=2,
    )


def test_a_pair_loses_by_the_logistic_of_its_difference_less_its_margin() -> None:
    assert loss([LN9], [0.0]).loss.item() == pytest.approx(-math.log(0.9) / 2)
    assert loss([LN9 + 1.5], [0.0], [1.5]).loss.item() == pytest.approx(-math.log(0.9) / 2)


def test_centring_adds_the_squared_sum_of_the_pair() -> None:
    # A sum of 5, squared, times 0.1, over the two pairs of the update.
    added = loss([3.0], [2.0], coefficient=0.1).loss - loss([3.0], [2.0]).loss
    assert added.item() == pytest.approx(0.1 * 25 / 2)


def test_a_pair_of_equal_rewards_is_not_won() -> None:
    metrics = loss([3.0, 1.0], [2.0, 1.0]).metrics
    assert metrics["accuracy"].value == 0.5
    assert metrics["margin"].value == 0.5
    assert metrics["mean_reward"].value == pytest.approx(7 / 4)


def test_smallest_and_largest_rewards_are_those_of_all_micro_batches() -> None:
    merged = merge_metrics([loss([3.0], [-2.0]).metrics, loss([1.0], [5.0]).metrics, loss([], []).metrics])
    assert (merged["min_reward"].value, merged["max_reward"].value) == (-2.0, 5.0)
    assert merged["accuracy"].value == 0.5


def test_steps_lose_by_cross_entropy_over_the_steps_of_the_update() -> None:
    logits = torch.tensor([[0.0, LN9], [0.0, LN9]])
    output = step_loss(logits, torch.tensor([True, False]), num_steps=4)
    assert output.loss.item() == pytest.approx(-(math.log(0.9) + math.log(0.1)) / 4)
    assert output.metrics["accuracy"].value == 0.5
    assert step_rewards(logits).tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize(
    ("how", "first"),
    [
        (StepAggregation.MIN, 0.25),
        (StepAggregation.PRODUCT, 0.1),
        (StepAggregation.MEAN, 1.55 / 3),
        (StepAggregation.LAST, 0.8),
    ],
)
def test_each_rule_makes_one_reward_of_the_steps_of_a_trajectory(how: StepAggregation, first: float) -> None:
    rewards = torch.tensor([0.5, 0.25, 0.8, 0.9])
    steps = TokenSequences(sample_index=torch.tensor([0, 0, 0, 2]), num_sequences=4)
    found = trajectory_rewards(rewards, steps, how).tolist()
    assert found[0] == pytest.approx(first)
    assert found[2] == pytest.approx(0.9)
    # no steps, no reward: neither the best nor the worst
    assert math.isnan(found[1]) and math.isnan(found[3])


@pytest.mark.parametrize("how", list(StepAggregation))
def test_rewards_of_another_scale_are_not_held_at_1(how: StepAggregation) -> None:
    step = TokenSequences(sample_index=torch.tensor([0]), num_sequences=1)
    assert trajectory_rewards(torch.tensor([2.5]), step, how).tolist() == [2.5]


@pytest.mark.parametrize("how", list(StepAggregation))
def test_no_steps_at_all_are_no_rewards(how: StepAggregation) -> None:
    steps = TokenSequences(sample_index=torch.zeros(0, dtype=torch.int64), num_sequences=2)
    assert trajectory_rewards(torch.zeros(0), steps, how).isnan().all()
