"""The options of pipelines on datasets: TRL's defaults, and contradictions that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.runs.dataset_config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedRunConfig,
)
from trl_ray.errors import ConfigError

ALL: list[type[SupervisedRunConfig]] = [
    SFTConfig,
    DPOConfig,
    KTOConfig,
    CPOConfig,
    ORPOConfig,
    RewardModelConfig,
    PRMConfig,
]


@pytest.mark.parametrize("kind", ALL)
def test_every_configuration_knows_its_pipeline(kind: type[SupervisedRunConfig]) -> None:
    assert kind().pipeline == kind.model_fields["pipeline"].default
    with pytest.raises(ConfigError, match="pipeline"):
        kind(pipeline="grpo")


def test_learning_rates_are_those_of_trl() -> None:
    assert [kind().learning_rate for kind in ALL] == [2e-5, 1e-6, 1e-6, 1e-6, 1e-6, 1e-4, 1e-5]


def test_a_step_holds_the_examples_of_all_ranks() -> None:
    config = SFTConfig(
        per_device_train_batch_size=3, gradient_accumulation_steps=4, runtime={"kind": "ray", "num_learners": 2}
    )
    assert config.examples_per_step == 24


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (SFTConfig, {"dataset_streaming": True}, "max_steps must be at least 1"),
        (SFTConfig, {"early_stopping_patience": 2}, "eval_steps must be at least 1"),
        (SFTConfig, {"eval_on_start": True}, "eval_steps must be at least 1"),
        (SFTConfig, {"save_strategy": "best"}, "eval_steps must be at least 1"),
        (SFTConfig, {"load_best_model_at_end": True, "eval_strategy": "no", "eval_steps": 5}, "eval_steps must be"),
        (
            SFTConfig,
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            "save_strategy must be eval_strategy, or best",
        ),
        (
            SFTConfig,
            {"load_best_model_at_end": True, "eval_steps": 4, "save_steps": 6},
            "save_steps must be a multiple of eval_steps",
        ),
        (SFTConfig, {"dataset_streaming": True, "max_steps": 2, "logging_strategy": "epoch"}, "logging_strategy"),
        (SFTConfig, {"save_only_model": True, "resume_from_checkpoint": True}, "save_only_model must be false"),
        (SFTConfig, {"packing": True, "max_length": None}, "max_length must be set"),
        (SFTConfig, {"packing_strategy": "wrapped"}, "packing must be true"),
        (SFTConfig, {"loss_type": "dft", "label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        (DPOConfig, {"sync_ref_model": True, "use_peft": True}, "sync_ref_model must be false"),
        (
            DPOConfig,
            {"precompute_ref_log_probs": True, "dataset_streaming": True, "max_steps": 1},
            "precompute_ref_log_probs must be false",
        ),
        (KTOConfig, {"per_device_train_batch_size": 1}, "must be at least 2"),
        (SFTConfig, {"steps_per_generation": 2}, "steps_per_generation"),
        (SFTConfig, {"max_length": 1}, "max_length"),
    ],
)
def test_contradictions_are_refused(kind: type[SupervisedRunConfig], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(**options)


def test_a_loss_is_better_when_it_is_lower_and_all_else_when_it_is_greater() -> None:
    assert not SFTConfig().wants_greater
    assert SFTConfig(metric_for_best_model="mean_token_accuracy").wants_greater
    assert RewardModelConfig().wants_greater
    assert SFTConfig(greater_is_better=True).wants_greater
