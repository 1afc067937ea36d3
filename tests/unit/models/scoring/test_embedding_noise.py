"""Noise on embeddings is as large as each token's own sequence allows, only in training, and repeatable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_models import build_tiny_model, random_model
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossNeeds
from trl_ray.config.sections import ModelConfig, SharePrompt
from trl_ray.models.companions.companion import AdapterlessCompanion, Companion
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.scoring.classifier import ClassifierModule, load_classifier
from trl_ray.models.scoring.embedding_noise import noise_bounds, noisy_embeddings
from trl_ray.models.scoring.sample_scorer import ClassScores, SampleScorer, ScoringModule
from trl_ray.types import TrainingSample

ALPHA, WIDTH = 5.0, 128


def _sample(group: int, prompt: int, completion: int, *, trained: int | None = None) -> TrainingSample:
    """Of so many tokens; all of the completion are trained, or the first `trained`."""
    return TrainingSample(
        group_id=group,
        prompt_ids=np.arange(10, 10 + prompt, dtype=np.int32),
        completion_ids=np.arange(60, 60 + completion, dtype=np.int32),
        loss_mask=np.arange(completion) < (completion if trained is None else trained),
    )


SAMPLES = [_sample(0, 30, 34), _sample(0, 30, 4), _sample(1, 3, 13), _sample(2, 40, 60, trained=50)]
"""Sequences of 64, 34, 16 and 100 tokens; the first two have the same prompt."""
GROUP = (64 + 34) / 2


def _scorer(model: PreTrainedModel, *, alpha: float | None = ALPHA, share: SharePrompt) -> SampleScorer:
    needs = LossNeeds(embedding_noise=alpha)
    return SampleScorer(ScoringModule(model, chunk_size=64), share_prompt=share, temperature=1.0, needs=needs)


@contextmanager
def _embedded(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Ids and embeddings that the first layer was given."""
    ids: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[no-untyped-call]

    def note_ids(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids.append(inputs[0])

    def note(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((ids[-1], (inputs[0] if inputs else keywords["hidden_states"]).detach()))

    hooks = [
        embedding.register_forward_pre_hook(note_ids),
        model.base_model.layers[0].register_forward_pre_hook(note, with_kwargs=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def _noise(model: PreTrainedModel, scorer: SampleScorer) -> Tensor:
    """[R, T, H] what was added."""
    with _embedded(model) as seen:
        scorer.score(SAMPLES)
    (ids, embeddings) = seen[0]
    table: Any = model.get_input_embeddings()  # type: ignore[no-untyped-call]
    return embeddings - table.weight[ids].detach()


def _check(noise: Tensor, tokens: float) -> None:
    """Uniform within ± alpha / sqrt(L H): the largest nearly reaches it, and the mean square is a third of its."""
    bound = ALPHA / math.sqrt(tokens * WIDTH)
    assert 0.97 * bound < float(noise.abs().max()) <= bound * (1 + 1e-3)
    assert float(noise.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert abs(float(noise.mean())) < 0.05 * bound


def test_every_segment_of_a_row_has_the_noise_of_its_own_length() -> None:
    model = random_model().train()
    scorer = _scorer(model, share=SharePrompt.ALWAYS)
    torch.manual_seed(0)
    noise = _noise(model, scorer)
    lengths = [(30, GROUP), (33, 64), (3, 34), (3 + 12, 16), (40 + 49, 100)]
    assert noise.shape == (1, sum(count for count, _ in lengths), WIDTH)
    for part, (_, tokens) in zip(noise.split([count for count, _ in lengths], dim=1), lengths, strict=True):
        _check(part, tokens)


def test_every_padded_row_has_the_noise_of_its_own_length() -> None:
    model = random_model()
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    noise = _noise(model.train(), _scorer(model, share=SharePrompt.NEVER))
    assert noise.shape == (4, 40 + 49, WIDTH)
    for row, (inputs, tokens) in zip(noise, [(63, 64), (33, 34), (15, 16), (89, 100)], strict=True):
        _check(row[:inputs], tokens)


def test_bounds_by_hand() -> None:
    bounds = noise_bounds(torch.tensor([[4.0, 9.0]]), alpha=6.0, hidden_size=16)
    assert bounds.tolist() == [[pytest.approx(0.75), pytest.approx(0.5)]]  # 6 / sqrt(64), 6 / sqrt(144)


@pytest.mark.parametrize("share", [SharePrompt.ALWAYS, SharePrompt.NEVER])
def test_evaluation_is_exact_and_training_repeats_itself_from_a_seed(share: SharePrompt) -> None:
    model = random_model()
    noisy = _scorer(model, share=share)
    plain = _logprobs(_scorer(model, alpha=None, share=share))
    assert torch.equal(_logprobs(noisy), plain)  # the model is in evaluation mode
    model.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(_logprobs(noisy))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], plain)
    state = torch.get_rng_state()
    ids = np.array([5, 6, 7], dtype=np.int32)
    assert np.array_equal(noisy.sequence_logprobs(ids), _scorer(model, alpha=None, share=share).sequence_logprobs(ids))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(_logprobs(_scorer(model, alpha=None, share=share)), plain)  # nothing of it is left in the model


def _logprobs(scorer: SampleScorer) -> Tensor:
    scores = scorer.score(SAMPLES)
    assert isinstance(scores, TokenLogprobs)
    return scores.logprobs.detach()


def test_references_hear_no_noise_and_adapters_train_with_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = ModelConfig(model_name_or_path=build_tiny_model(tmp_path), use_peft=True, lora_dropout=0.0)
    policy = load_policy(model)
    scorer = _scorer(policy, share=SharePrompt.ALWAYS)
    plain = _logprobs(_scorer(policy.eval(), alpha=None, share=SharePrompt.ALWAYS))
    policy.train()
    for reference in (AdapterlessCompanion(policy, scorer), Companion(policy, scorer)):
        logprobs = reference.logprobs(SAMPLES)
        assert logprobs is not None and policy.training
        torch.testing.assert_close(logprobs, plain, rtol=1e-6, atol=1e-6)
    scores = scorer.score(SAMPLES)
    assert isinstance(scores, TokenLogprobs) and not torch.allclose(scores.logprobs, plain, atol=1e-3)
    scores.logprobs.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_checkpointed_layers_are_computed_again_with_the_same_noise(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(ModelConfig(model_name_or_path=path, gradient_checkpointing=checkpointing))
        torch.manual_seed(3)
        scores = _scorer(policy, share=SharePrompt.ALWAYS).score(SAMPLES)
        assert isinstance(scores, TokenLogprobs)
        scores.logprobs.sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_classifiers_hear_it_too(tmp_path: Path) -> None:
    model = load_classifier(ModelConfig(model_name_or_path=build_tiny_model(tmp_path)), num_labels=1)
    needs = LossNeeds(embedding_noise=ALPHA)
    scorer = SampleScorer(ClassifierModule(model), share_prompt=SharePrompt.AUTO, temperature=1.0, needs=needs)
    found = [scorer.score(SAMPLES), scorer.score(SAMPLES)]
    assert isinstance(found[0], ClassScores) and isinstance(found[1], ClassScores)
    assert not torch.equal(found[0].logits, found[1].logits)


def test_a_failed_pass_leaves_no_noise_behind() -> None:
    model = random_model()
    embedding: Any = model.get_input_embeddings()  # type: ignore[no-untyped-call]
    ids = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match="stop"), noisy_embeddings(model, torch.ones(1, 2)):
        assert not torch.equal(embedding(ids), embedding.weight[ids])
        raise RuntimeError("stop")
    assert torch.equal(embedding(ids), embedding.weight[ids])
