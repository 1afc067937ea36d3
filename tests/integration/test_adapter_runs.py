"""A whole run that trains an adapter: engines prove that they hold the merged weights, and the adapter goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig

import runs
from tiny_models import build_tiny_model
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration


def test_an_adapter_is_trained_published_saved_and_trained_on(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny")

    def train(model: str, name: str) -> Path:
        args = runs.grpo(model, tmp_path / name, max_steps=2, beta=0.05, use_peft=True)
        pipeline = GRPOPipeline(
            args=args,
            train_dataset=Dataset.from_list(runs.PROMPTS),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True),
        )
        pipeline.train()
        return tmp_path / name

    first = train(tiny, "first")
    # Canaries, on by default, have held every engine's log-probs against the learner's.
    metrics = runs.lines(first / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2] and metrics[1]["kl/ref"] > 0
    checkpoint = first / "checkpoints" / "step-2"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"], config["base_model_name_or_path"]) == (4, True, tiny)
    second = runs.lines(train(str(checkpoint), "second") / "metrics.jsonl")
    assert second[0]["kl/ref"] == 0.0  # the reference is the adapter that training started from
