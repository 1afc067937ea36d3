"""PolicyLearner: holds the weights that are trained and turns batches into optimizer steps.

    TrainBatch --> for each micro-batch: score, loss, backward --> clip --> AdamW --> schedule --> StepResult
    publish() --> WeightPayload        canary() --> Canary        save() --> step-N/

step:
    consumes: one TrainBatch, whose totals over the whole step are known
    produces: the next weight version, or the same weights under the next version when the step was skipped
    waits for: nothing
    unblocked by: -

It knows no algorithm: a `Loss` says what is minimised.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from trl_ray.algorithms.loss import (
    Loss,
    LossInputs,
    StepTotals,
    first_non_finite_sample,
    sample_tokens,
)
from trl_ray.algorithms.metrics import merge_metrics
from trl_ray.algorithms.policy_loss import PolicyLoss
from trl_ray.config.sections import LossConfig, ModelConfig, NonFinite, TrainingConfig
from trl_ray.errors import CheckpointError, NumericsError
from trl_ray.models.checkpoint import load_trainer_state, save_checkpoint, verify_checkpoint
from trl_ray.models.load import Policy, load_policy, load_tokenizer
from trl_ray.models.optimizer import build_optimizer, build_scheduler
from trl_ray.models.scoring import SampleScorer
from trl_ray.models.weights import export_weights
from trl_ray.types import (
    ActorReport,
    Canary,
    Event,
    EventKind,
    Health,
    IntArray,
    Metric,
    Reduce,
    Span,
    StepResult,
    TrainBatch,
    TrainingSample,
    WeightPayload,
    WeightVersion,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _NonFinite:
    """Where a step met NaN or infinity."""

    step: int
    quantity: str
    micro_batch: int | None = None
    group_id: int | None = None
    sample: int | None = None

    def __str__(self) -> str:
        places = [("micro-batch", self.micro_batch), ("group", self.group_id), ("sample", self.sample)]
        where = "".join(f", {name} {number}" for name, number in places if number is not None)
        return f"{self.quantity} must be finite, but was not in step {self.step}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Accumulated:
    """What the backward passes of a step amount to."""

    loss: float
    metrics: list[Mapping[str, Metric]]
    problem: _NonFinite | None = None


class PolicyLearner:
    """The policy, its optimizer and its schedule; used as::

        learner = PolicyLearner(model=..., training=..., loss=..., temperature=1.0, total_steps=100, ...)
        payload = learner.publish()             # version 0
        result = learner.step(batch)            # result.version == 1
        learner.save("run/checkpoints", step=1, extra={})

    Args:
        model: what to load.
        training: optimizer, schedule, micro-batches, layout.
        loss: the objective; with beta > 0 a frozen copy of the initial policy is loaded too.
        temperature: of sampling; log-probs are those of logits divided by it.
        total_steps: where the schedule ends.
        max_completion_length: the fixed length of dr_grpo.
        checkpoint: a ``step-N`` directory to go on from.
        threads: compute threads; None leaves torch's setting.

    Raises:
        ModelError: the model cannot be used.
        CheckpointError: the checkpoint is damaged.
    """

    name = "learner"

    def __init__(
        self,
        *,
        model: ModelConfig,
        training: TrainingConfig,
        loss: LossConfig,
        temperature: float,
        total_steps: int,
        max_completion_length: int,
        checkpoint: str | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if checkpoint is not None:
            verify_checkpoint(checkpoint)
        torch.manual_seed(training.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._training = training
        self._loss: Loss = PolicyLoss(config=loss, max_completion_length=max_completion_length)
        self._tokenizer = load_tokenizer(model)
        self._model = load_policy(model, path=checkpoint, device=device, disable_dropout=training.disable_dropout)
        self._device = device
        self._scorer = self._make_scorer(self._model, model, temperature)
        self._reference = self._load_reference(model, temperature)
        self._optimizer = build_optimizer(self._model, training)
        self._scheduler = build_scheduler(self._optimizer, training, total_steps=total_steps)
        self._version = 0
        self._checksum: str | None = None
        self._identity: WeightVersion | None = None
        self._skipped_in_a_row = 0
        self._busy_since: float | None = None
        self._progress = 0
        self._spans: list[Span] = []
        self._events: list[Event] = []
        if checkpoint is not None:
            self._restore(checkpoint)

    def _make_scorer(self, policy: Policy, model: ModelConfig, temperature: float) -> SampleScorer:
        return SampleScorer(
            policy,
            share_prompt=self._training.share_prompt,
            temperature=temperature,
            chunk_size=self._training.chunk_lm_head_size,
            bf16=model.bf16,
        )

    def _load_reference(self, model: ModelConfig, temperature: float) -> SampleScorer | None:
        if not self._loss.needs_reference:
            return None
        # Never updated: it needs neither gradients nor their recomputation, and it is not in any checkpoint.
        frozen = load_policy(model.replace(gradient_checkpointing=False), device=self._device, trainable=False)
        return self._make_scorer(frozen, model, temperature)

    @property
    def version(self) -> int:
        """Optimizer steps done, skipped ones included: the number the weights are published under."""
        return self._version

    def step(self, batch: TrainBatch) -> StepResult:
        """Do one optimizer step.

        A step that meets NaN or infinity leaves weights and optimizer as they were and still counts, so that
        versions, steps and the ledger stay aligned.

        Raises:
            NumericsError: NaN or infinity, and `on_non_finite` is ``stop`` or it happened too often in a row.
        """
        assert batch.step == self._version + 1, f"step {batch.step} does not follow version {self._version}"
        started = time.perf_counter()
        with self._busy("step"):
            self._optimizer.zero_grad(set_to_none=True)
            done = self._backward(batch)
            grad_norm = math.nan if done.problem else self._clip()
            problem = done.problem
            if problem is None and not math.isfinite(grad_norm):
                problem = _NonFinite(step=batch.step, quantity="the gradient norm")
            lr = float(self._scheduler.get_last_lr()[0])
            self._update(problem)
            self._version = batch.step
        skipped = problem is not None
        metrics = merge_metrics(done.metrics)
        metrics["tokens/trained"] = Metric(value=0.0 if skipped else float(batch.num_valid_tokens), reduce=Reduce.SUM)
        metrics["learner/skipped_steps"] = Metric(value=float(skipped), reduce=Reduce.SUM)
        return StepResult(
            version=self._version,
            loss=done.loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=skipped,
            metrics=metrics,
            seconds=time.perf_counter() - started,
        )

    def _backward(self, batch: TrainBatch) -> _Accumulated:
        """Accumulate the gradients of all micro-batches; stops at the first that is not finite."""
        totals, loss = StepTotals.of(batch), 0.0
        metrics: list[Mapping[str, Metric]] = []
        for number, samples in enumerate(batch.micro_batches):
            tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
            moving = [sample for sample in samples if self._loss.has_gradient(sample)]
            # Samples without gradient still count in the metrics, at a third of the work.
            still = [sample for sample in samples if not self._loss.has_gradient(sample)]
            for part, with_gradient in ((moving, True), (still, False)):
                inputs = self._forward(part, totals, tokens, with_gradient=with_gradient)
                if inputs is None:
                    continue
                output = self._loss(inputs)
                value = float(output.loss.detach())
                bad = first_non_finite_sample(inputs)
                if bad is not None or not math.isfinite(value):
                    problem = _non_finite(batch.step, number, samples, None if bad is None else part[bad])
                    return _Accumulated(loss=math.nan, metrics=metrics, problem=problem)
                if with_gradient:
                    output.loss.backward()  # type: ignore[no-untyped-call]
                loss += value
                metrics.append(output.metrics)
                self._progress += 1
        return _Accumulated(loss=loss, metrics=metrics)

    def _forward(
        self, samples: Sequence[TrainingSample], totals: StepTotals, tokens: int, *, with_gradient: bool
    ) -> LossInputs | None:
        """Everything the loss wants to know of some samples; None when none of their tokens is trained on."""
        with torch.set_grad_enabled(with_gradient):
            scores = self._scorer.score(samples)
        if scores is None:
            return None
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference.score(samples)
        return LossInputs(
            tokens=sample_tokens(samples, device=self._device),
            logprobs=scores.logprobs,
            entropy=scores.entropy,
            reference_logprobs=None if reference is None else reference.logprobs,
            micro_batch_tokens=tokens,
            totals=totals,
        )

    def _clip(self) -> float:
        """Scale gradients down to the largest allowed norm; returns their norm before."""
        limit = self._training.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        return float(norm)

    def _update(self, problem: _NonFinite | None) -> None:
        """Move the weights, or leave them alone and say why; the schedule moves on either way."""
        if problem is None:
            self._optimizer.step()
            self._checksum = None
            self._skipped_in_a_row = 0
        self._optimizer.zero_grad(set_to_none=True)
        if problem is not None:
            self._skip(problem)
        with warnings.catch_warnings():
            # torch warns when the very first step is one that is skipped.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            self._scheduler.step()

    def _skip(self, problem: _NonFinite) -> None:
        self._skipped_in_a_row += 1
        if self._training.on_non_finite is NonFinite.STOP:
            raise NumericsError(f"{problem}. The weights are as before. Lower learning_rate, or inspect the batch.")
        if self._skipped_in_a_row > self._training.max_skipped_steps:
            raise NumericsError(
                f"{problem}; {self._skipped_in_a_row} steps in a row were skipped, max_skipped_steps allows "
                f"{self._training.max_skipped_steps}. Go on from an earlier checkpoint with a lower learning_rate."
            )
        detail = {"message": f"{problem}; the step was skipped", **asdict(problem)}
        self._events.append(Event(kind=EventKind.WARNING, actor=self.name, time=time.time(), detail=detail))

    def publish(self) -> WeightPayload:
        """Copy the weights out under their Hugging Face names; tied ones appear once."""
        with self._busy("publish"):
            payload = export_weights(list(self._model.named_parameters()), version=self._version)
        self._checksum = payload.identity.checksum
        self._identity = payload.identity
        return payload

    def identity(self) -> WeightVersion:
        """Version and checksum of the weights published last, without the weights."""
        assert self._identity is not None, "weights must be published before their identity is asked for"
        return self._identity

    def canary(self, token_ids: IntArray) -> Canary:
        """Log-probs of a fixed sequence [T] at temperature 1, for engines to be held against."""
        with self._busy("canary"):
            logprobs = self._scorer.sequence_logprobs(token_ids)
        return Canary(token_ids=token_ids, logprobs=logprobs, version=self._version)

    def save(self, directory: str, *, step: int, extra: Mapping[str, bytes]) -> str:
        """Write ``directory/step-N`` with model, tokenizer, optimizer, schedule, random state and `extra` files.

        Returns:
            Its path.

        Raises:
            CheckpointError: it cannot be written.
        """
        assert step == self._version, f"a checkpoint holds the weights as they are: version {self._version}, not {step}"
        state = {
            "version": self._version,
            "skipped_in_a_row": self._skipped_in_a_row,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with self._busy("save"):
            return save_checkpoint(
                directory, step=step, model=self._model, trainer_state=state, tokenizer=self._tokenizer, extra=extra
            )

    def _restore(self, checkpoint: str) -> None:
        state = load_trainer_state(checkpoint)
        try:
            self._optimizer.load_state_dict(state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            self._version, self._skipped_in_a_row = int(state["version"]), int(state["skipped_in_a_row"])
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the trainer state in {checkpoint} must fit this model and optimizer, but: {error}. "
                "Resume with the configuration of the run that wrote it."
            ) from error

    def health(self) -> Health:
        """What the learner is doing; safe to call from another thread while it works."""
        return Health(
            pid=os.getpid(),
            progress=self._progress,
            busy_since=self._busy_since,
            version=self._version,
            checksum=self._checksum,
        )

    def drain(self) -> ActorReport:
        """Spans and events since the last call."""
        events, self._events = self._events, []
        spans, self._spans = self._spans, []
        return ActorReport(events=tuple(events), spans=tuple(spans))

    def close(self) -> None:
        """Nothing is held that the process's end does not free."""
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _busy(self, name: str) -> Iterator[None]:
        self._busy_since = start = time.time()
        try:
            yield
        finally:
            self._busy_since = None
            self._progress += 1
            self._spans.append(Span(actor=self.name, name=name, start=start, end=time.time()))


def _non_finite(
    step: int, micro_batch: int, samples: Sequence[TrainingSample], sample: TrainingSample | None
) -> _NonFinite:
    """Name the sample by its place in the micro-batch; a loss can also be infinite although all samples are finite."""
    if sample is None:
        return _NonFinite(step=step, quantity="the loss", micro_batch=micro_batch)
    place = next(index for index, candidate in enumerate(samples) if candidate is sample)
    return _NonFinite(step=step, quantity="log-probs", micro_batch=micro_batch, group_id=sample.group_id, sample=place)
