"""Samples that teachers see behind another prompt, and what models say of them in whole logits.

taught_samples --> TrainingSample x 8: four groups of two; every third one is not distilled
log_softmax_at(model, samples) --> [N,V]      said(model, samples) --> samples with that teacher's scores
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_ray.types import TeacherScores, TrainBatch, TrainingSample

TEMPERATURE = 0.9


def taught_samples(seed: int, *, hinted: bool = True, vocab: int = 250) -> list[TrainingSample]:
    """Eight completions of 2 to 7 tokens, one of which is not trained on in each.

    Args:
        seed: of everything.
        hinted: teachers see a longer prompt, and learn nothing new of every third sample; else all see the student's.
        vocab: ids are below it.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(8):
        if number % 2 == 0:
            prompt = rng.integers(0, vocab, 3 + number % 4).astype(np.int32)
        length = int(rng.integers(2, 8))
        mask = np.ones(length, dtype=bool)
        mask[number % (length - 1)] = False
        hint = rng.integers(0, vocab, 2 + number % 3).astype(np.int32)
        is_distilled = not hinted or number % 3 != 2
        made.append(
            TrainingSample(
                group_id=number // 2,
                prompt_ids=prompt,
                completion_ids=rng.integers(0, vocab, length).astype(np.int32),
                loss_mask=mask,
                sampler_logprobs=rng.normal(-6, 1, length).astype(np.float32),
                advantage=float(rng.normal()),
                teacher_prompt_ids=np.concatenate([hint, prompt]) if hinted and is_distilled else None,
                is_distilled=is_distilled,
            )
        )
    return made


def batch_of(samples: Sequence[TrainingSample], *, step: int = 1, size: int = 8) -> TrainBatch:
    """One update in micro-batches of `size` samples."""
    cut = tuple(tuple(samples[start : start + size]) for start in range(0, len(samples), size))
    return TrainBatch(
        step=step,
        micro_batches=cut,
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for sample in samples),
        num_samples=len(samples),
        num_micro_batches=len(cut),
    )


def row_logits(model: Any, sample: TrainingSample, *, in_context: bool = False) -> Tensor:
    """[L, V] logits that predict each token of the completion, before any temperature."""
    prompt = sample.prompt_ids
    if in_context and sample.teacher_prompt_ids is not None:
        prompt = sample.teacher_prompt_ids
    ids = torch.from_numpy(np.concatenate([prompt, sample.completion_ids]).astype(np.int64))[None]
    logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits


def log_softmax_at(
    model: Any, samples: Sequence[TrainingSample], *, in_context: bool = False, temperature: float = TEMPERATURE
) -> Tensor:
    """[N, V] at the trained tokens."""
    rows = [row_logits(model, s, in_context=in_context)[torch.from_numpy(s.loss_mask)] for s in samples]
    return (torch.cat(rows) / temperature).log_softmax(-1)


def own_ids(samples: Sequence[TrainingSample]) -> Tensor:
    """[N]"""
    return torch.from_numpy(np.concatenate([s.completion_ids[s.loss_mask] for s in samples]).astype(np.int64))


def distilled(samples: Sequence[TrainingSample]) -> Tensor:
    """[N] bool"""
    counts = torch.tensor([int(sample.loss_mask.sum()) for sample in samples])
    return torch.tensor([sample.is_distilled for sample in samples]).repeat_interleave(counts)


@torch.no_grad()
def said(model: Any, samples: Sequence[TrainingSample], *, top_k: int = 0, tail: bool = False) -> list[TrainingSample]:
    """The samples as a teacher in an actor has scored those that are distilled."""
    return [_said(model, sample, top_k, tail) if sample.is_distilled else sample for sample in samples]


def _said(model: Any, sample: TrainingSample, top_k: int, tail: bool) -> TrainingSample:
    logs = (row_logits(model, sample, in_context=True) / TEMPERATURE).log_softmax(-1)
    own = logs.gather(-1, torch.from_numpy(sample.completion_ids.astype(np.int64))[:, None])[:, 0]
    top = logs.topk(top_k, dim=-1) if top_k else None
    scores = TeacherScores(
        teacher="ours",
        version=0,
        logprobs=own.numpy(),
        top_ids=None if top is None else top.indices.numpy().astype(np.int32),
        top_logprobs=None if top is None else top.values.numpy(),
        tail=torch.log1p(-top.values.exp().sum(-1)).numpy() if top is not None and tail else None,
    )
    return replace(sample, teacher=scores)
