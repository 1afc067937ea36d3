"""What is done to a completion's total reward before it enters any statistic.

total --clip--> --less the penalty for length--> --less beta * KL(policy || reference)--> shaped      None stays None

The order is that of TRL's RLOO: what is taken from a reward is not clipped away again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_ray.algorithms.policy.policy_terms import kl_estimate
from trl_ray.config.losses.policy_options import KLEstimator
from trl_ray.types import SampleScores, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceKL:
    """The divergence from the reference over one completion."""

    total: float
    """Nats, summed over the trained tokens."""
    num_tokens: int
    """Trained tokens."""


def overlong_penalty(length: int, *, max_length: int, buffer: int, factor: float) -> float:
    """DAPO's soft overlong punishment, in [-factor, 0] (https://arxiv.org/abs/2503.14476, eq. 13).

    Args:
        length: tokens of the completion.
        max_length: tokens at which the whole factor is taken.
        buffer: tokens before `max_length` over which the penalty grows evenly.
        factor: the penalty at `max_length`.
    """
    return -factor * min(max(length - (max_length - buffer), 0) / buffer, 1.0)


def sequence_kl(sample: TrainingSample, scores: SampleScores, estimator: KLEstimator) -> SequenceKL:
    """Estimate KL(policy || reference) of a whole completion by the sum of its trained tokens' estimates.

    Only with k1, which TRL's RLOO uses, is the policy gradient of the shaped reward that of reward - beta * KL: part of
    the gradient of the other two flows through the estimate itself, and rewards carry none
    (https://arxiv.org/abs/2506.09477).
    """
    assert scores.reference_logprobs is not None, "a KL needs log-probs of the reference: score with the reference"
    assert len(scores.logprobs) == len(sample.loss_mask), "scores are those of another sample: keep their order"
    # Where nothing is trained the scores hold 0; float64 because hundreds of small terms are added.
    kept = sample.loss_mask
    policy, reference = (torch.from_numpy(s[kept]).double() for s in (scores.logprobs, scores.reference_logprobs))
    return SequenceKL(total=float(kl_estimate(policy, reference, estimator).sum()), num_tokens=int(kept.sum()))


def sequence_kls(
    samples: Sequence[TrainingSample], scores: Sequence[SampleScores], estimator: KLEstimator
) -> list[SequenceKL]:
    """`sequence_kl` of each sample; both sequences in the same order."""
    return [sequence_kl(sample, score, estimator) for sample, score in zip(samples, scores, strict=True)]
