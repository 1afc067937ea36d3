"""Attention over segments: the same numbers as one sequence at a time, with and without masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tiny_models import random_model
from trl_ray.algorithms.batches.layout import AttentionKind, Segment
from trl_ray.config.sections import SharePrompt
from trl_ray.models.scoring import sample_scorer as scoring
from trl_ray.models.scoring import segment_attention as module
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.types import TrainingSample

SEGMENTS = (Segment(prompt=3, bodies=(4, 1)), Segment(prompt=2, bodies=()), Segment(prompt=1, bodies=(9,)))
TOKENS = 20
Attend = Callable[..., torch.Tensor]


def _qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, TOKENS, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]


def _by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[1, T, heads, D] with a dense mask written down from the definition."""
    sees = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    start = 0
    for segment in SEGMENTS:
        at = start + segment.prompt
        sees[start:at, start:at] = True
        for body in segment.bodies:
            sees[at : at + body, start : start + segment.prompt] = True
            sees[at : at + body, at : at + body] = True
            at += body
        start = at
    sees &= torch.ones_like(sees).tril()
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
    return (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)


@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("attend", [module._attend_by_chunks, module._attend_plainly])
def test_every_token_sees_its_prompt_and_its_completion(
    attend: Attend, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_attend_by_chunks", attend)
    monkeypatch.setattr(module, "QUERY_CHUNK", chunk)
    query, key, value = (tensor.requires_grad_() for tensor in _qkv())
    actual, _ = module.segment_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, segments=SEGMENTS)
    expected = _by_hand(query, key, value)
    torch.testing.assert_close(actual, expected)
    got = torch.autograd.grad(actual.square().sum(), (query, key, value))
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_keeps_the_attention_and_its_checkpoint_does_not_name_it(tmp_path: Path) -> None:
    model = random_model()
    left = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    before = model(**left).logits
    scorer = SampleScorer(ScoringModule(model, chunk_size=64), share_prompt=SharePrompt.AUTO, temperature=1.0)
    assert scorer.can_share and model.config._attn_implementation == module.SEGMENT_ATTENTION
    # Whoever calls the model with a mask of its own, left padding too, gets what `sdpa` gives.
    torch.testing.assert_close(model(**left).logits[:, 1:], before[:, 1:])
    model.save_pretrained(tmp_path)
    assert module.SEGMENT_ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    # A second scorer of the same model finds it as the first left it.
    assert SampleScorer(ScoringModule(model, chunk_size=64), share_prompt=SharePrompt.ALWAYS, temperature=1.0).can_share


def _score(model: PreTrainedModel) -> torch.Tensor:
    samples = [
        TrainingSample(
            group_id=0,
            prompt_ids=np.array([1, 2, 3], dtype=np.int32),
            completion_ids=np.array(ids, dtype=np.int32),
            loss_mask=np.ones(len(ids), dtype=bool),
            sampler_logprobs=np.zeros(len(ids), dtype=np.float32),
            advantage=1.0,
            min_version=0,
        )
        for ids in ([4, 5, 6], [7, 8])
    ]
    scorer = SampleScorer(ScoringModule(model, chunk_size=64), share_prompt=SharePrompt.AUTO, temperature=1.0)
    scores = scorer.score(samples)
    assert scores is not None
    return scores.logprobs


@pytest.mark.parametrize("kind", list(AttentionKind))
def test_every_kind_of_attention_gives_the_same_logprobs(kind: AttentionKind, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _score(random_model())
    # Without a mask, transformers' `sdpa` tells sequences apart by their positions, as fused kernels do.
    monkeypatch.setattr("trl_ray.models.scoring.sample_scorer.attention_kind", lambda model: kind)
    seen: list[AttentionKind] = []
    build = scoring.build_layout

    def build_layout(samples: Any, **options: Any) -> Any:
        seen.append(options["attention"])
        return build(samples, **options)

    monkeypatch.setattr(scoring, "build_layout", build_layout)
    torch.testing.assert_close(_score(random_model()), expected, rtol=1e-5, atol=1e-5)
    assert seen[-1] is kind


def test_a_model_that_does_not_pass_the_segments_on_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    expected = _score(model)
    forward = model.base_model.forward

    def deaf(*args: Any, segments: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", deaf)
    torch.testing.assert_close(_score(model), expected, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"_attn_implementation": "sdpa"}, AttentionKind.SEGMENTS),
        ({"_attn_implementation": "eager"}, AttentionKind.MASKED),
        ({"_attn_implementation": "flash_attention_2"}, AttentionKind.RESTARTS),
        ({"_attn_implementation": "flex_attention"}, AttentionKind.CAUSAL),
        ({"_attn_implementation": "sdpa", "sliding_window": 64}, AttentionKind.CAUSAL),
        (
            {"_attn_implementation": "sdpa", "layer_types": ["full_attention", "sliding_attention"]},
            AttentionKind.CAUSAL,
        ),
    ],
)
def test_the_kind_of_attention_follows_from_the_configuration(options: dict[str, Any], kind: AttentionKind) -> None:
    text = SimpleNamespace(**options)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), _supports_attention_backend=True)
    assert module.attention_kind(model) is kind
    model._supports_attention_backend = False
    if kind is AttentionKind.SEGMENTS:
        assert module.attention_kind(model) is AttentionKind.MASKED
