"""The pipelines that train on datasets: SFT, preference optimisation, reward models.

prepare: read, tokenise -> session: [learner -> reference's log-probs, where they are precomputed -> loop]
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from trl_ray.algorithms.loss_registry import resolve_options
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.data.examples.left_out_rows import report_losses
from trl_ray.errors import ConfigError, DataError
from trl_ray.models.policy_loading import find_source, max_positions
from trl_ray.pipelines.run.early_stopping import EarlyStopping
from trl_ray.pipelines.run.given_objects import trainer_objects
from trl_ray.pipelines.run.given_rows import given_rows, is_stream
from trl_ray.pipelines.run.learner_actors import LearnerActors, under_watch
from trl_ray.pipelines.run.own_metrics import found_metrics, named_metrics
from trl_ray.pipelines.run.pipeline import Pipeline
from trl_ray.pipelines.run.session import Opening, Session, TrainOutput
from trl_ray.pipelines.run.signals import Stop
from trl_ray.pipelines.run.stopping import started
from trl_ray.pipelines.supervised.dataset_loop import PROGRESS, DatasetLoop
from trl_ray.pipelines.supervised.dataset_preparation import (
    DatasetInputs,
    SupervisedPlan,
    is_named_sets,
    prepare_supervised,
)
from trl_ray.pipelines.supervised.dataset_recording import Accounts, SupervisedRecorder
from trl_ray.pipelines.supervised.example_feed import StreamPlace
from trl_ray.pipelines.supervised.reference_pass import LabelledSets, with_references
from trl_ray.pipelines.supervised.rows_fingerprint import rows_fingerprint
from trl_ray.pipelines.supervised.user_metrics import KeptPredictions, MetricFunctions
from trl_ray.types import EventKind, PredictionForm


class SupervisedSession(Session):
    """One life of the learner, from a checkpoint on."""

    recorder: SupervisedRecorder

    def __init__(self, *, plan: SupervisedPlan, opening: Opening, recorder: SupervisedRecorder) -> None:
        self._plan, self._opening, self.recorder = plan, opening, recorder
        self._actors = self._learner(opening.checkpoint)

    def _learner(self, checkpoint: str | None) -> LearnerActors:
        return LearnerActors(
            runtime=self._opening.runtime,
            config=self._plan.config,
            arguments=self._plan.arguments(checkpoint=checkpoint),
            emit=self.recorder.emit,
        )

    async def run(self, stop: Stop) -> TrainOutput:
        plan, recorder, begin = self._plan, self.recorder, time.monotonic()
        accounts, stopping = self._progress()
        self._say_rows()
        sets = await self._references(stop)
        if not self._actors.is_started:
            await started(self._actors.start(), stop=stop, run_dir=recorder.directory.path)
        seconds = round(time.monotonic() - begin, 2)
        recorder.say(EventKind.READY, "driver", detail="all actors are ready", seconds=seconds)
        loop = DatasetLoop(
            plan=plan,
            actors=self._actors,
            recorder=recorder,
            opening=self._opening,
            feed=plan.feed(accounts.place or StreamPlace(), sets.train),
            held_out={name: found.examples for name, found in sets.held_out.items()},
            accounts=accounts,
            stopping=stopping,
            stop=stop,
        )
        await loop.run()
        recorder.report(await self._actors.drain())
        for sentence in report_losses("the stream, as far as it was read,", loop.accounts.losses):
            recorder.say(EventKind.WARNING, "data", detail=sentence)
        snapshot = loop.accounts.snapshot()
        recorder.directory.write_ledger(snapshot.to_json())
        return TrainOutput(
            steps=loop.step,
            run_dir=recorder.directory.path,
            metrics=dict(recorder.last),
            ledger=snapshot,
            model=loop.model,
        )

    async def _references(self, stop: Stop) -> LabelledSets:
        """The examples, with what the reference says of them where that is asked before training."""
        # A run that goes on although the reference's answers were lost asks a learner at the initial weights, and ends
        # it before its own starts: there may be room for one.
        initial = self._actors if self._opening.step == 0 else self._learner(None)
        try:
            work = with_references(self._plan, actors=initial, say=self.recorder.say, stop=stop)
            return await under_watch(initial.supervisor, work)
        finally:
            if initial is not self._actors:
                await initial.dismiss()

    def _say_rows(self) -> None:
        """Where their tokens come from, and once what a user should know of the rows."""
        for place in (each.kept_in for each in (self._plan.train, *self._plan.held_out.values()) if each is not None):
            if place is not None:
                self.recorder.say(EventKind.SLOTS, "data", detail=f"tokenised rows {place}")
        if self._opening.resuming:
            return
        for sentence in self._plan.notes:
            self.recorder.say(EventKind.WARNING, "data", detail=sentence)

    def _progress(self) -> tuple[Accounts, EarlyStopping]:
        """As the checkpoint kept them; at the start, rows of the dataset that are in no example are dropped."""
        stopping, train = EarlyStopping.of(self._plan.config), self._plan.train
        if self._opening.only_evaluates:
            return Accounts(step=self._opening.step), stopping
        if self._opening.checkpoint is not None:
            kept = json.loads((Path(self._opening.checkpoint) / PROGRESS).read_text(encoding="utf-8"))
            self._check_rows(kept["examples"], kept.get("fingerprint"))
            stopping.load_state_dict(kept["stopping"])
            return Accounts.from_state(kept["accounts"]), stopping
        untrained = Counter(map(str, train.untrained.values() if train is not None else ()))
        return Accounts(untrained=dict(untrained)), stopping

    def _check_rows(self, before: int | None, fingerprint: str | None) -> None:
        """In another dataset the steps to come would be other ones, with rows trained twice and rows left out."""
        train, known = self._plan.train, self._plan.known
        now = None if train is None else len(train)
        same = now == before
        if same and known is not None and fingerprint is not None:
            same = rows_fingerprint(known.examples) == fingerprint
        if not same:
            counts = ["a stream" if count is None else f"{count} examples" for count in (before, now)]
            other = " with another content or in another order" if now == before else ""
            other = " with other first rows" if now == before is None else other
            raise DataError(
                f"A run must go on with the rows that it began with, they gave {counts[0]} then and {counts[1]} now"
                f"{other}. Give the same rows, or begin a new run from the checkpoint: model_name_or_path="
                f"{self._opening.checkpoint}."
            )

    async def dismiss(self) -> None:
        await self._actors.dismiss()


class SupervisedPipeline(Pipeline[SupervisedRunConfig, SupervisedPlan]):
    """Trains on a dataset.

    Example::

        pipeline = SFTPipeline(
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            args=SFTConfig(packing=True, max_steps=100),
            train_dataset=dataset,
        )
        output = pipeline.train()
    """

    config_class: ClassVar[type[RunConfig]] = SupervisedRunConfig
    loss_class: ClassVar[type[LossSection]]
    """The part of the configuration that says what is minimised."""
    task: ClassVar[ExampleTask]
    prediction_form: ClassVar[PredictionForm] = PredictionForm.LABELLED
    """What `compute_metrics` and `predict` are given."""
    _inputs: DatasetInputs

    def __init__(
        self,
        model: object | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: object | None = None,
        callbacks: Sequence[Any] | None = None,
        *,
        ref_model: object | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        **objects: Any,
    ) -> None:
        """Take what TRL's trainer takes; what is None comes from `args`, and `callbacks` follow those of `args`.

        Args:
            model: a name, a folder, or a model of transformers or peft, whose weights are written down once.
            args, train_dataset, eval_dataset, peft_config, callbacks: as in TRL.
            ref_model: the reference, as `model`; None: the policy before training.
            formatting_func: makes the text of a row.
            compute_metrics: measures held-out rows, called here with an `EvalPrediction` as by TRL's trainer.
            preprocess_logits_for_metrics: what it is given instead of the logits, called in the learner.
            objects: the further arguments of TRL's trainers, see `TrainerObjects`.

        Raises:
            ConfigError: `args` is of another pipeline, or an argument is unknown or cannot be had.
            ModelError: `peft_config` is no `peft.LoraConfig`, or a model cannot be written down.
        """
        super().__init__(
            model=model,
            args=args,
            peft_config=peft_config,
            callbacks=callbacks,
            objects=trainer_objects(ref_model=ref_model, **objects),
            compute_metrics=named_metrics(compute_metrics, self.checked(args).compute_metrics),
        )
        if is_stream(train_dataset) and self.config.max_steps > 0:
            self.config = self.config.replace(dataset_streaming=True)
        self._fitted = False
        self._inputs = DatasetInputs(
            train_dataset=given_rows(train_dataset),
            eval_dataset=given_rows(eval_dataset, evaluation=True),
            formatting_func=formatting_func,
            metrics=MetricFunctions(
                form=self.prediction_form,
                compute=found_metrics(compute_metrics, self.config.compute_metrics),
                preprocess=preprocess_logits_for_metrics,
            ),
        )

    def _task(self) -> ExampleTask:
        return self.task

    def _prepare(self) -> SupervisedPlan:
        self._fit_positions()
        loss = resolve_options(self.config.part(self.loss_class))
        plan = prepare_supervised(self.config, self._inputs, task=self._task(), loss=loss)
        self.config = plan.config
        return plan

    def _fit_positions(self) -> None:
        """The default of `max_length` gives way to a model that holds less, and the run says so."""
        find_source(self.config.part(ModelConfig))
        positions, default = (
            max_positions(self.config.part(ModelConfig)),
            self.config_class.model_fields["max_length"].default,
        )
        if positions is not None and self.config.max_length == default > positions:
            self._fitted = True
            self.config = self.config.replace(max_length=positions)

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """What the run's model predicts of rows, before training the initial one; nothing is left behind.

        Args:
            test_dataset: rows, as `eval_dataset`.
            ignore_keys: taken for TRL's sake; the logits are all that is looked at.
            metric_key_prefix: begins the names of the metrics.

        Returns:
            transformers' `PredictionOutput`: predictions and label_ids as `compute_metrics` is given them
            (`PredictionForm` says which), and the metrics of `evaluate`.

        Raises:
            InputError: there are no rows, or they cannot be used.
            RunError: the prediction failed.
        """
        del ignore_keys
        if is_named_sets(test_dataset, self.config.dataset_test_split):
            raise ConfigError(f"test_dataset must be one set of rows, got {len(test_dataset)}. Predict one at a time.")
        pipeline, keeper = copy(self), KeptPredictions(self._inputs.metrics, self.config, prefix=metric_key_prefix)
        pipeline.config = self.config.replace(batch_eval_metrics=False)
        pipeline._inputs = replace(self._inputs, metrics=keeper.functions)
        metrics = pipeline.evaluate(test_dataset, metric_key_prefix=metric_key_prefix)
        return keeper.output(metrics)

    def _announcement(self) -> Mapping[str, Any]:
        return {"max_length": f"{self.config.max_length}, which is all that the model holds"} if self._fitted else {}

    def _make_session(self, plan: SupervisedPlan, opening: Opening) -> SupervisedSession:
        recorder = SupervisedRecorder(directory=opening.directory, observer=opening.observer)
        return SupervisedSession(plan=plan, opening=opening, recorder=recorder)
