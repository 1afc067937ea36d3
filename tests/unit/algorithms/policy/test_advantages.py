"""Advantages with numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trl_ray.algorithms.policy.advantages import Advantages, group_advantages, group_deviations, objective_advantages
from trl_ray.config.losses.advantage_options import AdvantageBaseline, ScaleRewards

EPSILON = 1e-4
LEAVE_ONE_OUT, NO_BASELINE = AdvantageBaseline.LEAVE_ONE_OUT, AdvantageBaseline.NONE


def rloo(*groups: list[float | None], normalize: bool = False) -> Advantages:
    return group_advantages(groups, scale=ScaleRewards.NONE, baseline=LEAVE_ONE_OUT, normalize=normalize)


def reinforce(*groups: list[float | None], normalize: bool = False) -> Advantages:
    return group_advantages(groups, scale=ScaleRewards.NONE, baseline=NO_BASELINE, normalize=normalize)


def test_group_scaling_divides_by_the_sample_deviation_of_the_group() -> None:
    # mean 2, deviations -1 and 1, sample variance (1 + 1) / 1 = 2
    result = group_advantages([[1.0, 3.0]], scale=ScaleRewards.GROUP)
    expected = 1.0 / (2.0**0.5 + EPSILON)
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)


def test_batch_scaling_keeps_the_mean_of_the_group() -> None:
    # rewards 0 2 4 4: mean 2.5, squares 6.25 .25 2.25 2.25 = 11, sample variance 11 / 3
    result = group_advantages([[0.0, 2.0], [4.0, 4.0]], scale=ScaleRewards.BATCH)
    expected = 1.0 / ((11 / 3) ** 0.5 + EPSILON)
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)
    np.testing.assert_array_equal(result.values[1], [0.0, 0.0])


def test_no_scaling_only_centres() -> None:
    result = group_advantages([[0.0, 1.0, 5.0]], scale=ScaleRewards.NONE)
    np.testing.assert_array_equal(result.values[0], [-2.0, -1.0, 3.0])


def test_a_missing_reward_counts_in_no_statistic_and_gets_no_advantage() -> None:
    result = group_advantages([[1.0, None, 3.0]], scale=ScaleRewards.GROUP)
    expected = 1.0 / (2.0**0.5 + EPSILON)
    np.testing.assert_allclose(result.values[0], [-expected, 0.0, expected], rtol=1e-12)


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    # others: (3 + 8) / 2, (1 + 8) / 2, (1 + 3) / 2
    np.testing.assert_array_equal(rloo([1.0, 3.0, 8.0]).values[0], [-4.5, -1.5, 6.0])


def test_leave_one_out_counts_only_the_others_that_have_a_score() -> None:
    np.testing.assert_array_equal(rloo([1.0, None, 4.0]).values[0], [-3.0, 0.0, 3.0])


def test_who_has_no_sibling_with_a_score_has_no_baseline_and_no_advantage() -> None:
    np.testing.assert_array_equal(rloo([None, 4.0, None]).values[0], [0.0, 0.0, 0.0])


def test_leave_one_out_may_be_scaled() -> None:
    result = group_advantages([[1.0, 3.0]], scale=ScaleRewards.GROUP, baseline=LEAVE_ONE_OUT)
    expected = 2.0 / (2.0**0.5 + EPSILON)
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)


def test_without_a_baseline_the_reward_is_the_advantage() -> None:
    np.testing.assert_array_equal(reinforce([1.0, None, 3.0]).values[0], [1.0, 0.0, 3.0])


def test_reinforce_plus_plus_compares_with_the_step() -> None:
    # 0 2 4 4: mean 2.5, sample variance 11 / 3
    result = reinforce([0.0, 2.0], [4.0, 4.0], normalize=True)
    divisor = (11 / 3) ** 0.5 + EPSILON
    np.testing.assert_allclose(np.concatenate(result.values), np.array([-2.5, -0.5, 1.5, 1.5]) / divisor, rtol=1e-12)


def test_reinforce_plus_plus_baseline_compares_with_the_group_and_divides_by_the_deviation_of_the_step() -> None:
    # centred -1 1 0 0: sample variance 2 / 3
    result = group_advantages([[0.0, 2.0], [4.0, 4.0]], scale=ScaleRewards.NONE, normalize=True)
    expected = 1.0 / ((2 / 3) ** 0.5 + EPSILON)
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)
    np.testing.assert_array_equal(result.values[1], [0.0, 0.0])


def test_normalising_leaves_out_who_has_no_advantage() -> None:
    # -3 3 and nobody else: sample variance 18
    result = rloo([1.0, None, 4.0], [None, None, 7.0], normalize=True)
    expected = 3.0 / (18.0**0.5 + EPSILON)
    np.testing.assert_allclose(np.concatenate(result.values), [-expected, 0.0, expected, 0, 0, 0], rtol=1e-12)


@pytest.mark.parametrize("baseline", [AdvantageBaseline.GROUP_MEAN, LEAVE_ONE_OUT])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", list(ScaleRewards))
@pytest.mark.parametrize("group", [[0.1, 0.1, 0.1], [None, None, None], [None, 0.3, None]])
def test_a_group_without_differences_has_advantages_of_exactly_0(
    scale: ScaleRewards, group: list[float | None], baseline: AdvantageBaseline, normalize: bool
) -> None:
    others: list[list[float | None]] = [[0.0, 1.0, 0.7], [0.2, 0.3, None]]
    result = group_advantages([group, *others], scale=scale, baseline=baseline, normalize=normalize)
    assert np.all(result.values[0] == 0.0)
    assert list(result.flat) == [True, False, False]


def test_a_step_without_differences_has_normalised_advantages_of_exactly_0() -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    result = reinforce([0.1, 0.1], [0.1, None], normalize=True)
    assert np.all(np.concatenate(result.values) == 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_reward_that_is_no_number_is_told_and_touches_no_other(bad: float, normalize: bool) -> None:
    result = rloo([1.0, bad, 4.0], normalize=normalize)
    expected = 3.0 / (18.0**0.5 + EPSILON) if normalize else 3.0
    np.testing.assert_allclose(result.values[0], [-expected, math.nan, expected], rtol=1e-12)


def test_several_objectives_are_normalised_before_they_are_weighted_and_summed() -> None:
    # f: 0 1, deviation sqrt(1/2).  g: 10 0, deviation sqrt(50), ten times as large and yet worth no more.
    f, g = 0.5 / (0.5**0.5 + EPSILON), 5.0 / (50.0**0.5 + EPSILON)
    total = f - 0.5 * g
    expected = total / (total * 2**0.5 + EPSILON)
    result = objective_advantages([[[0.0, 10.0], [1.0, 0.0]]], weights=[1.0, 0.5])
    np.testing.assert_allclose(result.values[0], [-expected, expected], rtol=1e-12)
    assert list(result.flat) == [False]


def test_several_objectives_are_normalised_over_the_step_after_the_sum() -> None:
    # The second group's totals are twice the first's, as both of its functions agree.
    z = 1.0 / (2.0**0.5 + EPSILON)
    totals = np.array([-z, z, -2 * z, 2 * z])
    result = objective_advantages([[[0.0, 5.0], [2.0, 5.0]], [[0.0, 3.0], [2.0, 5.0]]])
    divisor = (10 * z**2 / 3) ** 0.5 + EPSILON
    np.testing.assert_allclose(np.concatenate(result.values), totals / divisor, rtol=1e-12)


def test_an_objective_without_a_score_adds_nothing() -> None:
    # f: 1 3.  g answers once: it has no deviation.  The third completion has no score at all.
    result = objective_advantages([[[1.0, None], [3.0, 5.0], [None, None]]])
    z = 1.0 / (2.0**0.5 + EPSILON)
    expected = z / (z * 2**0.5 + EPSILON)
    np.testing.assert_allclose(result.values[0], [-expected, expected, 0.0], rtol=1e-12)


def test_objectives_that_tell_nothing_have_advantages_of_exactly_0() -> None:
    flat = [[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]]
    result = objective_advantages([flat, [[0.3, 1.0], [0.2, 0.0], [0.9, 0.3]], [[None, None]] * 3])
    assert np.all(result.values[0] == 0.0) and np.all(result.values[2] == 0.0)
    assert list(result.flat) == [True, False, True]


def test_objectives_have_something_to_tell_where_their_weighted_sum_is_flat() -> None:
    # 2 f + g is 2 for all three. Normalised, both have the same size, so that f's weight of 2 decides.
    group = [[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    result = objective_advantages([group], weights=[2.0, 1.0])
    assert list(result.flat) == [False]
    assert result.values[0][0] > 0.5 > 0 > result.values[0][1] == result.values[0][2]


def test_an_objective_that_is_no_number_is_told_and_touches_no_other() -> None:
    clean = objective_advantages([[[0.0, 1.0], [1.0, 4.0], [3.0, 2.0], [None, None]]]).values[0]
    spoilt = objective_advantages([[[0.0, 1.0], [1.0, 4.0], [3.0, 2.0], [math.nan, None]]]).values[0]
    np.testing.assert_array_equal(spoilt[:3], clean[:3])
    assert math.isnan(spoilt[3])


def test_objectives_need_a_weight_each() -> None:
    with pytest.raises(AssertionError, match="2 for 1"):
        objective_advantages([[[0.0], [1.0]]], weights=[1.0, 2.0])


def test_the_deviation_of_a_group_counts_who_has_a_score() -> None:
    np.testing.assert_allclose(group_deviations([[1.0, None, 3.0], [2.0, None], [None]]), [2.0**0.5, 0.0, 0.0])


def test_no_groups_have_no_advantages() -> None:
    assert group_advantages([], scale=ScaleRewards.BATCH, normalize=True).values == ()
    assert objective_advantages([]).values == ()
