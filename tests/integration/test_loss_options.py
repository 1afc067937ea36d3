"""Every option of the objective and of the advantages, from YAML, in all three pipelines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import PROMPTS, REWARDS, assert_balanced, lines, values
from tiny_models import build_tiny_model
from trl_ray.config.load import load_config
from trl_ray.pipelines.pipeline_registry import PIPELINES

pytestmark = pytest.mark.integration
STEPS = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.003, "epsilon_high": 0.004},
    "two-sided clip": {"delta": 1.5, "epsilon_high": 0.28},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "top entropy": {"top_entropy_quantile": 0.4},
    "entropy bonus": {"entropy_coef": 0.01},
    "adaptive entropy": {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "k1": {"beta": 0.1, "kl_estimator": "k1"},
    "k2": {"beta": 0.1, "kl_estimator": "k2", "use_bias_correction_kl": False},
    "k3": {"beta": 0.1, "kl_estimator": "k3"},
    "KL in the reward": {"beta": 0.1, "kl_placement": "reward"},
    "synchronised reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "several updates": {"num_iterations": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
    "sequence mask": {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_min": 0.1},
    "sampler ratio": {"old_logprobs": "sampler", "vllm_importance_sampling_correction": False},
    "leave one out": {"advantage_baseline": "leave_one_out", "scale_rewards": "none"},
    "reinforce++": {"advantage_baseline": "none", "scale_rewards": "none", "normalize_advantages": True},
    "batch scale": {"scale_rewards": "batch", "reward_clip_range": [-1.0, 1.0]},
    "several objectives": {
        "multi_objective_aggregation": "normalize_then_sum",
        "scale_rewards": "group",
        "advantage_baseline": "group_mean",
        "beta": 0.0,
        "reward_funcs": [f"{REWARDS}:vowels", f"{REWARDS}:length"],
        "reward_weights": [1.0, 0.5],
    },
    "overlong": {"overlong_buffer_len": 4, "overlong_penalty_factor": 0.5, "mask_truncated_completions": False},
    "token budget": {"max_tokens_per_micro_batch": 64},
    "LoRA": {"use_peft": True, "lora_r": 4, "beta": 0.1, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def run(pipeline: str, model: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Through a YAML file, as a user would; the lines of metrics."""
    whole = values(model, folder / "run", max_steps=STEPS, html_report=False, **options)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    chosen = PIPELINES[pipeline]
    output = chosen(args=load_config(chosen.config_class, path), train_dataset=PROMPTS).train()
    assert output.steps == STEPS
    assert_balanced(folder / "run", trained=4 * STEPS)
    return lines(folder / "run" / "metrics.jsonl")


@pytest.mark.parametrize("pipeline", ["grpo", "async-grpo", "rloo"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains(name: str, pipeline: str, model: str, tmp_path: Path) -> None:
    if pipeline == "rloo":
        pytest.importorskip("trl_ray.pipelines.rloo")
    metrics = run(pipeline, model, tmp_path, **OPTIONS[name])
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics)
    assert all(line["learner/skipped_steps"] == 0 for line in metrics)
