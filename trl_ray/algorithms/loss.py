"""What a learner asks of an objective: per-token tensors of one micro-batch in, a scalar and metrics out.

    samples of a micro-batch --> model --> LossInputs [N tokens] --> Loss --> LossOutput --> backward

Only tokens that are trained on appear, one after the other, without padding: N is their number over all samples
of the micro-batch. The learner adds up the scalars of the micro-batches of a step; a loss divides by totals of the
whole step itself, so that how a step is cut into micro-batches (or ranks) changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trl_ray.types import Metric, TrainBatch, TrainingSample


class HeadKind(enum.Enum):
    """What stands on top of the model."""

    LANGUAGE = "language"
    """The language-model head: log-probs of the next token."""
    SEQUENCE = "sequence"
    """One number for what has been read so far: a reward model."""
    STEPS = "steps"
    """Two logits, of wrong and right, for what has been read so far: a process reward model."""

    @property
    def num_labels(self) -> int:
        """Outputs C of a classifying head."""
        assert self is not HeadKind.LANGUAGE, "a language-model head has no labels"
        return 1 if self is HeadKind.SEQUENCE else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LossNeeds:
    """What a loss asks of the model, so that nothing else is computed or held."""

    head: HeadKind = HeadKind.LANGUAGE
    reference: bool = False
    """A reference policy must be held, for the training pass or for a first pass before it."""
    sum_squared_probs: bool = False
    top1: bool = False
    mean_logprobs: bool = False
    """The mean log-prob over the vocabulary at each trained token."""
    embedding_noise: float | None = None
    """NEFTune's alpha: noise on embeddings in training passes; None is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Denominators of one optimizer step, over all micro-batches and ranks."""

    num_valid_tokens: int
    num_samples: int
    num_micro_batches: int
    num_surrogate_tokens: int | None = None
    """Tokens that no surrogate mask leaves out; None: there are no such masks."""

    @classmethod
    def of(cls, batch: TrainBatch) -> StepTotals:
        """The totals a batch carries."""
        return cls(
            num_valid_tokens=batch.num_valid_tokens,
            num_samples=batch.num_samples,
            num_micro_batches=batch.num_micro_batches,
            num_surrogate_tokens=batch.num_surrogate_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleTokens:
    """What is known of the N trained tokens of B samples before the model runs."""

    sample_index: Tensor
    """[N] int64, which of the B samples a token belongs to; counts up."""
    sampler_logprobs: Tensor
    """[N] float32"""
    advantages: Tensor
    """[N] float32, of the token's sample."""
    counts: Tensor
    """[B] float32 trained tokens of each sample; 0 for a masked one."""
    old_logprobs: Tensor | None = None
    """[N] float32 of the weights before the first update on these samples; None: the current ones."""
    surrogate_mask: Tensor | None = None
    """[N] bool, False where only denominators and the KL count a token; None: all True."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """One micro-batch as an objective sees it."""

    tokens: SampleTokens
    logprobs: Tensor
    """[N] float32 of the policy at the sampling temperature, with gradient."""
    entropy: Tensor
    """[N] float32, with gradient."""
    reference_logprobs: Tensor | None
    """[N] float32 of the reference policy; None unless the loss asks for them."""
    micro_batch_tokens: int
    """Trained tokens of the whole micro-batch, of which these may be a part."""
    totals: StepTotals


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """The contribution of one micro-batch to the loss of the step."""

    loss: Tensor
    """Scalar, already divided by the totals of the step: the learner only adds."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Loss(Protocol):
    """An objective over the tokens of a micro-batch."""

    @property
    def needs_reference(self) -> bool:
        """True when a reference policy must be held, for the training pass or for a first pass before it."""
        ...

    def has_gradient(self, sample: TrainingSample) -> bool:
        """False when this sample's gradient is exactly 0, so that the learner may skip its backward pass."""
        ...

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The micro-batch's loss and metrics."""
        ...

    def after_update(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Adapt to what an update showed.

        Args:
            metrics: of the whole update, all ranks.

        Returns:
            Metrics to add.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """What `after_update` has changed so far; empty where nothing adapts."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        ...


def sample_tokens(samples: Sequence[TrainingSample], *, device: torch.device | str = "cpu") -> SampleTokens:
    """Concatenate the trained tokens of samples, in order."""
    counts = np.array([int(sample.loss_mask.sum()) for sample in samples], dtype=np.int64)
    logprobs = [
        # What a dataset gives was sampled by nobody; its objectives do not look.
        np.zeros(count) if sample.sampler_logprobs is None else sample.sampler_logprobs[sample.loss_mask]
        for sample, count in zip(samples, counts, strict=True)
    ]
    flat = np.concatenate(logprobs) if logprobs else np.zeros(0)
    advantages = np.repeat(np.array([sample.advantage for sample in samples], dtype=np.float64), counts)
    return SampleTokens(
        sample_index=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)).to(device),
        sampler_logprobs=torch.from_numpy(flat.astype(np.float32)).to(device),
        advantages=torch.from_numpy(advantages.astype(np.float32)).to(device),
        counts=torch.from_numpy(counts.astype(np.float32)).to(device),
        old_logprobs=_stream(samples, [sample.old_logprobs for sample in samples], device),
        surrogate_mask=_stream(samples, [sample.surrogate_mask for sample in samples], device),
    )


def _stream(samples: Sequence[TrainingSample], values: Sequence[Any], device: torch.device | str) -> Tensor | None:
    """Join per-token values [L] of samples at their trained tokens [N]; all samples have them, or none does."""
    if all(value is None for value in values):
        return None
    assert all(value is not None for value in values), "all samples of a micro-batch carry a stream, or none does"
    parts = [value[sample.loss_mask] for value, sample in zip(values, samples, strict=True)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def sum_per_sample(values: Tensor, tokens: SampleTokens) -> Tensor:
    """Sums [B] of token values [N] by sample."""
    return values.new_zeros(tokens.counts.shape[0]).index_add(0, tokens.sample_index, values)


def first_non_finite_sample(inputs: LossInputs) -> int | None:
    """Index of the first sample with NaN or infinity in what the loss is made of; None when all is finite."""
    tokens = inputs.tokens
    parts = [
        inputs.logprobs,
        tokens.sampler_logprobs,
        tokens.advantages,
        tokens.old_logprobs,
        inputs.reference_logprobs,
    ]
    bad = ~torch.isfinite(torch.stack([part.detach() for part in parts if part is not None])).all(dim=0)
    return int(tokens.sample_index[bad][0]) if bool(bad.any()) else None
