"""How the weight of the entropy bonus follows the entropy."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.types import Metric, Reduce


def _loss(**options: Any) -> PolicyLoss:
    options = {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 1.0} | options
    return PolicyLoss(config=LossConfig(**options), max_completion_length=10)


def _after(loss: PolicyLoss, *entropies: float) -> list[float]:
    """Coefficients told after updates that met these entropies."""
    return [loss.after_update({"entropy": Metric(value=entropy)})["entropy_coef"].value for entropy in entropies]


def test_the_coefficient_rises_at_or_below_the_target_and_falls_above() -> None:
    assert _after(_loss(), 0.9, 1.0, 1.1) == pytest.approx([0.025, 0.03, 0.025])


def test_the_coefficient_stays_within_its_bounds() -> None:
    loss = _loss(entropy_coef_min=0.017, entropy_coef_max=0.023, entropy_coef_delta=0.002)
    assert _after(loss, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0) == pytest.approx([0.022, 0.023, 0.021, 0.019, 0.017, 0.017])


def test_where_a_mask_keeps_some_tokens_their_entropy_counts() -> None:
    loss = _loss()
    found = loss.after_update({"entropy": Metric(value=0.5), "entropy/kept": Metric(value=1.5)})
    assert found["entropy_coef"] == Metric(value=pytest.approx(0.015), reduce=Reduce.LAST)


def test_an_update_without_tokens_adapts_nothing() -> None:
    loss = _loss()
    assert loss.after_update({}) == {}
    assert loss.state_dict()["entropy_coef"] == 0.02


def test_a_loaded_state_goes_on_where_the_saved_one_stopped() -> None:
    first = _loss()
    _after(first, 0.5, 0.5, 2.0)
    second = _loss()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert _after(second, 0.5) == _after(first, 0.5)


def test_a_fixed_coefficient_is_told_and_kept() -> None:
    loss = _loss(use_adaptive_entropy=False)
    assert _after(loss, 0.1, 9.0) == [0.02, 0.02]
    assert loss.state_dict() == {}
    loss.load_state_dict({})


def test_without_a_bonus_nothing_is_told() -> None:
    loss = _loss(use_adaptive_entropy=False, entropy_coef=0.0)
    assert loss.after_update({"entropy": Metric(value=0.1)}) == {}


def test_the_state_of_a_run_without_adaptation_is_refused() -> None:
    with pytest.raises(KeyError):
        _loss().load_state_dict({})
