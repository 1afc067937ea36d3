"""model_revision reaches whoever reads the model: learner, tokenizer, engine."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants as hub
import numpy as np
import pytest
import torch

from tiny_models import build_tiny_model, random_model
from trl_ray.actors.rollout_worker import open_engine
from trl_ray.config.sections import ModelConfig, RolloutConfig
from trl_ray.engines.checkpoint_facts import read_facts
from trl_ray.models.policy_loading import load_policy, load_tokenizer

NAME = "someone/tiny"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache of the hub with two revisions of a model: other weights, and another end token."""
    cache = tmp_path / "hub"
    repo = cache / f"models--{NAME.replace('/', '--')}"
    for place, (revision, end) in enumerate({"main": "<|im_end|>", "v2": "<|endoftext|>"}.items()):
        snapshot = repo / "snapshots" / f"{place:040d}"
        build_tiny_model(snapshot, seed=place)
        tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(snapshot), eos_token=end))
        tokenizer.save_pretrained(snapshot)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(snapshot.name)
    for constant in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(hub, constant, str(cache))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return NAME


def test_learner_tokenizer_and_engine_read_the_revision(cached: str) -> None:
    model = ModelConfig(model_name_or_path=cached, model_revision="v2")
    expected = random_model(seed=1)
    policy = load_policy(model)
    assert torch.equal(policy.lm_head.weight, expected.lm_head.weight)
    assert load_tokenizer(model).eos_token == "<|endoftext|>"
    facts = read_facts(cached, dtype="float32", trust_remote_code=False, revision="v2")
    assert facts.tokenizer.eos_token == "<|endoftext|>"
    engine = open_engine(
        model=model, rollout=RolloutConfig(engine="transformers", max_num_seqs=1), max_model_len=32, seed=0
    )
    try:
        [scored] = engine.score([np.array([1, 2, 3], dtype=np.int32)], deadline_s=60.0)
    finally:
        engine.close()
    with torch.no_grad():
        logits = expected(input_ids=torch.tensor([[1, 2, 3]])).logits[0, :-1]
    ours = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor([[2], [3]]))[:, 0]
    assert torch.allclose(torch.from_numpy(scored), ours, atol=1e-5)
