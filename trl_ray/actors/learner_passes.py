"""The passes of one rank over its micro-batches: scores without gradient, or losses with their gradients.

samples --score--> logprobs, entropy [N] --Loss--> scalar --backward--> gradients in the back end
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import Loss, LossInputs, StepTotals, first_non_finite_sample, sample_tokens
from trl_ray.models.backend import Backend
from trl_ray.models.scoring import SampleScorer
from trl_ray.types import FloatArray, Metric, SampleScores, TrainBatch, TrainingSample

Samples = Sequence[TrainingSample]
ReferenceLogprobs = Callable[[Samples], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """Where an update met NaN or infinity."""

    step: int
    quantity: str
    rank: int
    micro_batch: int | None = None
    group_id: int | None = None
    sample: int | None = None
    """Place in its micro-batch."""

    def __str__(self) -> str:
        places = [
            ("rank", self.rank),
            ("micro-batch", self.micro_batch),
            ("group", self.group_id),
            ("sample", self.sample),
        ]
        where = "".join(f", {name} {number}" for name, number in places if number is not None)
        return f"{self.quantity} must be finite, but was not in step {self.step}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What the passes of one rank amount to."""

    loss: float
    metrics: tuple[Mapping[str, Metric], ...]
    problem: NonFinite | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Samples of one micro-batch that take the same kind of pass."""

    samples: Samples
    with_gradient: bool


class Passes:
    """Runs a loss over micro-batches.

    Args:
        scorer: of the policy.
        reference: log-probs [N] of the reference policy; None where there is none.
        loss: what is minimised.
        backend: takes the gradients.
        rank: named in what is told of NaN and infinity.
        device: of the tensors.
        on_progress: called after each pass.
    """

    def __init__(
        self,
        *,
        scorer: SampleScorer,
        reference: ReferenceLogprobs,
        loss: Loss,
        backend: Backend,
        rank: int,
        device: torch.device,
        on_progress: Callable[[], None],
    ) -> None:
        self._scorer, self._reference, self._loss, self._backend = scorer, reference, loss, backend
        self._rank, self._device, self._on_progress = rank, device, on_progress

    def train(self, batch: TrainBatch) -> Passed:
        """Add up the gradients of all micro-batches.

        Where ranks exchange nothing in between, it stops at the first number that is not finite.
        """
        totals, loss = StepTotals.of(batch), 0.0
        metrics: list[Mapping[str, Metric]] = []
        problem: NonFinite | None = None
        for number, samples in enumerate(batch.micro_batches):
            tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
            is_last = number == len(batch.micro_batches) - 1
            for part in self._parts(samples):
                inputs = self._inputs(part, totals, tokens)
                if inputs is None:
                    continue
                output = self._loss(inputs)
                value = float(output.loss.detach())
                problem = problem or self._check(batch.step, number, samples, part, inputs, value)
                if problem is not None and not self._backend.in_step:
                    return Passed(loss=math.nan, metrics=tuple(metrics), problem=problem)
                if part.with_gradient:
                    self._backend.backward(output.loss, is_last=is_last)
                loss += value
                metrics.append(output.metrics)
                self._on_progress()
            if self._backend.in_step and not tokens:
                self._pass_idly(totals, is_last=is_last)
        return Passed(loss=loss, metrics=tuple(metrics), problem=problem)

    def _parts(self, samples: Samples) -> Iterator[_Part]:
        """Samples without gradient still count in the metrics, at a third of the work."""
        if self._backend.in_step:
            yield _Part(samples=samples, with_gradient=True)
            return
        moving = [sample for sample in samples if self._loss.has_gradient(sample)]
        still = [sample for sample in samples if not self._loss.has_gradient(sample)]
        yield _Part(samples=moving, with_gradient=True)
        yield _Part(samples=still, with_gradient=False)

    def _inputs(self, part: _Part, totals: StepTotals, tokens: int) -> LossInputs | None:
        """Everything the loss wants to know of some samples; None when none of their tokens is trained on."""
        with torch.set_grad_enabled(part.with_gradient):
            scores = self._scorer.score(part.samples)
        if scores is None:
            return None
        return LossInputs(
            tokens=sample_tokens(part.samples, device=self._device),
            logprobs=scores.logprobs,
            entropy=scores.entropy,
            reference_logprobs=self._reference_logprobs(part.samples) if self._loss.needs_reference else None,
            micro_batch_tokens=tokens,
            totals=totals,
        )

    def _reference_logprobs(self, samples: Samples) -> Tensor | None:
        """[N] from the first pass where there was one, else now."""
        known = [s.reference_logprobs[s.loss_mask] for s in samples if s.reference_logprobs is not None]
        if len(known) == len(samples):
            return torch.from_numpy(np.concatenate(known)).to(self._device)
        return self._reference(samples)

    def _check(
        self, step: int, micro_batch: int, samples: Samples, part: _Part, inputs: LossInputs, loss: float
    ) -> NonFinite | None:
        bad = first_non_finite_sample(inputs)
        if bad is not None:
            return self._blame(step, "log-probs", micro_batch, samples, part.samples[bad])
        # A loss can be infinite although all that goes into it is finite.
        return None if math.isfinite(loss) else self._blame(step, "the loss", micro_batch, samples, None)

    def _blame(
        self, step: int, quantity: str, micro_batch: int, samples: Samples, sample: TrainingSample | None
    ) -> NonFinite:
        """Name the sample by its place in the micro-batch."""
        if sample is None:
            return NonFinite(step=step, quantity=quantity, rank=self._rank, micro_batch=micro_batch)
        return NonFinite(
            step=step,
            quantity=quantity,
            rank=self._rank,
            micro_batch=micro_batch,
            group_id=sample.group_id,
            sample=next(index for index, candidate in enumerate(samples) if candidate is sample),
        )

    def _pass_idly(self, totals: StepTotals, *, is_last: bool) -> None:
        """A pass that adds nothing: the other ranks wait for this one in every pass.

        It takes the same loss as theirs, because sharded weights are gathered in the order in which gradients flow.
        """
        inputs = self._inputs(_Part(samples=[_PLACEHOLDER], with_gradient=True), totals, 1)
        assert inputs is not None, "the placeholder has a trained token"
        self._backend.backward(0.0 * self._loss(inputs).loss, is_last=is_last)

    def blame_gradient(self, batch: TrainBatch) -> NonFinite | None:
        """Find the sample whose gradient is not finite, by computing them one by one; None where none of them is."""
        totals = StepTotals.of(batch)
        parameters = [p for p in self._backend.module.parameters() if p.requires_grad]
        for number, samples in enumerate(batch.micro_batches):
            tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
            for sample in samples:
                inputs = self._inputs(_Part(samples=[sample], with_gradient=True), totals, tokens)
                if inputs is None or not self._loss.has_gradient(sample):
                    continue
                grads = torch.autograd.grad(self._loss(inputs).loss, parameters, allow_unused=True)
                if not all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None):
                    return self._blame(batch.step, "gradients", number, samples, sample)
        return None

    @torch.no_grad()
    def score(self, batch: TrainBatch, *, with_reference: bool) -> list[SampleScores]:
        """Scores of every sample under the weights as they are, in the order of the batch."""
        answers: list[SampleScores] = []
        for samples in batch.micro_batches:
            scores = self._scorer.score(samples)
            # Where ranks exchange data in each pass, this one must make as many as the others.
            passed = [_PLACEHOLDER] if scores is None and self._backend.in_step else samples
            idle = passed is not samples and self._scorer.score(passed) is not None
            reference = self._reference(passed) if with_reference else None
            answers += _by_sample(samples, scores, None if idle else reference)
            self._on_progress()
        return answers


def _by_sample(samples: Samples, scores: TokenLogprobs | None, reference: Tensor | None) -> list[SampleScores]:
    """Cut token values [N] into samples [L]."""
    logprobs = _spread(samples, None if scores is None else scores.logprobs)
    entropy = _spread(samples, None if scores is None else scores.entropy)
    references = [None] * len(samples) if reference is None else _spread(samples, reference)
    return [
        SampleScores(logprobs=one, entropy=two, reference_logprobs=three)
        for one, two, three in zip(logprobs, entropy, references, strict=True)
    ]


def _spread(samples: Samples, values: Tensor | None) -> list[FloatArray]:
    """Token values [N] to one array [L] per sample, 0 where nothing is trained."""
    flat = np.zeros(0, np.float32) if values is None else values.float().cpu().numpy()
    arrays, start = [], 0
    for sample in samples:
        array = np.zeros(len(sample.loss_mask), dtype=np.float32)
        count = int(sample.loss_mask.sum())
        array[sample.loss_mask] = flat[start : start + count] if flat.size else 0.0
        arrays.append(array)
        start += count
    return arrays


_PLACEHOLDER = TrainingSample(
    group_id=-1,
    prompt_ids=np.array([1], dtype=np.int32),
    completion_ids=np.array([1], dtype=np.int32),
    loss_mask=np.ones(1, dtype=np.bool_),
    sampler_logprobs=np.zeros(1, dtype=np.float32),
    advantage=0.0,
    min_version=0,
)
