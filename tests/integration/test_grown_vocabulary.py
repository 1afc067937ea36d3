"""Runs whose tokenizer is longer than the model's embedding, from the first step to the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

import dataset_runs
import runs
from tiny_models import build_tiny_model, build_tokenizer
from trl_ray import AsyncGRPOPipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = build_tiny_model(tmp_path_factory.mktemp("longer"), tied=False)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_row_of_a_new_token_is_trained_and_saved(longer: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"call {number}: ", "completion": "<tool>x"} for number in range(8)]
    dataset_runs.pipeline("sft", longer, tmp_path / "run", inputs={"train_dataset": rows}, max_steps=1).train()
    saved = tmp_path / "run" / "checkpoints" / "step-1"
    before, after = load_file(Path(longer) / "model.safetensors"), load_file(saved / "model.safetensors")
    head = after["lm_head.weight"]
    assert before["lm_head.weight"].shape == (260, 128) and head.shape == (320, 128)
    assert AutoTokenizer.from_pretrained(saved).convert_tokens_to_ids("<tool>") == 260
    assert np.abs(after["lm_head.weight"][:260] - before["lm_head.weight"]).max() < 0.01


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_rollouts_and_their_checks_pass_on_both_engines(longer: str, tmp_path: Path, engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    prompts = [{"prompt": f"<tool>{number}: "} for number in range(16)]
    config = runs.async_grpo(longer, tmp_path / "run", max_steps=2, rollout={"engine": engine, "dtype": "float32"})
    AsyncGRPOPipeline(args=config, train_dataset=prompts).train()
    # The weight check of every pull has passed, or the run would have stopped.
    assert [line["step"] for line in runs.lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
