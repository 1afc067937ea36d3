"""What a learner asks of an objective: per-token tensors of one micro-batch in, a scalar and metrics out.

    samples of a micro-batch --> model --> LossInputs [N tokens] --> Loss --> LossOutput --> backward
    samples of an update --> totals: denominators by name        metrics of an update --> joined, after_update

Only tokens that are trained on appear, one after the other, without padding: N is their number over all samples
of the micro-batch. The learner adds up the scalars of the micro-batches of a step; a loss divides by totals of the
whole step itself, so that how a step is cut into micro-batches (or ranks) changes nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds, TeacherSignal
from trl_ray.algorithms.head.logprobs import TokenLogprobs
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
    whole_groups: bool = False
    """Samples of one group are compared with each other, so that none of them is passed without the others."""
    teacher: TeacherNeeds | None = None
    """What is asked of a teacher, be it one that the learner holds or one that has scored the samples; None: there is
    none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Denominators of one optimizer step, over all micro-batches and ranks."""

    num_valid_tokens: int
    num_samples: int
    num_micro_batches: int
    num_surrogate_tokens: int | None = None
    """Tokens that no surrogate mask leaves out; None: there are no such masks."""
    named: Mapping[str, float] = field(default_factory=dict)
    """Those that `Loss.totals` names, and what else a first pass found out."""

    @classmethod
    def of(cls, batch: TrainBatch) -> StepTotals:
        """The totals a batch carries."""
        return cls(
            num_valid_tokens=batch.num_valid_tokens,
            num_samples=batch.num_samples,
            num_micro_batches=batch.num_micro_batches,
            num_surrogate_tokens=batch.num_surrogate_tokens,
            named=batch.totals,
        )

    def count(self, name: str) -> int:
        """A denominator that the loss asked for; at least 1."""
        assert name in self.named, f"the totals of the update must have {name}, but have {sorted(self.named)}"
        return max(int(self.named[name]), 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleTokens(TokenSequences):
    """What is known of the N trained tokens of B samples before the model runs; a sample may have none."""

    advantages: Tensor
    """[N] float32, of the token's sample."""
    sampler_logprobs: Tensor | None = None
    """[N] float32; None for what was not sampled but comes from a dataset."""
    old_logprobs: Tensor | None = None
    """[N] float32 of the weights before the first update on these samples; None: the current ones."""
    surrogate_mask: Tensor | None = None
    """[N] bool, False where only denominators and the KL count a token; None: all True."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """One micro-batch as an objective sees it."""

    samples: Sequence[TrainingSample] = ()
    """[B] for what only they know: labels, and what belongs together."""
    tokens: SampleTokens
    scores: TokenLogprobs | None = None
    """[N] what the policy's language-model head says at the temperature of the run, with gradient; None with a head of
    another kind."""
    class_logits: Tensor | None = None
    """[N, C] float32 of a classifying head, read at the token before each trained one; None with a language-model
    head."""
    reference_logprobs: Tensor | None = None
    """[N] float32 of the reference policy; None unless the loss asks for them."""
    teacher: TeacherSignal | None = None
    """[N] as `LossNeeds.teacher` asks; None without. Something finite that moves nothing where no teacher was asked."""
    micro_batch_tokens: int
    """Trained tokens of the whole micro-batch, of which these may be a part."""
    totals: StepTotals

    @property
    def language(self) -> TokenLogprobs:
        """What a language-model head says; losses of tokens start from it."""
        assert self.scores is not None, "this loss needs a language-model head"
        return self.scores

    @property
    def logprobs(self) -> Tensor:
        """[N] float32 of the policy, with gradient."""
        return self.language.logprobs

    @property
    def entropy(self) -> Tensor:
        """[N] float32, with gradient."""
        return self.language.entropy

    @property
    def taught(self) -> TeacherSignal:
        """What a teacher says; losses of distillation start from it."""
        assert self.teacher is not None, "this loss needs a teacher"
        return self.teacher

    @property
    def sampler_logprobs(self) -> Tensor:
        """[N] float32; losses of sampled completions start from it."""
        assert self.tokens.sampler_logprobs is not None, "this loss needs samples with the sampler's log-probs"
        return self.tokens.sampler_logprobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """The contribution of one micro-batch to the loss of the step."""

    loss: Tensor
    """Scalar, already divided by the totals of the step: the learner only adds."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Loss(Protocol):
    """An objective over the tokens of a micro-batch."""

    @property
    def needs(self) -> LossNeeds:
        """What it asks of the model."""
        ...

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        """Denominators that it reads from `StepTotals.named`, beside those that every batch has.

        Args:
            samples: of the whole update, all ranks.
        """
        ...

    def has_gradient(self, sample: TrainingSample) -> bool:
        """False when this sample's gradient is exactly 0, so that the learner may skip its backward pass."""
        ...

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The micro-batch's loss and metrics."""
        ...

    def joined(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Metrics to add that follow from those of a whole update or evaluation, all ranks."""
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


class FixedLoss:
    """The parts of the `Loss` protocol that are the same for losses that never adapt and train on every sample."""

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        """None beside those that every batch has."""
        del samples
        return {}

    def has_gradient(self, sample: TrainingSample) -> bool:
        """Always."""
        del sample
        return True

    def joined(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Nothing."""
        del metrics
        return {}

    def after_update(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Nothing adapts."""
        del metrics
        return {}

    def state_dict(self) -> dict[str, float]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """There is none.

        Raises:
            ValueError: a loss that adapts has saved one.
        """
        if state:
            raise ValueError(f"this loss has no state, but was given {sorted(state)}")


def sample_tokens(samples: Sequence[TrainingSample], *, device: torch.device | str = "cpu") -> SampleTokens:
    """Concatenate the trained tokens of samples, in order."""
    counts = np.array([int(sample.loss_mask.sum()) for sample in samples], dtype=np.int64)
    advantages = np.repeat(np.array([sample.advantage for sample in samples], dtype=np.float64), counts)
    sampled = _stream(samples, [sample.sampler_logprobs for sample in samples], device)
    return SampleTokens(
        sample_index=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)).to(device),
        num_sequences=len(samples),
        advantages=torch.from_numpy(advantages.astype(np.float32)).to(device),
        sampler_logprobs=None if sampled is None else sampled.float(),
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


def first_non_finite_sample(inputs: LossInputs) -> int | None:
    """Index of the first sample with NaN or infinity in what the loss is made of; None when all is finite."""
    tokens = inputs.tokens
    parts = [tokens.advantages, tokens.sampler_logprobs, tokens.old_logprobs, inputs.reference_logprobs]
    if inputs.scores is not None:
        parts += [inputs.scores.logprobs, inputs.scores.mean_logprobs]
    if inputs.class_logits is not None:
        parts.append(inputs.class_logits.sum(dim=1))
    bad = ~torch.isfinite(torch.stack([part.detach().float() for part in parts if part is not None])).all(dim=0)
    if inputs.teacher is not None:
        bad |= inputs.teacher.bad_tokens()
    found = [int(tokens.sample_index[bad][0])] if bool(bad.any()) else []
    found += [place for place, sample in enumerate(inputs.samples) if not _has_finite_label(sample)]
    return min(found, default=None)


def _has_finite_label(sample: TrainingSample) -> bool:
    label = sample.label
    return label is None or all(value is None or math.isfinite(value) for value in (label.margin, label.reference))
