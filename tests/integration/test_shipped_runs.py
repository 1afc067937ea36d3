"""The shipped tiny configuration of every pipeline on datasets runs as it stands, and vLLM serves what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset_runs import SUPERVISED
from runs import assert_balanced, events
from tiny_models import build_tiny_model
from trl_ray.cli.main import main
from trl_ray.types import GenerationRequest, SamplingParams

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "1 + 2 = ?"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("shipped") / "tiny")


def run_shipped(pipeline: str, tiny: str, folder: Path, *further: str) -> Path:
    """Train as a user would, but in this process; returns the run directory."""
    config = ROOT / "configs" / pipeline / "tiny.yaml"
    options = [f"model_name_or_path={tiny}", f"output_dir={folder}", "runtime.kind=local", *further]
    assert main([pipeline, "--config", str(config), *options]) == 0
    return folder


@pytest.mark.parametrize("pipeline", SUPERVISED)
def test_the_shipped_tiny_config_trains_and_lowers_the_held_out_loss(pipeline: str, tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    run = run_shipped(pipeline, tiny, tmp_path / "run")
    assert_balanced(run, trained=32)
    evaluated = [event["detail"] for event in events(run, "evaluated")]
    assert [(each["step"], each["examples"]) for each in evaluated] == [(0, 16), (2, 16), (4, 16)]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]


def test_the_shipped_tiny_configs_of_teachers_train(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    assert_balanced(run_shipped("sdpo", tiny, tmp_path / "sdpo"), trained=16)
    run = run_shipped("distill", tiny, tmp_path / "distill", f"teacher_model_name_or_path={tiny}")
    assert_balanced(run, trained=64)
    assert [event["detail"]["step"] for event in events(run, "evaluated")] == [0, 4]


@pytest.mark.parametrize("pipeline", ["sft", "dpo", "kto"])
def test_vllm_generates_from_a_checkpoint_with_the_log_probs_of_its_weights(
    pipeline: str, tiny: str, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("reasoning_gym")
    from trl_ray.engines.factory import create_engine

    folder = run_shipped(pipeline, tiny, tmp_path / "run") / "checkpoints" / "step-4"
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(QUESTION, add_generation_prompt=True)
    ids = np.asarray(prompt["input_ids"], np.int32)
    engine = create_engine(
        "vllm", model=str(folder), dtype="float32", max_model_len=256, max_num_seqs=4, kv_cache_memory_bytes=64 << 20
    )
    try:
        request = GenerationRequest(
            request_id="r", prompt_ids=ids, n=4, sampling=SamplingParams(max_tokens=12, min_tokens=4), seed=0
        )
        completions = engine.submit([request])[0].result(timeout=120)
    finally:
        engine.close()
    trained, before = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tiny))
    assert len(completions) == 4
    for completion in completions:
        assert 4 <= len(completion.token_ids) <= 12
        np.testing.assert_allclose(completion.logprobs, logprobs(trained, ids, completion.token_ids), atol=1e-4)
        # The weights that training began with would have been noticed.
        assert np.abs(completion.logprobs - logprobs(before, ids, completion.token_ids)).max() > 1e-2


def logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """[L] of a completion, the end of sequence barred from the first four tokens, as it was when they were sampled."""
    ids = torch.tensor(np.concatenate([prompt, completion])[None].astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].clone()  # [L, V]
    logits[:4, model.config.eos_token_id] = -torch.inf
    found: np.ndarray = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
    return found
