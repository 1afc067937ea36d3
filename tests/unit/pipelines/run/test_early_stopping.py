"""Early stopping: what counts as better, how long it waits, what a checkpoint keeps."""

from __future__ import annotations

import math

import pytest

from trl_ray.config.runs.dataset_config import RewardModelConfig, SFTConfig
from trl_ray.errors import ConfigError
from trl_ray.pipelines.run.early_stopping import EarlyStopping


def stopping(**options: object) -> EarlyStopping:
    return EarlyStopping.of(SFTConfig(**{"eval_steps": 1, "early_stopping_patience": 2, **options}))


def observe(rule: EarlyStopping, *values: float, metric: str = "loss") -> EarlyStopping:
    for step, value in enumerate(values, start=1):
        rule.observe(step, {metric: value})
    return rule


def test_it_stops_after_so_many_evaluations_without_a_lower_loss() -> None:
    rule = observe(stopping(), 3.0, 2.0, 2.5)
    assert not rule.is_due
    rule.observe(4, {"loss": 2.0})
    assert rule.is_due and (rule.best, rule.best_step) == (2.0, 2)


def test_an_improvement_starts_the_count_anew() -> None:
    assert not observe(stopping(), 3.0, 3.5, 2.0, 2.5).is_due


def test_a_gain_must_exceed_the_threshold() -> None:
    assert observe(stopping(early_stopping_threshold=0.5), 3.0, 2.6, 2.5).is_due
    assert not observe(stopping(early_stopping_threshold=0.5), 3.0, 2.6, 2.4).is_due


def test_an_accuracy_is_better_when_it_is_greater() -> None:
    rule = EarlyStopping.of(RewardModelConfig(eval_steps=1, early_stopping_patience=1))
    assert observe(rule, 0.5, 0.6, metric="accuracy").best == 0.6
    assert observe(rule, 0.4, metric="accuracy").is_due


def test_nan_is_never_better() -> None:
    rule = observe(stopping(), math.nan, math.nan)
    assert rule.is_due and rule.best is None


def test_without_patience_it_never_stops_but_knows_the_best() -> None:
    rule = observe(stopping(early_stopping_patience=None), 1.0, 2.0, 3.0, 4.0)
    assert not rule.is_due and rule.best == 1.0


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    rule = stopping(metric_for_best_model="eval_lss")
    with pytest.raises(ConfigError, match="Did you mean 'loss'"):
        rule.observe(1, {"loss": 1.0, "entropy": 2.0})


def test_it_goes_on_from_a_checkpoint() -> None:
    first = observe(stopping(), 1.0, 2.0)
    second = stopping()
    second.load_state_dict(first.state_dict())
    second.observe(3, {"loss": 2.0})
    assert second.is_due and second.best == 1.0
