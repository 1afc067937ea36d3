"""The passes of one rank over its micro-batches: losses with their gradients or without, or scores.

    samples --score--> what the head says [N] --Loss--> scalar --backward--> gradients in the back end
            --a teacher, where the loss asks for one--^

Where ranks exchange data in each pass, all of them make equally many, of the same kind: one that has nothing to pass
makes idle ones, with samples that stand for any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.batches.labels import precomputed_references
from trl_ray.algorithms.batches.sequences import trained_tokens
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import Loss, LossInputs, LossOutput, StepTotals, first_non_finite_sample, sample_tokens
from trl_ray.algorithms.policy.sampler_agreement import SamplerAgreement
from trl_ray.models.backends.ranks import Ranks
from trl_ray.models.backends.training_backend import TrainingBackend
from trl_ray.models.companions.companion import Companion
from trl_ray.models.companions.taught_scorer import TaughtScorer, TaughtScores
from trl_ray.models.scoring.sample_scorer import ClassScores, SampleScorer
from trl_ray.types import FloatArray, Metric, SampleLabel, SampleScores, TeacherScores, TrainBatch, TrainingSample

Samples = Sequence[TrainingSample]

OF_TEACHER = "the teacher's log-probs"
"""The quantity, where those of the policy are sound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinitePlace:
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
    problem: NonFinitePlace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Samples of one micro-batch that take the same kind of pass."""

    samples: Samples
    with_gradient: bool


class Passes:
    """Runs a loss over micro-batches.

    Args:
        scorer: of the policy.
        reference: the policy that this one is compared with; None where none is held.
        loss: what is minimised.
        backend: takes the gradients.
        ranks: this one is named in what is told of NaN and infinity.
        device: of the tensors.
        on_progress: called after each pass.
        teacher: the one that the learner holds; None where samples come with what teachers said, or without.
        clip_bounds: importance ratios beyond which a token counts as far off.
    """

    def __init__(
        self,
        *,
        scorer: SampleScorer,
        reference: Companion | None,
        loss: Loss,
        backend: TrainingBackend,
        ranks: Ranks,
        device: torch.device,
        on_progress: Callable[[], None],
        teacher: Companion | None = None,
        clip_bounds: tuple[float, float] = (0.8, 1.2),
    ) -> None:
        self._scorer, self._reference, self._loss, self._backend = scorer, reference, loss, backend
        self._ranks, self._device, self._on_progress = ranks, device, on_progress
        self._needs, self._clip_bounds = loss.needs, clip_bounds
        self._taught: TaughtScorer | None = None
        if self._needs.teacher is not None:
            self._taught = TaughtScorer(
                scorer, needs=self._needs.teacher, teacher=teacher, in_step=backend.in_step, device=device
            )

    def train(self, batch: TrainBatch, *, has_moved: bool = False) -> Passed:
        """Add up the gradients of all micro-batches.

        Where ranks exchange nothing in between, it stops at the first number that is not finite.

        Args:
            batch: what is trained on.
            has_moved: whether another update of the same step has changed the weights already.
        """
        totals, loss = StepTotals.of(batch), 0.0
        agreement = SamplerAgreement(
            version=batch.step - 1, has_moved=has_moved, bounds=self._clip_bounds, device=self._device
        )
        asks_reference = self._asks_reference(batch)
        metrics: list[Mapping[str, Metric]] = []
        problem: NonFinitePlace | None = None
        for number, samples in enumerate(batch.micro_batches):
            tokens = trained_tokens(samples)
            is_last = number == len(batch.micro_batches) - 1
            for part in self._parts(samples):
                inputs = self._inputs(part, totals, tokens, asks_reference=asks_reference)
                if inputs is None:
                    continue
                output = self._with_aux_loss(self._loss(inputs), totals)
                agreement.add(inputs)
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
                # The same loss as theirs, because sharded weights are gathered in the order in which gradients flow.
                idle = self._idle(totals, with_gradient=True, asks_reference=asks_reference)
                self._backend.backward(0.0 * idle.loss, is_last=is_last)
        metrics.append(agreement.metrics())
        return Passed(loss=loss, metrics=tuple(metrics), problem=problem)

    @torch.no_grad()
    def evaluate(self, batch: TrainBatch) -> Passed:
        """The losses of all micro-batches, and nothing else; what is not finite is not looked for."""
        totals, loss = StepTotals.of(batch), 0.0
        asks_reference = self._asks_reference(batch)
        metrics: list[Mapping[str, Metric]] = []
        for samples in batch.micro_batches:
            part, tokens = _Part(samples=samples, with_gradient=False), trained_tokens(samples)
            inputs = self._inputs(part, totals, tokens, asks_reference=asks_reference)
            if inputs is not None:
                output = self._loss(inputs)
                loss += float(output.loss)
                metrics.append(output.metrics)
            elif self._backend.in_step:
                self._idle(totals, with_gradient=False, asks_reference=asks_reference)
            self._on_progress()
        return Passed(loss=loss, metrics=tuple(metrics))

    def _asks_reference(self, batch: TrainBatch) -> bool:
        """Whether passes over the reference are made: not where all samples know already what it says.

        Where ranks exchange data in each pass, those of all ranks; collective then.
        """
        if not self._needs.reference:
            return False
        known = all(sample.reference_logprobs is not None for sample in batch.samples)
        known = known or precomputed_references(batch.samples) is not None
        return not all(self._ranks.gather(known) if self._backend.in_step else [known])

    def _with_aux_loss(self, output: LossOutput, totals: StepTotals) -> LossOutput:
        """The loss with that of the routers of the same pass, a mean over micro-batches."""
        routers = self._scorer.routers
        aux = None if routers is None else routers.take()
        if routers is None or aux is None:
            return output
        loss = output.loss + routers.coefficient * aux / max(totals.num_micro_batches, 1)
        return LossOutput(loss=loss, metrics={**output.metrics, "aux_loss": Metric(value=float(aux.detach()))})

    def _parts(self, samples: Samples) -> Iterator[_Part]:
        """Samples without gradient still count in the metrics, at a third of the work."""
        # Routers learn from every token.
        if self._backend.in_step or self._scorer.routers is not None:
            yield _Part(samples=samples, with_gradient=True)
            return
        moving = [sample for sample in samples if self._loss.has_gradient(sample)]
        still = [sample for sample in samples if not self._loss.has_gradient(sample)]
        yield _Part(samples=moving, with_gradient=True)
        yield _Part(samples=still, with_gradient=False)

    def _inputs(self, part: _Part, totals: StepTotals, tokens: int, *, asks_reference: bool) -> LossInputs | None:
        """Everything the loss wants to know of some samples; None when none of their tokens is trained on."""
        routers = self._scorer.routers if part.with_gradient else None
        with torch.set_grad_enabled(part.with_gradient), nullcontext() if routers is None else routers.listening():
            found = (self._taught or self._scorer).score(part.samples)
        if found is None:
            return None
        scores = found.student if isinstance(found, TaughtScores) else found
        return LossInputs(
            samples=part.samples,
            tokens=sample_tokens(part.samples, device=self._device),
            scores=scores if isinstance(scores, TokenLogprobs) else None,
            class_logits=scores.logits if isinstance(scores, ClassScores) else None,
            reference_logprobs=self._ask_reference(part.samples) if asks_reference else self._known(part.samples),
            teacher=found.teacher if isinstance(found, TaughtScores) else None,
            micro_batch_tokens=tokens,
            totals=totals,
        )

    def _ask_reference(self, samples: Samples) -> Tensor | None:
        """[N]"""
        return None if self._reference is None else self._reference.logprobs(samples)

    def _known(self, samples: Samples) -> Tensor | None:
        """What a first pass found the reference to say [N]; None where there was none."""
        known = [s.reference_logprobs[s.loss_mask] for s in samples if s.reference_logprobs is not None]
        return torch.from_numpy(np.concatenate(known)).to(self._device) if len(known) == len(samples) else None

    def _idle(self, totals: StepTotals, *, with_gradient: bool, asks_reference: bool) -> LossOutput:
        """A pass that stands for none: the other ranks wait for this one in every pass."""
        part = _Part(samples=_STAND_INS, with_gradient=with_gradient)
        inputs = self._inputs(part, totals, len(_STAND_INS), asks_reference=asks_reference)
        assert inputs is not None, "the stand-ins have trained tokens"
        return self._loss(inputs)

    def _check(
        self, step: int, micro_batch: int, samples: Samples, part: _Part, inputs: LossInputs, loss: float
    ) -> NonFinitePlace | None:
        bad = first_non_finite_sample(inputs)
        if bad is not None:
            is_teachers = first_non_finite_sample(replace(inputs, teacher=None)) is None
            quantity = OF_TEACHER if is_teachers else "log-probs"
            return self._blame(step, quantity, micro_batch, samples, part.samples[bad])
        # A loss can be infinite although all that goes into it is finite.
        return None if math.isfinite(loss) else self._blame(step, "the loss", micro_batch, samples, None)

    def _blame(
        self, step: int, quantity: str, micro_batch: int, samples: Samples, sample: TrainingSample | None
    ) -> NonFinitePlace:
        """Name the sample by its place in the micro-batch."""
        if sample is None:
            return NonFinitePlace(step=step, quantity=quantity, rank=self._ranks.rank, micro_batch=micro_batch)
        return NonFinitePlace(
            step=step,
            quantity=quantity,
            rank=self._ranks.rank,
            micro_batch=micro_batch,
            group_id=sample.group_id,
            sample=next(index for index, candidate in enumerate(samples) if candidate is sample),
        )

    def blame_gradient(self, batch: TrainBatch) -> NonFinitePlace | None:
        """Find the sample whose gradient is not finite, by computing them one by one; None where none of them is.

        Where a loss compares the samples of a group it is the group that is found.
        """
        totals, asks_reference = StepTotals.of(batch), self._asks_reference(batch)
        parameters = [p for p in self._backend.module.parameters() if p.requires_grad]
        for number, samples in enumerate(batch.micro_batches):
            tokens = trained_tokens(samples)
            for unit in self._units(samples):
                part = _Part(samples=unit, with_gradient=True)
                inputs = self._inputs(part, totals, tokens, asks_reference=asks_reference)
                if inputs is None or not any(self._loss.has_gradient(sample) for sample in unit):
                    continue
                grads = torch.autograd.grad(self._loss(inputs).loss, parameters, allow_unused=True)
                if not all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None):
                    found = self._blame(batch.step, "gradients", number, samples, unit[0])
                    return found if len(unit) == 1 else replace(found, sample=None)
        return None

    def _units(self, samples: Samples) -> list[Samples]:
        """The fewest samples that the loss can be asked about."""
        if not self._needs.whole_groups:
            return [[sample] for sample in samples]
        return [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.group_id)]

    @torch.no_grad()
    def score(self, batch: TrainBatch) -> list[SampleScores]:
        """Scores of every sample under the weights as they are, in the order of the batch."""
        answers: list[SampleScores] = []
        for samples in batch.micro_batches:
            passed = self._passed(samples)
            scores = self._scorer.score(passed)
            assert not isinstance(scores, ClassScores), "a classifier has no log-probs of tokens"
            reference = self._ask_reference(passed) if self._needs.reference else None
            answers += _by_sample(samples, scores, reference) if passed is samples else _by_sample(samples, None, None)
            self._on_progress()
        return answers

    @torch.no_grad()
    def reference_logprobs(self, batch: TrainBatch, *, reference: Companion) -> list[FloatArray]:
        """Log-probs [L] of every sample under a reference, 0 where nothing is trained, in the order of the batch."""
        answers: list[FloatArray] = []
        for samples in batch.micro_batches:
            passed = self._passed(samples)
            found = reference.logprobs(passed)
            answers += _spread(samples, found if passed is samples else None)
            self._on_progress()
        return answers

    def _passed(self, samples: Samples) -> Samples:
        """What a micro-batch passes: stand-ins where it has nothing to pass and other ranks wait."""
        return _STAND_INS if self._backend.in_step and not trained_tokens(samples) else samples


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


def _stand_in() -> TrainingSample:
    half = np.full(1, math.log(0.5), dtype=np.float32)
    return TrainingSample(
        group_id=-1,
        prompt_ids=np.array([1], dtype=np.int32),
        completion_ids=np.array([1], dtype=np.int32),
        loss_mask=np.ones(1, dtype=np.bool_),
        sampler_logprobs=np.zeros(1, dtype=np.float32),
        reference_logprobs=np.zeros(1, dtype=np.float32),
        teacher=TeacherScores(
            teacher="",
            version=None,
            logprobs=half,
            top_ids=np.array([[1]], dtype=np.int32),
            top_logprobs=half[:, None],
            tail=half,
        ),
        label=SampleLabel(desirable=True, steps=np.ones(1, dtype=np.bool_)),
    )


_STAND_INS = (_stand_in(), _stand_in())
"""Samples that every loss can take: two of one group, with whatever labels and teachers there are."""
