"""Runs with what recipes ask of models: embeddings trained beside an adapter, bfloat16 weights, scaled rope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import dataset_runs
import runs
from tiny_models import build_tiny_model, build_tokenizer
from trl_ray import AsyncGRPOPipeline

pytestmark = pytest.mark.integration
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("longrope")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        rope_parameters=LONGROPE,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=259,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def run(model: str, folder: Path, engine: str, **changes: Any) -> None:
    """Three updates; the weight check of every pull must pass within 1e-3 nats, or the run stops."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    rollout = {"engine": engine, "dtype": "float32"}
    config = runs.async_grpo(model, folder, max_steps=3, rollout=rollout, **changes)
    AsyncGRPOPipeline(args=config, train_dataset=runs.PROMPTS).train()
    assert len(runs.lines(folder / "metrics.jsonl")) == 3


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_engines_compute_with_trained_embeddings_and_head_of_a_tied_model(
    tied: str, tmp_path: Path, engine: str
) -> None:
    adapter = {"use_peft": True, "lora_r": 4, "lora_modules_to_save": ["embed_tokens", "lm_head"]}
    run(tied, tmp_path / "run", engine, **adapter)
    before = load_file(Path(tied) / "model.safetensors")["model.embed_tokens.weight"]
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-3" / "adapter_model.safetensors")
    assert not torch.equal(saved["base_model.model.model.embed_tokens.weight"], before)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_engines_compute_with_scaled_rope_as_the_learner_does(longrope: str, tmp_path: Path, engine: str) -> None:
    run(longrope, tmp_path / "run", engine)


def test_a_run_in_bfloat16_resumes_with_its_float32_copies(tied: str, tmp_path: Path) -> None:
    changes = {"dtype": "bfloat16", "learning_rate": 1e-5, "save_steps": 2}
    dataset_runs.train("sft", tied, tmp_path / "straight", max_steps=4, **changes)
    folder = tmp_path / "straight" / "checkpoints" / "step-4"
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    copies = state["masters"]
    assert {copy.dtype for copy in copies} == {torch.float32}
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    rounded = sorted(float(copy.bfloat16().float().sum()) for copy in copies)
    assert np.allclose(rounded, sorted(float(weight.float().sum()) for weight in weights.values()))
