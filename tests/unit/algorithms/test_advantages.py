"""Advantages with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from trl_ray.algorithms.advantages import group_advantages
from trl_ray.config.sections import ScaleRewards


def test_group_scaling_divides_by_the_sample_deviation_of_the_group() -> None:
    # mean 2, deviations -1 and 1, sample variance (1 + 1) / 1 = 2
    result = group_advantages([[1.0, 3.0]], scale=ScaleRewards.GROUP)
    expected = 1.0 / (2.0**0.5 + 1e-4)
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)
    assert result.means[0] == 2.0 and result.stds[0] == pytest.approx(2.0**0.5)


def test_batch_scaling_keeps_the_mean_of_the_group() -> None:
    # rewards 0 2 4 4: mean 2.5, squares 6.25 .25 2.25 2.25 = 11, sample variance 11 / 3
    result = group_advantages([[0.0, 2.0], [4.0, 4.0]], scale=ScaleRewards.BATCH)
    expected = 1.0 / ((11 / 3) ** 0.5 + 1e-4)
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)
    np.testing.assert_array_equal(result.values[1], [0.0, 0.0])


def test_no_scaling_only_centres() -> None:
    result = group_advantages([[0.0, 1.0, 5.0]], scale=ScaleRewards.NONE)
    np.testing.assert_array_equal(result.values[0], [-2.0, -1.0, 3.0])


def test_a_missing_reward_counts_in_no_statistic_and_gets_no_advantage() -> None:
    result = group_advantages([[1.0, None, 3.0]], scale=ScaleRewards.GROUP)
    expected = 1.0 / (2.0**0.5 + 1e-4)
    np.testing.assert_allclose(result.values[0], [-expected, 0.0, expected], rtol=1e-12)


@pytest.mark.parametrize("scale", list(ScaleRewards))
@pytest.mark.parametrize("group", [[0.1, 0.1, 0.1], [None, None, None], [None, 0.3, None]])
def test_a_group_without_differences_has_advantages_of_exactly_0(
    scale: ScaleRewards, group: list[float | None]
) -> None:
    result = group_advantages([group, [0.0, 1.0]], scale=scale)
    assert np.all(result.values[0] == 0.0)
    assert list(result.flat) == [True, False]


def test_the_same_numbers_as_torch_computes_them_in_trl() -> None:
    import torch

    rewards = torch.tensor([[0.1, 0.7, 0.2, 0.9], [1.0, 0.0, 0.0, 0.5]], dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    result = group_advantages(rewards.tolist(), scale=ScaleRewards.GROUP)
    np.testing.assert_allclose(np.stack(result.values), expected.numpy(), rtol=1e-12)
