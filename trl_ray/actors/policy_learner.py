"""PolicyLearner: holds the weights that are trained and turns batches into optimizer updates; one rank of several.

    TrainBatch --> Passes: score, loss, backward --> back end: sum over ranks, clip, AdamW --> StepResult
    evaluate(batch) --> Evaluation     score(batch), reference_logprobs(batch) --> what a first pass tells
    predict(batches) --> PredictedBatch, for metrics of the user's own
    publish() --> WeightPayload        weight_check() --> WeightCheck        save() --> step-N/

step:
    consumes: one TrainBatch, whose totals over the whole update are known
    produces: the next weight version, or the same weights under the next version when the step was skipped
    waits for: the other ranks, where there are any
    unblocked by: their calls of the same method

It knows no algorithm: a `Loss` says what is minimised, and what head the model has. With several ranks every method but
`health`, `drain` and `identity` is called on all of them, with each one's share of the batch; the answers of rank 0
count.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trl_ray.actors.actor_log import ActorLog
from trl_ray.actors.learner_passes import OF_TEACHER, NonFinitePlace, Passed, Passes
from trl_ray.actors.random_state import compute_deterministically, keep_random_state, random_state, set_random_state
from trl_ray.algorithms.loss import HeadKind, Loss
from trl_ray.algorithms.loss_registry import build_loss, resolve_options
from trl_ray.algorithms.metric_merging import merge_metrics
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.sections import ModelConfig, NonFinite, TrainingConfig
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.errors import CheckpointError, NumericsError
from trl_ray.models.adapters.merging import merged_weights
from trl_ray.models.backends.ranks import SOLO, Ranks, free_address, join_ranks, leave_ranks
from trl_ray.models.backends.torch_backend import TorchBackend
from trl_ray.models.backends.training_backend import TrainingBackend
from trl_ray.models.checkpoint import (
    ONLY_MODEL,
    begin_checkpoint,
    finish_checkpoint,
    load_trainer_state,
    partial_path,
    verify_checkpoint,
)
from trl_ray.models.companions.companion import Companion
from trl_ray.models.companions.reference import build_reference
from trl_ray.models.companions.resident_teacher import build_resident_teacher
from trl_ray.models.policy_loading import load_policy, load_tokenizer
from trl_ray.models.scoring.classifier import ClassifierModule, load_classifier, load_classifier_tokenizer
from trl_ray.models.scoring.predictor import Predictor, Preprocess
from trl_ray.models.scoring.router_loss import router_loss
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.models.scoring.scoring_module import PredictorModule
from trl_ray.models.weight_payload import build_manifest, export_weights
from trl_ray.types import (
    ActorReport,
    Evaluation,
    EventKind,
    FloatArray,
    Health,
    IntArray,
    Metric,
    PredictedBatch,
    PredictionBatch,
    Reduce,
    SampleScores,
    StepResult,
    TensorEntry,
    TrainBatch,
    WeightCheck,
    WeightPayload,
    WeightVersion,
    steady_time,
)


class PolicyLearner:
    """The policy, its optimizer and its schedule; used as::

        learner = PolicyLearner(model=..., training=..., loss=..., temperature=1.0, total_updates=100, ...)
        payload = learner.publish()             # version 0
        result = learner.step(batch)            # result.version == 1
        learner.save("run/checkpoints", step=1, extra={})

    Args:
        model: what to load.
        training: optimizer, schedule, micro-batches, layout, back end.
        loss: the options of the objective. It decides on the head: of a language model, or of a reward model. Where it
            asks for one, a reference is held too.
        temperature: of sampling; log-probs are those of logits divided by it.
        total_updates: where the schedule ends.
        max_completion_length: the fixed length of dr_grpo; nothing else reads it.
        teacher: one that this learner is to hold, if its loss asks for a teacher; None where samples come with what
            teachers in actors said.
        checkpoint: a ``step-N`` directory to go on from.
        threads: compute threads; None leaves torch's setting.
        preprocess_logits: what `predict` keeps of the logits, as TRL's `preprocess_logits_for_metrics`; None: all.
        rank, num_ranks: its place among those that train together; they must `join` before anything else.
        collective_timeout_s: for one exchange between them.

    Raises:
        ModelError: the model cannot be used.
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        training: TrainingConfig,
        loss: LossSection,
        temperature: float = 1.0,
        total_updates: int,
        max_completion_length: int | None = None,
        teacher: TeacherSource | None = None,
        checkpoint: str | None = None,
        threads: int | None = None,
        preprocess_logits: Preprocess | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        collective_timeout_s: float = 1800.0,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if training.full_determinism:
            compute_deterministically()
        if training.tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32
        if checkpoint is not None:
            # Before anything is loaded, so that a damaged one is found in seconds.
            verify_checkpoint(checkpoint)
        self.name = "learner" if num_ranks == 1 else f"learner-{rank}"
        self._model_config, self._training, self._temperature = model, training, temperature
        self._loss_options = resolve_options(loss)
        self._loss: Loss = build_loss(loss, max_completion_length=max_completion_length)
        # A teacher that weighs nothing is not held.
        self._teacher_source = teacher if self._loss.needs.teacher is not None else None
        self._teacher: Companion | None = None
        self._total_updates, self._checkpoint = total_updates, checkpoint
        self._preprocess_logits = preprocess_logits
        self._ranks = SOLO
        self._place, self._timeout_s = Ranks(rank=rank, size=num_ranks), collective_timeout_s
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._version = 0
        self._checksum: str | None = None
        self._identity: WeightVersion | None = None
        self._manifest: tuple[TensorEntry, ...] | None = None
        self._skipped_in_a_row = 0
        self._has_moved = False  # since the version that is published
        self._busy_since: float | None = None
        self._progress = 0
        self._log = ActorLog(self.name)
        if num_ranks > 1:
            return  # until the ranks have met
        if training.deepspeed is not None:
            # DeepSpeed wants a process group, even of one.
            self._meet(free_address())
        self._build()

    def address(self) -> str:
        """Where the other ranks can meet this one."""
        return free_address()

    def join(self, address: str) -> None:
        """Meet the other ranks at the address that rank 0 gave, then load model and optimizer.

        Raises:
            RunError: not all of them came in time.
        """
        with self._busy("join"):
            self._meet(address)
            self._build()

    def _meet(self, address: str) -> None:
        self._ranks = join_ranks(
            rank=self._place.rank,
            size=self._place.size,
            address=address,
            device=self._device,
            timeout_s=self._timeout_s,
        )

    def _build(self) -> None:
        training, model = self._training, self._model_config
        # By rank, as dropout and noise must not be the same everywhere; new weights have a seed of their own.
        torch.manual_seed(training.seed + self._ranks.rank)
        module = self._load()
        self._backend = self._make_backend(module)
        self._scorer = SampleScorer(
            module,
            share_prompt=training.share_prompt,
            temperature=self._temperature,
            forward=self._backend.module,
            needs=self._loss.needs,
        )
        if self._loss.needs.head is HeadKind.LANGUAGE:
            self._scorer.routers = router_loss(self._model, training.router_aux_loss_coef)
        self._reference = build_reference(
            model=model,
            training=training,
            loss=self._loss_options,
            temperature=self._temperature,
            device=self._device,
            policy=self._model,
            scorer=self._scorer,
        )
        if self._teacher_source is not None:
            self._teacher = build_resident_teacher(
                self._teacher_source,
                model=model,
                training=training,
                temperature=self._temperature,
                device=self._device,
                policy=self._model,
                scorer=self._scorer,
                gather=self._backend.gather,
            )
        self._passes = Passes(
            scorer=self._scorer,
            reference=self._reference,
            loss=self._loss,
            backend=self._backend,
            ranks=self._ranks,
            device=self._device,
            on_progress=self._count_progress,
            teacher=self._teacher,
            clip_bounds=self._loss_options.clip_bounds,
        )
        if self._checkpoint is not None:
            self._restore(self._checkpoint)

    def _load(self) -> PredictorModule:
        """The model with the head that the loss asks for, and its tokenizer."""
        training, model, needs = self._training, self._model_config, self._loss.needs
        options: dict[str, Any] = {
            "path": self._checkpoint,
            "device": self._device,
            "disable_dropout": training.disable_dropout,
            "seed": training.seed,
        }
        if needs.head is HeadKind.LANGUAGE:
            self._tokenizer = load_tokenizer(model)
            source = self._teacher_source
            initial = needs.reference or (source is not None and source.is_initial)
            self._model = load_policy(model, with_reference=initial, **options)
            return ScoringModule(self._model, chunk_size=training.chunk_lm_head_size, bf16=bool(model.bf16))
        self._model = load_classifier(model, num_labels=needs.head.num_labels, **options)
        self._tokenizer = load_classifier_tokenizer(model, path=self._checkpoint)
        return ClassifierModule(self._model, bf16=bool(model.bf16))

    def _make_backend(self, module: PredictorModule) -> TrainingBackend:
        options: dict[str, Any] = {"total_updates": self._total_updates, "ranks": self._ranks}
        if self._training.deepspeed is None:
            return TorchBackend(module, self._training, **options)
        # Imported here because it takes seconds.
        from trl_ray.models.backends.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(module, self._training, **options)

    def _count_progress(self) -> None:
        self._progress += 1

    @property
    def version(self) -> int:
        """Steps done, skipped ones included: the number the weights are published under."""
        return self._version

    def score(self, batch: TrainBatch) -> list[SampleScores]:
        """The first pass: what the weights, and the reference if there is one, say about a batch before any update."""
        self._require_language_head("score")
        with self._busy("score"):
            return self._passes.score(batch)

    def reference_logprobs(self, batch: TrainBatch) -> list[FloatArray]:
        """What the reference says [L] of every sample, in the order of the batch; 0 where nothing is trained.

        Without a reference of its own the policy is asked, which is one until the first update: so references can be
        precomputed with one model in memory.
        """
        self._require_language_head("reference_logprobs")
        reference = self._reference
        if reference is None:
            assert self._version == 0, (
                "without a reference the learner must have its initial weights to stand for one, but has version "
                f"{self._version}. Start one without a checkpoint for it."
            )
            reference = Companion(self._model, self._scorer)
        with self._busy("reference_logprobs"), self._undisturbed():
            return self._passes.reference_logprobs(batch, reference=reference)

    def evaluate(self, batch: TrainBatch) -> Evaluation:
        """Loss and metrics of held-out examples, without dropout and noise; nothing of the learner changes.

        Args:
            batch: with the totals of all that is evaluated; its step is not looked at.
        """
        started = time.perf_counter()
        with self._busy("evaluate"), self._undisturbed():
            every = self._ranks.gather(self._passes.evaluate(batch))
        metrics = merge_metrics(part for passed in every for part in passed.metrics)
        return Evaluation(
            loss=sum(passed.loss for passed in every),
            metrics={**metrics, **self._loss.joined(metrics)},
            seconds=time.perf_counter() - started,
        )

    def predict(self, batches: Sequence[PredictionBatch]) -> list[PredictedBatch]:
        """What the model predicts at every token of this rank's held-out rows; nothing of the learner changes.

        Raises:
            CallbackError: the user's `preprocess_logits` raised.
        """
        bf16, in_step = bool(self._model_config.bf16), self._backend.in_step
        predictor = Predictor(self._model, self._tokenizer, bf16=bf16, preprocess=self._preprocess_logits)
        with self._busy("predict"), self._undisturbed():
            return predictor.predict_all(batches, in_step=in_step)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The model computes as it does outside of training, and the random state stays as it is."""
        training = self._model.training
        self._model.train(False)
        try:
            with keep_random_state():
                yield
        finally:
            self._model.train(training)

    def _require_language_head(self, method: str) -> None:
        assert self._loss.needs.head is HeadKind.LANGUAGE, f"{method} needs a language-model head"

    def step(self, batch: TrainBatch) -> StepResult:
        """Do one optimizer update.

        An update that meets NaN or infinity leaves weights and optimizer as they were and still counts, so that
        versions, steps and the ledger stay aligned.

        Raises:
            NumericsError: NaN or infinity, and `on_non_finite` is ``stop`` or it happened too often in a row.
        """
        assert batch.step == self._version + 1, f"step {batch.step} does not follow version {self._version}"
        started = time.perf_counter()
        with self._busy("step"):
            every = self._ranks.gather(self._passes.train(batch, has_moved=self._has_moved))
            # One rank's problem is everybody's: all skip the update, or weights would part ways.
            problem = next((passed.problem for passed in every if passed.problem is not None), None)
            # Read here because `_finish` moves the schedule on to the next update's.
            lr = self._backend.learning_rate
            grad_norm = math.nan
            if problem is None:
                grad_norm = self._backend.reduce()
                if not math.isfinite(grad_norm):
                    problem = self._find_bad_gradient(batch)
            self._finish(problem)
            # However many updates a step has, workers pull its weights once.
            if batch.is_last_update:
                self._version, self._has_moved = batch.step, False
                for companion in self._companions:
                    if companion.is_due(batch.step):
                        companion.after_step(batch.step, self._backend.weights())
                if batch.step % (self._training.torch_empty_cache_steps or batch.step + 1) == 0:
                    torch.cuda.empty_cache()
        return StepResult(
            version=self._version,
            loss=math.nan if problem else sum(passed.loss for passed in every),
            grad_norm=grad_norm,
            lr=lr,
            skipped=problem is not None,
            metrics=self._metrics(every, batch, problem),
            seconds=time.perf_counter() - started,
        )

    def _find_bad_gradient(self, batch: TrainBatch) -> NonFinitePlace:
        """Which rank's sample it was; only that it happened where a pass of one rank would block the others."""
        unknown = NonFinitePlace(step=batch.step, quantity="the gradient norm", rank=self._ranks.rank)
        if self._backend.in_step:
            return unknown
        found = self._ranks.gather(self._passes.blame_gradient(batch))
        return next((problem for problem in found if problem is not None), unknown)

    def _finish(self, problem: NonFinitePlace | None) -> None:
        """Move the weights, or leave them alone and say why; the schedule moves on either way."""
        if problem is None:
            self._backend.update()
            self._has_moved = True
            # These are no longer the weights that were published.
            self._checksum = None
            self._skipped_in_a_row = 0
        else:
            self._backend.discard()
            self._skip(problem)

    def _metrics(self, every: list[Passed], batch: TrainBatch, problem: NonFinitePlace | None) -> Mapping[str, Metric]:
        """Of all ranks, with what the loss adapted to them."""
        # Every rank merges all of them and comes to the same numbers, so that what adapts to them stays equal.
        metrics = merge_metrics(part for passed in every for part in passed.metrics)
        if problem is None:
            metrics |= self._loss.joined(metrics)
            metrics |= self._loss.after_update(metrics)
        trained = 0.0 if problem else float(batch.num_valid_tokens)
        metrics["tokens/trained"] = Metric(value=trained, reduce=Reduce.SUM)
        metrics["learner/skipped_steps"] = Metric(value=float(problem is not None), reduce=Reduce.SUM)
        return metrics

    def _skip(self, problem: NonFinitePlace) -> None:
        self._skipped_in_a_row += 1
        teacher_remedy = "Check the teacher's weights." if problem.quantity == OF_TEACHER else None
        if self._training.on_non_finite is NonFinite.STOP:
            remedy = teacher_remedy or "Lower learning_rate, or inspect the batch."
            raise NumericsError(f"{problem}. The weights are as before. {remedy}")
        if self._skipped_in_a_row > self._training.max_skipped_steps:
            # A resumed run keeps its learning_rate.
            remedy = (
                teacher_remedy
                or "Begin a new run with model_name_or_path set to a checkpoint and a lower learning_rate."
            )
            raise NumericsError(
                f"{problem}; {self._skipped_in_a_row} steps in a row were skipped, max_skipped_steps allows "
                f"{self._training.max_skipped_steps}. {remedy}"
            )
        # Told once: all ranks skip the same update.
        if self._ranks.is_first:
            detail = {"message": f"{problem}; the step was skipped", **asdict(problem)}
            self._log.event(EventKind.WARNING, **detail)

    def publish(self) -> WeightPayload | None:
        """Copy the weights out as engines know them: adapters merged, tied ones once. None from all ranks but 0."""
        self._require_language_head("publish")
        with self._busy("publish"):
            if not (self._ranks.is_first or self._backend.shards_weights):
                return None
            # Names and shapes never change, and asking for them may gather all weights.
            if self._manifest is None:
                self._manifest = build_manifest(self._plain_weights())
            if not self._ranks.is_first:
                for _ in self._plain_weights():  # the others help to gather them
                    pass
                return None
            payload = export_weights(self._plain_weights(), manifest=self._manifest, version=self._version)
        self._checksum = payload.identity.checksum
        self._identity = payload.identity
        return payload

    def _plain_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(self._model, gather=self._backend.gather)

    def identity(self) -> WeightVersion:
        """Version and checksum of the weights published last, without the weights."""
        assert self._identity is not None, "weights must be published before their identity is asked for"
        return self._identity

    def weight_check(
        self, token_ids: IntArray, *, further: Sequence[IntArray] = (), asks_training: bool = False
    ) -> WeightCheck:
        """Log-probs of a fixed sequence [T] and `further` ones at temperature 1, for engines to be held against.

        With `asks_training` the longest of them passes in training mode, too, and is held against evaluation.
        """
        self._require_language_head("weight_check")
        with self._busy("weight_check"), keep_random_state():
            asked: dict[str, Any] = {"further": further, "asks_training": asks_training}
            return self._scorer.weight_check(token_ids, version=self._version, **asked)

    def save(
        self,
        directory: str,
        *,
        step: int,
        extra: Mapping[str, bytes],
        adopt: Mapping[str, str] | None = None,
        only_model: bool = False,
    ) -> str:
        """Write ``directory/step-N`` with model, tokenizer, optimizer, schedule, random state and `extra` files.

        Args:
            directory: of all checkpoints.
            step: the version of the weights.
            extra: contents of further files by name.
            adopt: folders that others have written beside it, by the name they get within; they are moved.
            only_model: leave out the optimizer, and with it all that a run needs to go on.

        Returns:
            Its path.

        Raises:
            CheckpointError: it cannot be written.
        """
        assert step == self._version, f"a checkpoint holds the weights as they are: version {self._version}, not {step}"
        with self._busy("save"):
            partial = self._ranks.first(lambda: begin_checkpoint(directory, step=step, adopt=adopt))
            state = {
                "version": self._version,
                "skipped_in_a_row": self._skipped_in_a_row,
                "loss": self._loss.state_dict(),
                "ranks": self._ranks.gather(random_state()),
                ONLY_MODEL: only_model,
                **({} if only_model else self._backend.save_state(partial)),
            }
            # Before rank 0 writes alone: gathering needs every rank, and the others only wait from here on.
            weights = self._whole_weights() if self._backend.shards_weights else None
            return self._ranks.first(lambda: self._finish_checkpoint(directory, state, weights, extra))

    def _finish_checkpoint(
        self,
        directory: str,
        state: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor] | None,
        extra: Mapping[str, bytes],
    ) -> str:
        partial = partial_path(directory, self._version)
        for companion in self._companions:
            companion.save(partial)
        return finish_checkpoint(
            directory,
            step=self._version,
            model=self._model,
            trainer_state=state,
            weights=weights,
            tokenizer=self._tokenizer,
            extra=extra,
        )

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        """Gathered one by one; only rank 0 keeps them, and of a policy with an adapter only what is trained."""
        trained = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        kept = {}
        for name, weight in self._backend.weights():
            if self._ranks.is_first and name in trained:
                # A copy, because what was gathered is valid until the next one only.
                kept[name] = weight.detach().to("cpu", copy=True)
        return kept

    def _restore(self, checkpoint: str) -> None:
        state = load_trainer_state(checkpoint)
        if state.get(ONLY_MODEL):
            raise CheckpointError(
                f"a checkpoint must hold the optimizer for a run to go on from it, but {checkpoint} was written with "
                f"save_only_model=true. Begin a new run with model_name_or_path={checkpoint}."
            )
        self._backend.load_state(Path(checkpoint), state)
        try:
            self._version, self._skipped_in_a_row = int(state["version"]), int(state["skipped_in_a_row"])
            self._loss.load_state_dict(state["loss"])
            # A run may go on with more ranks than it had; new ones keep the state their seed gave them.
            if self._ranks.rank < len(state["ranks"]):
                set_random_state(state["ranks"][self._ranks.rank])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the trainer state in {checkpoint} must fit this model and optimizer, but: {error}. "
                "Resume with the configuration of the run that wrote it."
            ) from error
        for companion in self._companions:
            companion.load(checkpoint, step=self._version)

    @property
    def _companions(self) -> tuple[Companion, ...]:
        """The models that are held beside the policy, in the order in which every rank moves them."""
        return tuple(each for each in (self._reference, self._teacher) if each is not None)

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
        return self._log.drain()

    def close(self) -> None:
        """Part from the other ranks; the process's end frees the rest."""
        leave_ranks()

    @contextmanager
    def _busy(self, name: str) -> Iterator[None]:
        self._busy_since = start = steady_time()
        try:
            yield
        finally:
            self._busy_since = None
            self._progress += 1
            self._log.span(name, start)
