"""What is taken from a reward, with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.policy.advantages import clip_reward
from trl_ray.algorithms.policy.reward_shaping import overlong_penalty, sequence_kl, sequence_kls
from trl_ray.config.losses.policy_options import KLEstimator
from trl_ray.types import SampleScores, TrainingSample


def sample(mask: list[bool]) -> TrainingSample:
    count = len(mask)
    return TrainingSample(
        group_id=0,
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.zeros(count, np.int32),
        loss_mask=np.array(mask),
        sampler_logprobs=np.zeros(count, np.float32),
        advantage=0.0,
        min_version=0,
    )


def scores(policy: list[float], reference: list[float] | None) -> SampleScores:
    def array(values: list[float]) -> Any:
        return np.array(values, np.float32)

    return SampleScores(
        logprobs=array(policy),
        entropy=array([0.0] * len(policy)),
        reference_logprobs=None if reference is None else array(reference),
    )


def test_a_reward_is_held_between_its_bounds() -> None:
    assert [clip_reward(r, (-1.0, 2.0)) for r in (-3.0, 0.5, 7.0)] == [-1.0, 0.5, 2.0]
    assert clip_reward(7.0, None) == 7.0


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (6, 0.0), (7, -0.125), (8, -0.25), (10, -0.5), (12, -0.5)])
def test_the_penalty_for_length_grows_evenly_over_the_buffer(length: int, penalty: float) -> None:
    # Free up to 10 - 4 = 6 tokens, then an eighth for each.
    assert overlong_penalty(length, max_length=10, buffer=4, factor=0.5) == penalty


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # x = log reference - log policy: -1/2 and 1
    [
        (KLEstimator.K1, 0.5 - 1.0),
        (KLEstimator.K2, 0.125 + 0.5),
        (KLEstimator.K3, math.exp(-0.5) + 0.5 - 1 + math.exp(1.0) - 1.0 - 1),
    ],
)
def test_the_divergence_of_a_completion_is_the_sum_over_its_trained_tokens(
    estimator: KLEstimator, expected: float
) -> None:
    given = scores([-1.0, 0.0, -2.0], [-1.5, 0.0, -1.0])
    kl = sequence_kl(sample([True, False, True]), given, estimator)
    assert kl.total == pytest.approx(expected, rel=1e-6)
    assert kl.num_tokens == 2


def test_a_completion_that_is_not_trained_on_has_no_divergence() -> None:
    kl = sequence_kl(sample([False, False]), scores([-1.0, -1.0], [-9.0, -9.0]), KLEstimator.K1)
    assert (kl.total, kl.num_tokens) == (0.0, 0)


def test_a_divergence_needs_a_reference() -> None:
    with pytest.raises(AssertionError, match="reference"):
        sequence_kl(sample([True]), scores([-1.0], None), KLEstimator.K1)


def test_scores_in_another_order_than_the_samples_are_noticed() -> None:
    samples = [sample([True]), sample([True, True])]
    given = [scores([-1.0, -1.0], [-1.0, -1.0]), scores([-1.0], [-1.0])]
    with pytest.raises(AssertionError, match="order"):
        sequence_kls(samples, given, KLEstimator.K1)
