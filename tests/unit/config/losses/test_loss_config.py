"""Every contradiction of loss options is refused by name, and what only looks like one is not."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.losses.policy_options import LossConfig, LossType
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.errors import ConfigError


def refused(option: str, values: dict[str, Any], *, remedies: list[dict[str, Any]]) -> None:
    """By one line that begins with the option, whichever section is built; each remedy is accepted."""
    for owner in (LossConfig, GRPOConfig):
        with pytest.raises(ConfigError) as caught:
            build(owner, values)
        message = str(caught.value)
        assert message.startswith(option), message
        assert ", got " in message and "\n" not in message
        for remedy in remedies:
            build(owner, {**values, **remedy})


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_the_upper_clipping_range_is_not_below_the_lower(loss_type: str) -> None:
    refused(
        "epsilon_high",
        {"loss_type": loss_type, "epsilon": 0.3, "epsilon_high": 0.2},
        remedies=[{"epsilon_high": 0.3}, {"epsilon_high": None}],
    )


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_losses_without_clipping_have_no_upper_range(loss_type: str) -> None:
    refused("epsilon_high", {"loss_type": loss_type, "epsilon_high": 0.28}, remedies=[{"loss_type": "grpo"}])


@pytest.mark.parametrize("cap", [None, 0.28])
def test_the_cap_of_cispo_is_a_ratio_of_at_least_1(cap: float | None) -> None:
    refused("epsilon_high", {"loss_type": "cispo", "epsilon_high": cap}, remedies=[{"epsilon_high": 5.0}])


def test_the_cap_of_cispo_may_be_below_epsilon() -> None:
    assert LossConfig(loss_type=LossType.CISPO, epsilon=2.0, epsilon_high=1.5).upper_epsilon == 1.5


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_two_sided_clipping_is_for_clipped_losses(loss_type: str) -> None:
    values = {"loss_type": loss_type, "delta": 7.0} | ({"epsilon_high": 5.0} if loss_type == "cispo" else {})
    refused("delta", values, remedies=[{"delta": None}, {"loss_type": "bnpo"}])


@pytest.mark.parametrize("values", [{"epsilon": 0.5}, {"epsilon_high": 0.5}])
def test_the_second_bound_lies_above_the_first(values: dict[str, Any]) -> None:
    refused("delta", {"delta": 1.5, **values}, remedies=[{"delta": 1.6}])


def test_vespo_has_no_other_level_of_importance() -> None:
    refused(
        "importance_sampling_level",
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        remedies=[{"importance_sampling_level": "token"}, {"loss_type": "grpo"}],
    )


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate"])
def test_vespo_takes_corrections_of_tokens(mode: str) -> None:
    refused(
        "vllm_importance_sampling_mode",
        {"loss_type": "vespo", "vllm_importance_sampling_mode": mode},
        remedies=[
            {"vllm_importance_sampling_mode": "token_mask"},
            {"vllm_importance_sampling_correction": False},
        ],
    )


@pytest.mark.parametrize("low", [4.0, 3.0])
def test_the_bounds_of_the_correction_leave_room_between_them(low: float) -> None:
    refused(
        "vllm_importance_sampling_clip_min",
        {"vllm_importance_sampling_clip_min": low},
        remedies=[{"vllm_importance_sampling_clip_max": 4.5}, {"vllm_importance_sampling_clip_max": None}],
    )


def test_a_truncated_correction_has_a_bound() -> None:
    refused(
        "vllm_importance_sampling_clip_max",
        {"vllm_importance_sampling_clip_max": None},
        remedies=[
            {"vllm_importance_sampling_clip_min": 0.5},
            {"vllm_importance_sampling_mode": "token_mask"},
            {"vllm_importance_sampling_correction": False},
        ],
    )


def test_a_ratio_to_the_sampler_leaves_nothing_to_correct() -> None:
    refused(
        "vllm_importance_sampling_mode",
        {"old_logprobs": "sampler", "vllm_importance_sampling_mode": "sequence_mask"},
        remedies=[{"vllm_importance_sampling_correction": False}, {"old_logprobs": "policy"}],
    )


def test_without_a_kl_there_is_no_reference_to_move() -> None:
    refused("sync_ref_model", {"sync_ref_model": True}, remedies=[{"beta": 0.1}])


def test_k1_in_the_loss_needs_the_ratio_to_hold_anything() -> None:
    refused(
        "use_bias_correction_kl",
        {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False},
        remedies=[
            {"use_bias_correction_kl": True},
            {"kl_estimator": "k2"},
            {"kl_estimator": "k3"},
            {"kl_placement": "reward"},
            {"beta": 0.0},
        ],
    )


@pytest.mark.parametrize("low", [1.0, 2.0])
def test_the_bounds_of_the_adaptive_coefficient_leave_room_between_them(low: float) -> None:
    refused(
        "entropy_coef_min",
        {"use_adaptive_entropy": True, "entropy_coef": 1.0, "entropy_coef_min": low},
        remedies=[{"entropy_coef_max": 3.0, "entropy_coef": 2.5}],
    )


@pytest.mark.parametrize("values", [{"entropy_coef_min": 0.1}, {"entropy_coef": 0.3, "entropy_coef_max": 0.2}])
def test_the_adaptive_coefficient_starts_within_its_bounds(values: dict[str, Any]) -> None:
    refused("entropy_coef ", {"use_adaptive_entropy": True, **values}, remedies=[{"entropy_coef": 0.15}])


def test_the_adaptive_coefficient_moves() -> None:
    refused(
        "entropy_coef_delta",
        {"use_adaptive_entropy": True, "entropy_coef_delta": 0.0},
        remedies=[{"entropy_coef_delta": 0.1}, {"use_adaptive_entropy": False}],
    )


SAMPLERS: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"repetition_penalty": 1.1}]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"vllm_importance_sampling_mode": "token_mask"},
        {"vllm_importance_sampling_mode": "sequence_mask"},
        {"vllm_importance_sampling_mode": "sequence_truncate"},
        {"off_policy_mask_threshold": 0.1},
        {"old_logprobs": "sampler"},
        {"old_logprobs": "sampler", "importance_sampling_level": "sequence"},
        {"old_logprobs": "sampler", "importance_sampling_level": "sequence_product"},
        {"importance_sampling_level": "sequence"},
        {"loss_type": "vespo"},
        {"loss_type": "vespo", "old_logprobs": "sampler"},
    ],
    ids=str,
)
def test_a_sampler_that_leaves_tokens_out_goes_with_ratios_of_tokens_and_of_completions(
    values: dict[str, Any], sampler: dict[str, Any]
) -> None:
    # Its log-probs are the policy's: fresh tokens have the ratio 1 each, and so has a completion of them.
    build(AsyncGRPOConfig, {**values, **sampler})


@pytest.mark.parametrize("owner", [GRPOConfig, AsyncGRPOConfig, RLOOConfig])
@pytest.mark.parametrize(
    "values",
    [
        {},
        *({"loss_type": kind.value, "epsilon_high": 5.0 if kind is LossType.CISPO else None} for kind in LossType),
        {"beta": 0.0},
        {"beta": 0.1},
        {"old_logprobs": "sampler"},
        {"use_adaptive_entropy": True},
        {"vllm_importance_sampling_correction": False},
        {"top_p": 0.9},
        {"top_entropy_quantile": 0.0},
        {"num_iterations": 2},
    ],
    ids=str,
)
def test_a_default_is_never_refused_and_the_resolved_options_load_again(
    owner: type[GRPOConfig], values: dict[str, Any]
) -> None:
    config = build(owner, values)
    assert build(owner, parse_yaml(dump_yaml(config), source="resolved")) == config
    assert config.part(LossConfig).loss_type is config.loss_type
