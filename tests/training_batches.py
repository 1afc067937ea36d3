"""Batches that learners of any number of ranks are given in tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trl_ray.types import TrainBatch, TrainingSample


def samples(seed: int) -> list[TrainingSample]:
    """Eight completions of 1 to 9 tokens, of prompts of 3 to 6 tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(8):
        length = int(rng.integers(1, 10))
        made.append(
            TrainingSample(
                group_id=number,
                prompt_ids=rng.integers(0, 250, 3 + number % 4).astype(np.int32),
                completion_ids=rng.integers(0, 250, length).astype(np.int32),
                loss_mask=np.ones(length, dtype=bool),
                sampler_logprobs=rng.normal(-6, 1, length).astype(np.float32),
                advantage=float(rng.normal()),
                min_version=0,
            )
        )
    return made


def batch(step: int, *, size: int, chosen: Sequence[TrainingSample] | None = None) -> TrainBatch:
    """All ranks' micro-batches of `size` samples."""
    chosen = samples(step) if chosen is None else chosen
    cut = tuple(tuple(chosen[i : i + size]) for i in range(0, len(chosen), size))
    return TrainBatch(
        step=step,
        micro_batches=cut,
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for sample in chosen),
        num_samples=len(chosen),
        num_micro_batches=len(cut),
    )
