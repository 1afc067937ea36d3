"""What only the weights before the first update can tell of samples, put into the samples.

    samples, SampleScores --with_scores--> samples with old_logprobs, reference_logprobs, surrogate_mask

The driver asks the learner for scores of a whole generation batch, over all ranks; what follows from them is the same
however the batch is cut into updates, micro-batches and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from trl_ray.config.losses.policy_options import LossConfig, OldLogprobs
from trl_ray.types import BoolArray, SampleScores, TrainBatch, TrainingSample

ScoreT = TypeVar("ScoreT")


def needs_first_pass(loss: LossConfig, *, updates_per_step: int) -> bool:
    """Whether samples must be scored before they are trained on.

    So it is for the ratio to the old policy, when several updates are made on one generation batch; for the mask of
    high entropy; and for a KL that is taken from rewards.
    """
    return _keeps_old(loss, updates_per_step) or loss.top_entropy_quantile < 1 or loss.kl_in_reward


def with_scores(
    samples: Sequence[TrainingSample], scores: Sequence[SampleScores], *, loss: LossConfig, updates_per_step: int
) -> list[TrainingSample]:
    """Samples of one generation batch with all that a loss takes from a first pass.

    * `old_logprobs` when several updates are made; with one they would be those of the training pass but for rounding.
    * `reference_logprobs` when the scores have them, so that no update computes them again.
    * `surrogate_mask` when `top_entropy_quantile` is below 1. It stays as it is over all updates.

    Args:
        samples: of all ranks.
        scores: of each sample.
        loss: the objective.
        updates_per_step: optimizer updates made on these samples.
    """
    masks = high_entropy_masks(samples, scores, share=loss.top_entropy_quantile)
    keeps_old = _keeps_old(loss, updates_per_step)
    return [
        dataclasses.replace(
            sample,
            old_logprobs=score.logprobs if keeps_old else None,
            reference_logprobs=score.reference_logprobs,
            surrogate_mask=mask,
        )
        for sample, score, mask in zip(samples, scores, masks, strict=True)
    ]


def in_order(samples: Sequence[TrainingSample], scored: Iterable[tuple[TrainBatch, Sequence[ScoreT]]]) -> list[ScoreT]:
    """The scores of samples, or other answers by sample, however these were cut into batches, ranks and micro-batches.

    Args:
        samples: the same objects that the batches hold.
        scored: batches that hold them all together, each with its scores in its own order.
    """
    # By identity: samples hold arrays, and two of one group may be alike in all of them.
    found = {id(s): score for batch, scores in scored for s, score in zip(batch.samples, scores, strict=True)}
    return [found[id(sample)] for sample in samples]


def high_entropy_masks(
    samples: Sequence[TrainingSample], scores: Sequence[SampleScores], *, share: float
) -> list[BoolArray | None]:
    """True [L] per sample at the trained tokens of highest entropy over all samples (https://arxiv.org/abs/2506.01939).

    The threshold is the (1 - share) quantile of the entropies of all trained tokens, interpolated linearly; tokens at
    the threshold are kept.

    Args:
        samples: of one generation batch.
        scores: of each sample.
        share: of the tokens, in [0, 1]; 0 keeps the highest, 1 gives None for every sample.
    """
    if share >= 1:
        return [None] * len(samples)
    trained = [score.entropy[sample.loss_mask] for sample, score in zip(samples, scores, strict=True)]
    flat = np.concatenate(trained) if trained else np.zeros(0, dtype=np.float32)
    if not flat.size:
        return [np.zeros(len(sample.loss_mask), dtype=np.bool_) for sample in samples]
    # Back in float32, a threshold that falls on a token's entropy is that entropy, whatever float64 rounded.
    threshold = np.float32(np.quantile(flat.astype(np.float64), 1 - share))
    return [
        sample.loss_mask & (score.entropy.astype(np.float32) >= threshold)
        for sample, score in zip(samples, scores, strict=True)
    ]


def _keeps_old(loss: LossConfig, updates_per_step: int) -> bool:
    # With one update the old policy is the current one, and with the sampler as the old policy nobody has to be asked.
    return updates_per_step > 1 and loss.old_logprobs is OldLogprobs.POLICY
