"""Derived numbers of the GRPO configurations, and the contradictions they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.load import build
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.config.sections import TrainingConfig
from trl_ray.errors import ConfigError

# Each contradiction, the option its message must start with, and the change that resolves it.
CONTRADICTIONS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"per_device_train_batch_size": 6}, "per_device_train_batch_size", {"num_generations": 3}),
    ({"reward_funcs": ["a", "b"], "reward_weights": [1.0]}, "reward_weights", {"reward_weights": [1.0, 0.5]}),
    ({"runtime": {"kind": "local"}, "rollout": {"num_workers": 2}}, "rollout.num_workers", {"rollout": {}}),
    ({"reward": {"isolation": "inline"}}, "reward.isolation", {"runtime": {"kind": "local"}}),
    ({"reward": {"timeout_s": 301.0}}, "rollout.lease_s", {"rollout": {"lease_s": 301.0}}),
    ({"max_staleness": 0, "max_look_ahead": 2}, "max_look_ahead", {"max_staleness": 1}),
]


@pytest.mark.parametrize(("values", "option", "remedy"), CONTRADICTIONS)
def test_a_contradiction_is_refused_by_name_and_its_remedy_is_accepted(
    values: dict[str, Any], option: str, remedy: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(AsyncGRPOConfig, values)
    message = str(caught.value)
    assert message.startswith(option)
    assert ", got " in message
    assert "\n" not in message
    build(AsyncGRPOConfig, {**values, **remedy})


def test_weights_without_named_functions_are_left_to_whoever_knows_the_functions() -> None:
    assert build(GRPOConfig, {"reward_weights": [1.0, 2.0]}).reward_weights == [1.0, 2.0]


def test_a_step_counts_completions_over_its_micro_batches_and_groups_over_its_completions() -> None:
    config = build(
        GRPOConfig, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4, "num_generations": 8}
    )
    assert (config.completions_per_step, config.groups_per_step) == (24, 3)


def test_the_synchronous_pipeline_has_no_staleness_and_a_strict_order() -> None:
    config = build(GRPOConfig, {"per_device_train_batch_size": 32})
    assert (config.max_age_at_use, config.slot_bounds.max_look_ahead) == (0, 1)
    assert config.slots == config.groups_per_step == 4


@pytest.mark.parametrize(
    ("staleness", "look_ahead", "slots", "bound"),
    # P = 4 groups a step: B = (S + 1) * 4, worst age = (B + W - 2) // 4
    [(0, 1, 4, 0), (1, 1, 8, 1), (2, 1, 12, 2), (2, 2, 12, 3), (2, 5, 12, 3), (2, 6, 12, 4)],
)
def test_the_worst_age_follows_from_slots_and_look_ahead(
    staleness: int, look_ahead: int, slots: int, bound: int
) -> None:
    config = build(
        AsyncGRPOConfig,
        {"max_staleness": staleness, "max_look_ahead": look_ahead, "per_device_train_batch_size": 32},
    )
    assert config.groups_per_step == 4
    assert (config.slots, config.max_age_at_use, config.slot_bounds.max_look_ahead) == (slots, bound, look_ahead)


def test_an_owner_gets_its_own_options_only() -> None:
    config = build(AsyncGRPOConfig, {"epsilon": 0.1, "learning_rate": 3e-5})
    assert config.part(LossConfig).epsilon == 0.1
    assert config.part(TrainingConfig).learning_rate == 3e-5
    assert not hasattr(config.part(LossConfig), "learning_rate")
