"""Rope that depends on length: every sequence is computed as if it were alone, whatever shares its row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from tiny_models import build_tokenizer
from trl_ray.config.losses.reward_modelling_options import StepAggregation
from trl_ray.config.reward_model_options import RewardModelKind
from trl_ray.config.sections import ModelConfig, SharePrompt
from trl_ray.models.policy_loading import Policy, load_policy, unscaled_positions
from trl_ray.models.scoring.reward_model import RewardModel
from trl_ray.models.scoring.rope_regimes import rope_regimes, sequence_lengths
from trl_ray.models.scoring.sample_scorer import SampleScorer
from trl_ray.models.scoring.scoring_module import ScoringModule
from trl_ray.types import TrainingSample

ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 259,
}


def config_of(kind: str) -> PretrainedConfig:
    positions, rope = (64, LONGROPE) if kind == "longrope" else (ORIGINAL, DYNAMIC)
    return LlamaConfig(**SIZES, max_position_embeddings=positions, rope_parameters=dict(rope))


@pytest.fixture(scope="module", params=["longrope", "dynamic"])
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config_of(request.param))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def sample(prompt: int, completion: int, *, group: int = 0) -> TrainingSample:
    generator = np.random.default_rng(1000 * prompt + completion)
    return TrainingSample(
        group_id=group,
        prompt_ids=np.random.default_rng(prompt).integers(0, 256, prompt).astype(np.int32),
        completion_ids=generator.integers(0, 256, completion).astype(np.int32),
        loss_mask=np.ones(completion, dtype=np.bool_),
        sampler_logprobs=np.zeros(completion, dtype=np.float32),
        advantage=0.0,
        min_version=0,
    )


# Beside each other: short and long, short and long of one prompt, one at the border, two of one length.
SAMPLES = [
    sample(4, 5),
    sample(6, 30, group=1),
    sample(6, 3, group=1),
    sample(6, 20, group=1),
    sample(8, 9, group=2),
    sample(8, 10, group=2),
    sample(5, 21, group=3),
]


def alone(path: Path, each: TrainingSample) -> torch.Tensor:
    """The log-probs of a fresh model of transformers' that has never seen anything else."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.from_numpy(np.concatenate([each.prompt_ids, each.completion_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[0, len(each.prompt_ids) - 1 :]
    completion = torch.from_numpy(each.completion_ids.astype(np.int64))
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


@pytest.fixture(scope="module")
def expected(scaled: Path) -> torch.Tensor:
    return torch.cat([alone(scaled, each) for each in SAMPLES])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("share", [SharePrompt.NEVER, SharePrompt.AUTO, SharePrompt.ALWAYS])
def test_rows_of_short_and_long_texts_give_what_each_gives_alone(
    scaled: Path, expected: torch.Tensor, share: SharePrompt, attention: str
) -> None:
    model = ModelConfig(model_name_or_path=str(scaled), attn_implementation=attention)
    policy: Policy = load_policy(model, trainable=False)
    scorer = SampleScorer(ScoringModule(policy, chunk_size=None), share_prompt=share, temperature=1.0)
    for _ in range(2):  # dynamic NTK remembers what it saw
        got = scorer.logprobs(SAMPLES)
        assert got is not None and torch.allclose(got, expected, atol=1e-4)


def test_without_the_regimes_short_texts_would_be_off(scaled: Path, expected: torch.Tensor) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(scaled)
    short = SAMPLES[0]
    ids = torch.zeros(2, 36, dtype=torch.int64)
    ids[0, :9] = torch.from_numpy(np.concatenate([short.prompt_ids, short.completion_ids]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, 3:8]
    off = logits.log_softmax(-1).gather(1, ids[0, 4:9, None])[:, 0]
    assert (off - expected[:5]).abs().mean() > 1e-2


def test_gradients_flow_and_recomputation_gives_the_same(scaled: Path) -> None:
    grads = []
    for recompute in (False, True):
        policy = load_policy(ModelConfig(model_name_or_path=str(scaled), gradient_checkpointing=recompute))
        scorer = SampleScorer(ScoringModule(policy, chunk_size=None), share_prompt=SharePrompt.AUTO, temperature=1.0)
        found = scorer.logprobs(SAMPLES)
        assert found is not None
        found.sum().backward()  # type: ignore[no-untyped-call]
        grads.append(policy.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-5) and grads[0].abs().sum() > 0


def test_lengths_of_packed_shared_and_padded_rows() -> None:
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    assert sequence_lengths(packed).tolist() == [[3, 3, 3, 4, 4, 4, 4, 1]]
    # A prompt of two tokens with two completions, of three and one.
    shared = torch.tensor([[0, 1, 2, 3, 4, 2, 0, 0]])
    assert sequence_lengths(shared).tolist() == [[5, 5, 5, 5, 5, 5, 1, 1]]
    assert sequence_lengths(torch.tensor([[7]])).tolist() == [[8]], "one token after a cache"


def test_regimes_are_those_of_the_configuration(scaled: Path) -> None:
    regimes = rope_regimes(AutoModelForCausalLM.from_pretrained(scaled).config)
    assert regimes is not None and regimes.original == ORIGINAL
    assert (regimes.of(3), regimes.of(16)) == ((16, 16) if regimes.each else (0, 0))
    assert (regimes.of(17), regimes.of(40)) == ((17, 40) if regimes.each else (1, 1))
    assert rope_regimes(LlamaConfig(**SIZES)) is None
    assert unscaled_positions(ModelConfig(model_name_or_path=str(scaled))) == ORIGINAL - 1


def test_a_reward_model_rates_each_row_as_if_it_were_alone(scaled: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(scaled, num_labels=1)
    rows = [np.concatenate([each.prompt_ids, each.completion_ids]) for each in SAMPLES]

    def rated(chosen: list[Any]) -> list[float | None]:
        fresh = RewardModel(
            copy.deepcopy(model), kind=RewardModelKind.SEQUENCE, aggregation=StepAggregation.MIN, reads_last_token=True
        )
        return fresh.rate(chosen, [])

    together = rated(rows)
    single = [rated([row])[0] for row in rows]
    assert np.allclose(np.array(together, float), np.array(single, float), atol=1e-4)
