"""How rewards become advantages, as a user writes it, and every contradiction in it that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.base import Section
from trl_ray.config.load import apply_overrides, build, dump_yaml, parse_yaml
from trl_ray.config.losses.advantage_options import AdvantageBaseline, AdvantageConfig, ScaleRewards
from trl_ray.config.losses.policy_options import ImportanceLevel, KLEstimator, KLPlacement, LossType
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.errors import ConfigError

SUM_LAST = {"multi_objective_aggregation": "normalize_then_sum"}
NO_BASELINE = {"advantage_baseline": "none", "scale_rewards": "none"}
DROP = {"zero_variance_groups": "drop"}
KEEP = {"zero_variance_groups": "keep"}
KL_REWARD = {"kl_placement": "reward", "beta": 0.1}
# Each contradiction, the option its message must start with, and the change that resolves it.
CONTRADICTIONS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"reward_clip_range": [1.0, -1.0]}, "reward_clip_range", {"reward_clip_range": [-1.0, 1.0]}),
    ({"reward_clip_range": [1.0, 1.0]}, "reward_clip_range", {"reward_clip_range": None}),
    ({"advantage_baseline": "none"}, "scale_rewards", {"scale_rewards": "none"}),
    ({"advantage_baseline": "none", "scale_rewards": "batch"}, "scale_rewards", {"advantage_baseline": "group_mean"}),
    ({**SUM_LAST, "advantage_baseline": "leave_one_out"}, "advantage_baseline", {"advantage_baseline": "group_mean"}),
    ({**SUM_LAST, "scale_rewards": "batch"}, "scale_rewards", {"scale_rewards": "group"}),
    ({**SUM_LAST, "scale_rewards": "none"}, "scale_rewards", {"scale_rewards": "group"}),
    ({**SUM_LAST, "normalize_advantages": True}, "normalize_advantages", {"normalize_advantages": False}),
    ({**SUM_LAST, "reward_clip_range": [0.0, 1.0]}, "reward_clip_range", {"reward_clip_range": None}),
    ({**SUM_LAST, "overlong_buffer_len": 8}, "overlong_buffer_len", {"overlong_buffer_len": 0}),
    ({**SUM_LAST, **KL_REWARD}, "kl_placement", {"kl_placement": "loss"}),
    ({**SUM_LAST, **DROP}, "zero_variance_groups", KEEP),
    ({**NO_BASELINE, **DROP}, "zero_variance_groups", KEEP),
    ({"overlong_buffer_len": 8, **DROP}, "zero_variance_groups", {"overlong_penalty_factor": 0.0}),
    ({**KL_REWARD, **DROP}, "zero_variance_groups", {"beta": 0.0}),
    (
        {"overlong_buffer_len": 64, "max_completion_length": 64},
        "overlong_buffer_len",
        {"max_completion_length": 65},
    ),
]


@pytest.mark.parametrize("kind", [GRPOConfig, AsyncGRPOConfig])
@pytest.mark.parametrize(("values", "option", "remedy"), CONTRADICTIONS)
def test_a_contradiction_is_refused_by_name_and_its_remedy_is_accepted(
    values: dict[str, Any], option: str, remedy: dict[str, Any], kind: type[Section]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(kind, values)
    message = str(caught.value)
    assert message.startswith(f"{option} must ")
    assert ", got " in message
    assert "\n" not in message
    build(kind, {**values, **remedy})


@pytest.mark.parametrize("values", [SUM_LAST, DROP])
def test_rloo_refuses_what_its_baseline_or_the_kl_in_its_reward_contradicts(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(RLOOConfig, values)
    build(RLOOConfig, {**values, "beta": 0.0, "advantage_baseline": "group_mean", "scale_rewards": "group"})


@pytest.mark.parametrize("kind", [GRPOConfig, AsyncGRPOConfig, RLOOConfig])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scale_rewards": "batch", "reward_clip_range": [-1, 2.5]},
        {"advantage_baseline": "leave_one_out", "scale_rewards": "none", "normalize_advantages": True},
        {**NO_BASELINE, "normalize_advantages": True},
        {**SUM_LAST, "advantage_baseline": "group_mean", "scale_rewards": "group", "beta": 0.0},
        {"overlong_buffer_len": 16, "overlong_penalty_factor": 0.5, "mask_truncated_completions": True},
    ],
)
def test_every_combination_that_is_accepted_loads_again_to_the_same(
    kind: type[Section], values: dict[str, Any]
) -> None:
    config = build(kind, values)
    assert build(kind, parse_yaml(dump_yaml(config), source="resolved")) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", ScaleRewards.GROUP),
        ("false", ScaleRewards.NONE),
        ("none", ScaleRewards.NONE),
        ("batch", ScaleRewards.BATCH),
    ],
)
def test_the_scale_may_be_written_as_in_trl(text: str, expected: ScaleRewards) -> None:
    assert build(AdvantageConfig, apply_overrides({}, [f"scale_rewards={text}"])).scale_rewards is expected


@pytest.mark.parametrize("text", ["1", "null", "yess"])
def test_the_scale_is_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError, match="scale_rewards must be 'group', 'batch' or 'none'"):
        build(AdvantageConfig, apply_overrides({}, [f"scale_rewards={text}"]))


def test_the_clip_range_is_two_numbers() -> None:
    assert build(AdvantageConfig, apply_overrides({}, ["reward_clip_range=[-1, 2.5]"])).reward_clip_range == (-1.0, 2.5)
    assert AdvantageConfig(reward_clip_range=(-1.0, 2.5)).reward_clip_range == (-1.0, 2.5)
    for text in ("3", "[1]", "[1, 2, 3]", "['1', 2]", "[0, .inf]", "{a: 1, b: 2}"):
        with pytest.raises(ConfigError, match="reward_clip_range"):
            build(AdvantageConfig, apply_overrides({}, [f"reward_clip_range={text}"]))


@pytest.mark.parametrize("kind", [GRPOConfig, RLOOConfig])
def test_a_group_has_at_least_two_completions(kind: type[Section]) -> None:
    with pytest.raises(ConfigError, match="num_generations"):
        build(kind, {"num_generations": 1})


def test_rloo_is_reinforce_with_a_leave_one_out_baseline_and_the_kl_in_the_reward() -> None:
    config = RLOOConfig()
    assert (config.advantage_baseline, config.scale_rewards) == (AdvantageBaseline.LEAVE_ONE_OUT, ScaleRewards.NONE)
    assert (config.beta, config.kl_placement, config.kl_estimator) == (0.05, KLPlacement.REWARD, KLEstimator.K1)
    assert config.importance_sampling_level is ImportanceLevel.SEQUENCE_PRODUCT
    assert config.loss_type is LossType.GRPO
    assert not config.vllm_importance_sampling_correction
    assert (config.max_age_at_use, config.slot_bounds.max_staleness) == (0, 0)


def test_a_configuration_is_for_one_pipeline() -> None:
    with pytest.raises(ConfigError, match="pipeline must be rloo here, got grpo"):
        build(RLOOConfig, {"pipeline": "grpo"})
    with pytest.raises(ConfigError, match="trl-ray rloo"):
        build(GRPOConfig, {"pipeline": "rloo"})
