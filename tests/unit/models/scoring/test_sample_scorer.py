"""Log-probs of samples: both layouts give what the model's own logits give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import build_tiny_model, random_model
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossNeeds
from trl_ray.config.sections import ModelConfig, SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.types import TrainingSample


def _samples() -> list[TrainingSample]:
    rng = np.random.default_rng(0)
    samples = []
    for group, prompt_length in enumerate((7, 3)):
        prompt = rng.integers(0, 250, prompt_length).astype(np.int32)
        for length in (4, 1, 6, 0):
            mask = np.ones(length, dtype=bool)
            mask[1:2] = False
            samples.append(
                TrainingSample(
                    group_id=group,
                    prompt_ids=prompt,
                    completion_ids=rng.integers(0, 250, length).astype(np.int32),
                    loss_mask=mask,
                    sampler_logprobs=np.zeros(length, dtype=np.float32),
                    advantage=1.0,
                    min_version=0,
                )
            )
    return samples


def _by_hand(model: torch.nn.Module, samples: list[TrainingSample], temperature: float) -> torch.Tensor:
    values = []
    for sample in samples:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.completion_ids]).astype(np.int64))
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0] / temperature, dim=-1)
        taken = logp[:-1].gather(1, ids[1:, None]).squeeze(1)[len(sample.prompt_ids) - 1 :]
        values.append(taken[torch.from_numpy(sample.loss_mask)])
    return torch.cat(values)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_and_padded_rows_give_the_logprobs_and_gradients_of_single_sequences(
    family: str, attention: str
) -> None:
    model = random_model(family=family)
    model.set_attn_implementation(attention)
    samples = _samples()
    expected = _by_hand(model, samples, 0.8)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for share in (SharePrompt.ALWAYS, SharePrompt.NEVER, SharePrompt.AUTO):
        scorer = SampleScorer(ScoringModule(model, chunk_size=4), share_prompt=share, temperature=0.8)
        assert scorer.can_share is (share is not SharePrompt.NEVER)
        scores = scorer.score(samples)
        assert scores is not None
        torch.testing.assert_close(scores.logprobs, expected, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(scores.logprobs.square().sum(), list(model.parameters()))
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_sequence_logprobs_are_at_temperature_1_and_leave_the_mode_alone() -> None:
    model = random_model().train()
    ids = np.array([5, 80, 3, 9], dtype=np.int32)
    scorer = SampleScorer(ScoringModule(model, chunk_size=2), share_prompt=SharePrompt.AUTO, temperature=0.1)
    logp = torch.log_softmax(model(input_ids=torch.from_numpy(ids).long()[None]).logits[0], dim=-1)
    expected = [logp[i, ids[i + 1]].item() for i in range(3)]
    np.testing.assert_allclose(scorer.sequence_logprobs(ids), expected, rtol=1e-5)
    assert model.training


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        model = load_policy(ModelConfig(model_name_or_path=path, gradient_checkpointing=checkpointing))
        scorer = SampleScorer(ScoringModule(model, chunk_size=64), share_prompt=SharePrompt.ALWAYS, temperature=1.0)
        scores = scorer.score(_samples())
        assert scores is not None
        scores.logprobs.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model, samples = random_model(), _samples()
    scores = [
        SampleScorer(
            ScoringModule(model, chunk_size=64, bf16=bf16), share_prompt=SharePrompt.ALWAYS, temperature=1.0
        ).score(samples)
        for bf16 in (False, True)
    ]
    assert scores[0] is not None and scores[1] is not None
    assert 0 < (scores[0].logprobs - scores[1].logprobs).abs().mean() < 0.1


def test_a_sliding_window_is_never_shared_and_always_is_refused() -> None:
    model = random_model(family="qwen3")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    auto = SampleScorer(ScoringModule(model, chunk_size=8), share_prompt=SharePrompt.AUTO, temperature=1.0)
    assert auto.can_share is False
    with pytest.raises(ModelError, match="share_prompt"):
        SampleScorer(ScoringModule(model, chunk_size=8), share_prompt=SharePrompt.ALWAYS, temperature=1.0)


@pytest.mark.parametrize("share", [SharePrompt.ALWAYS, SharePrompt.NEVER])
def test_what_a_loss_needs_is_filled_and_nothing_else(share: SharePrompt) -> None:
    model, samples = random_model(), _samples()
    logp = _by_hand_whole(model, samples, 0.8)
    targets = torch.from_numpy(np.concatenate([s.completion_ids[s.loss_mask] for s in samples]).astype(np.int64))
    expected = {
        "sum_squared_probs": logp.exp().square().sum(-1),
        "top1": logp.argmax(-1) == targets,
        "mean_logprobs": logp.mean(-1),
    }
    module = ScoringModule(model, chunk_size=7)
    for asked in ([], ["top1"], ["mean_logprobs"], ["sum_squared_probs", "mean_logprobs"], list(expected)):
        needs = LossNeeds(**dict.fromkeys(asked, True))
        scores = SampleScorer(module, share_prompt=share, temperature=0.8, needs=needs).score(samples)
        assert isinstance(scores, TokenLogprobs)
        torch.testing.assert_close(scores.logprobs, _by_hand(model, samples, 0.8), rtol=1e-5, atol=1e-5)
        for name, wanted in expected.items():
            found = getattr(scores, name)
            assert (found is not None) is (name in asked)
            if found is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _by_hand_whole(model: torch.nn.Module, samples: list[TrainingSample], temperature: float) -> torch.Tensor:
    """[N, V]"""
    values = []
    for sample in samples:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.completion_ids]).astype(np.int64))
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0] / temperature, dim=-1)
        values.append(logp[len(sample.prompt_ids) - 1 : -1][torch.from_numpy(sample.loss_mask)])
    return torch.cat(values)


def test_smoothed_labels_have_the_gradients_of_the_whole_log_softmax() -> None:
    model, samples = random_model(tied=True), _samples()
    scorer = SampleScorer(
        ScoringModule(model, chunk_size=100),
        share_prompt=SharePrompt.ALWAYS,
        temperature=1.0,
        needs=LossNeeds(mean_logprobs=True),
    )
    scores = scorer.score(samples)
    assert isinstance(scores, TokenLogprobs) and scores.mean_logprobs is not None
    loss = -(0.9 * scores.logprobs + 0.1 * scores.mean_logprobs).sum()
    expected = -(0.9 * _by_hand(model, samples, 1.0) + 0.1 * _by_hand_whole(model, samples, 1.0).mean(-1)).sum()
    parameters = list(model.parameters())
    for got, want in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
