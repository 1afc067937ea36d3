"""The life of a run, whatever the pipeline: prepare, open its directory and a runtime, train in sessions, tell the end.

prepare -> run directory -> runtime -> [session: actors, loop, final checkpoint] -> report
                                        ^     | learner lost
                                        +-----+ (again, from the last checkpoint)
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from trl_ray.config.load import dump_yaml
from trl_ray.config.runs.cadence_options import Strategy
from trl_ray.config.runs.resumed_config import check_resumed, resumed_config
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import Dtype, ModelConfig, RuntimeKind
from trl_ray.config.step_counts import steps_of
from trl_ray.errors import ConfigError, InterruptedRun, LearnerLostError, RunError, TrlRayError
from trl_ray.models.adapters.adapter_config import adapter_options
from trl_ray.models.checkpoint import checkpoint_step, list_checkpoints
from trl_ray.models.hub import check_hub
from trl_ray.models.policy_loading import checkpoint_dtype, find_source
from trl_ray.observe.observer import open_observer
from trl_ray.observe.private_files import loose_token
from trl_ray.observe.report.report_page import build_report
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_lock import RunLock, in_use, living_holder
from trl_ray.observe.services.service_sinks import services_of
from trl_ray.observe.sinks import Observer
from trl_ray.pipelines.callbacks.callback_loading import make_callbacks, specs_with
from trl_ray.pipelines.callbacks.hooks import CallbackList
from trl_ray.pipelines.run.evaluation_run import EvaluatedNumbers, evaluation_config
from trl_ray.pipelines.run.given_objects import GivenFolders, TrainerObjects
from trl_ray.pipelines.run.given_rows import given_rows
from trl_ray.pipelines.run.going_back import Return, RunOrigin, Wish, find_return, leave_aside, resolve
from trl_ray.pipelines.run.hub_pushes import hub_place
from trl_ray.pipelines.run.learner_actors import beside_guards
from trl_ray.pipelines.run.ray_job import grace_s
from trl_ray.pipelines.run.recording import RunRecorder
from trl_ray.pipelines.run.session import Opening, Plan, Session, TrainOutput
from trl_ray.pipelines.run.signals import Stop, StopRequested, run_to_end, unless
from trl_ray.pipelines.run.stopping import close_in_time, tell_of_stop, what_is_left
from trl_ray.pipelines.run.trainer_methods import TrainerMethods
from trl_ray.runtime import waits
from trl_ray.runtime.local import LocalRuntime
from trl_ray.runtime.restart_budget import CheckpointBudget
from trl_ray.runtime.runtime import Role, Runtime
from trl_ray.types import EventKind

if TYPE_CHECKING:
    pass


_LOG = logging.getLogger(__name__)
_RESOLVED_LATER = frozenset({"chat_template_kwargs", "max_length"})
"""Options that are known once rows and model are looked at: the template's date, how much the model holds."""
_DISK_BYTES_PER_S = 1e9
"""What a checkpoint is written with at best."""
ConfigT = TypeVar("ConfigT", bound=RunConfig)
PlanT = TypeVar("PlanT", bound=Plan)


class Pipeline(TrainerMethods, ABC, Generic[ConfigT, PlanT]):
    """The life of a run; subclasses say what is prepared and what a session does."""

    config_class: ClassVar[type[RunConfig]]
    name: ClassVar[str]
    _inputs: Any
    """What a user gave in Python beside the configuration; a dataclass with `train_dataset` and `eval_dataset`."""
    resumes_within: ClassVar[int | None] = None
    """How many of the newest checkpoints a run can go on from; None: all."""
    reads_held_out: ClassVar[bool] = True
    """Whether held-out streams are read to their end, and not as far as `eval_num_prompts`."""

    def __init__(
        self,
        *,
        model: object | None,
        args: ConfigT | None,
        peft_config: object | None,
        callbacks: Sequence[Any] | None = None,
        objects: TrainerObjects | None = None,
        folders: GivenFolders | None = None,
        **changes: Any,
    ) -> None:
        """Resolve the configuration: `args`, with what is given beside it put in.

        Raises:
            ConfigError: `args` is of another pipeline, `callbacks` is no list, or an object cannot be had here.
            ModelError: `peft_config` is no `peft.LoraConfig`, or asks for what engines cannot be given; `model` cannot
                be written down.
        """
        given = self.checked(args)
        self._objects = objects = objects or TrainerObjects()
        self._given = folders or GivenFolders(given.output_dir)
        model = objects.made_model(model)
        if peft_config is not None and hasattr(model, "peft_config"):
            raise ConfigError(
                f"peft_config must be None with a {type(model).__name__}, whose own adapter is trained on, got a "
                f"{type(peft_config).__name__}. Remove it, or merge_and_unload() the model first."
            )
        changes |= objects.options(model=model or given.model_name_or_path, folders=self._given)
        if isinstance(model, str) and "model_name_or_path" not in changes:
            changes["model_name_or_path"] = model
        if peft_config is not None:
            changes |= adapter_options(peft_config)
        if callbacks is not None:
            changes["callbacks"] = specs_with(given.callbacks, callbacks)
        self.config: ConfigT = given.replace(**changes) if changes else given
        self._resume = False
        self._changes: dict[str, str] = {}
        """Options with which the run goes on otherwise than it began, as ``old -> new`` by name."""
        self._wish = Wish()
        self._lock: RunLock | None = None
        """Of the run directory, while it is trained into."""
        self._trained: TrainOutput | None = None
        self._given_callbacks = callbacks
        self._callbacks = CallbackList((), args=self.config)

    @classmethod
    def checked(cls, args: ConfigT | None) -> ConfigT:
        """The configuration as it was given, or the pipeline's defaults.

        Raises:
            ConfigError: it is of another pipeline.
        """
        if args is not None and type(args) is not cls.config_class:
            raise ConfigError(f"args must be a {cls.config_class.__name__}, got a {type(args).__name__}.")
        return cast(ConfigT, cls.config_class()) if args is None else args

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        *,
        changes: Sequence[str] = (),
        from_checkpoint: int | None = None,
        new_journal: bool = False,
        **inputs: Any,
    ) -> Self:
        """The pipeline of an interrupted run, ready to go on.

        Args:
            run_dir: of the run.
            changes: of its options, as ``key=value``.
            from_checkpoint: the step of the checkpoint to go back to, 0 for the beginning; None: the newest good one.
            new_journal: go on with the checkpoint's own copy of the ledger, because the journal is lost or damaged;
                what was generated and not yet trained then is generated again, and events say so.
            inputs: those that Python gave the first time.

        Raises:
            ConfigError: there is no run, or not of this pipeline, or an option must not change.
        """
        directory = RunDirectory.open_existing(run_dir)
        recorded = directory.recorded_config or directory.config
        before = resumed_config(cls.config_class, recorded)
        config = resumed_config(cls.config_class, directory.config, changes, recorded=recorded)
        pipeline = cls(args=config.replace(output_dir=str(directory.path)), **inputs)  # type: ignore[arg-type]
        pipeline._resume, pipeline._changes = True, check_resumed(before, config)
        pipeline._wish = Wish(at=from_checkpoint, new_journal=new_journal)
        return pipeline

    @abstractmethod
    def _prepare(self) -> PlanT:
        """Check and resolve everything."""

    @abstractmethod
    def _make_session(self, plan: PlanT, opening: Opening) -> Session:
        """The session that goes on from there; starts nothing."""

    def prepare(self) -> PlanT:
        """Check and resolve everything, starting and writing nothing.

        Raises:
            InputError: what is wrong, and what to do.
        """
        if self.config.resume_from_checkpoint:
            self._resume, self._wish = True, Wish(given=self.config.resume_from_checkpoint)
        if self._resume:
            self._wish = resolve(self._wish, self.config.output_dir, within=self.resumes_within)
        if holder := living_holder(Path(self.config.output_dir).expanduser().absolute()):
            raise in_use(Path(self.config.output_dir), holder)
        if not self._resume:
            RunDirectory.check_free(self.config.output_dir, overwrite=self.config.overwrite_output_dir)
        elif self.config.save_only_model:
            raise ConfigError(
                "save_only_model must be false for a run to go on, got true: its checkpoints are without the "
                "optimizer. Begin a new run with one of them as model_name_or_path."
            )
        services_of(self.config.report_to)
        if self.config.push_to_hub:
            check_hub(hub_place(self.config))
        self._callbacks = make_callbacks(self.config, self._given_callbacks)
        self._given.write(self.config.part(ModelConfig))
        if self.config.dtype is Dtype.AUTO:
            find_source(self.config.part(ModelConfig))
            self.config = self.config.replace(dtype=checkpoint_dtype(self.config.part(ModelConfig)))
        if self.config.resume_from_checkpoint:
            self._compare_with_recorded(unresolved=_RESOLVED_LATER)
        plan = self._prepare()
        if self.config.resume_from_checkpoint:
            self._changes = self._compare_with_recorded()
        if not self._callbacks.is_empty:
            self._callbacks.show(**self._shown_objects(plan.steps_per_epoch))
        return plan

    def _compare_with_recorded(self, *, unresolved: Collection[str] = ()) -> dict[str, str]:
        """Compare options that Python gave with those that the run began with, as `from_run` does.

        Raises:
            ConfigError: one changes that must not.
        """
        directory = RunDirectory.open_existing(self.config.output_dir)
        before = resumed_config(self.config_class, directory.recorded_config or directory.config)
        return check_resumed(before, self._given.as_recorded(self.config, before), unresolved=unresolved)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: None = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Run to the end.

        Args:
            resume_from_checkpoint: as the option of this name, before which it goes.
            trial: must be None; a run has one configuration.
            ignore_keys_for_eval: taken for TRL's sake; nothing but logits is looked at.

        Raises:
            InputError: the input was wrong; nothing was started.
            RunError: the run failed; its last checkpoint and its journal are kept.
            InterruptedRun: it was interrupted, and a checkpoint was written.
        """
        del ignore_keys_for_eval
        if trial is not None:
            raise ConfigError(f"trial must be None, got {trial!r}: a run has one configuration. Start one for each.")
        if resume_from_checkpoint is not None:
            self.config = self.config.replace(resume_from_checkpoint=resume_from_checkpoint)
        plan = self.prepare()
        grace = grace_s(self.config.runtime.stop_grace_s)
        with RunLock.hold(self.config.output_dir) as self._lock:
            self._trained = run_to_end(lambda stop: self._train(plan, stop), grace=grace)
        if self.config.push_to_hub:
            try:
                self.push_to_hub()
            except RunError as error:  # the run is over and whole; only its way to the Hub is not
                _LOG.warning("%s", error)
        return self._trained

    def _with_held_out(self, eval_dataset: Any) -> Any:
        """The inputs with other held-out rows; None keeps those there are."""
        inputs, config = self._inputs, self.config
        if eval_dataset is None:
            return inputs
        if isinstance(eval_dataset, str):
            named = inputs.eval_dataset if isinstance(inputs.eval_dataset, Mapping) else {}
            if eval_dataset not in named:
                raise ConfigError(
                    f"eval_dataset must be rows, or the name of one of the pipeline's sets, which are "
                    f"{', '.join(map(str, named)) or 'none'}; got {eval_dataset!r}."
                )
            eval_dataset = {eval_dataset: named[eval_dataset]}
        eval_dataset = given_rows(eval_dataset, evaluation=self.reads_held_out)
        train = inputs.train_dataset
        if train is None and config.dataset_name is None and not config.datasets:
            train = eval_dataset
        return replace(inputs, train_dataset=train, eval_dataset=eval_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out numbers under the run's model, before training under the initial one. Nothing is left behind.

        Args:
            eval_dataset: rows, or the name of one of the pipeline's sets; None takes those of the pipeline.
            ignore_keys: taken for TRL's sake; nothing but logits is looked at.
            metric_key_prefix: begins their names.

        Raises:
            InputError: there are no rows, or they cannot be used.
            RunError: the evaluation failed.
        """
        del ignore_keys
        with tempfile.TemporaryDirectory(prefix="trl_ray-evaluation-") as folder:
            pipeline, found = copy(self), EvaluatedNumbers()
            pipeline.config = evaluation_config(self.config, folder)
            pipeline._inputs = self._with_held_out(eval_dataset)
            self._given.write(self.config.part(ModelConfig))
            plan = pipeline._prepare()
            callbacks = CallbackList([found], args=pipeline.config)
            run_to_end(lambda stop: pipeline._evaluate(plan, callbacks, self.model, stop))
            return {f"{metric_key_prefix}_{name}": value for name, value in found.numbers.items()}

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """Predictions of rows; a policy that is trained on its own completions has none.

        Raises:
            ConfigError: always here; pipelines that train on datasets predict.
        """
        del test_dataset, ignore_keys, metric_key_prefix
        raise ConfigError(
            f"predict must be asked of a pipeline that trains on a dataset, got {self.name}, whose rows are prompts "
            "without labels. Call evaluate(eval_dataset), which answers them and scores the answers."
        )

    async def _evaluate(self, plan: PlanT, callbacks: CallbackList, model: Path | None, stop: Stop) -> None:
        runtime = await self._open_runtime(plan, stop)
        directory = RunDirectory.create(self.config.output_dir)
        opening = Opening(
            runtime=runtime,
            directory=directory,
            observer=Observer([]),
            checkpoint=None if model is None else str(model),
            step=0 if model is None else checkpoint_step(model),
            resuming=False,
            callbacks=callbacks,
            only_evaluates=True,
        )
        try:
            await self._make_session(plan, opening).run(stop)
        finally:
            callbacks.close()
            await runtime.close()

    async def _train(self, plan: PlanT, stop: Stop) -> TrainOutput:
        back = self._find_return(self._wish) if self._resume else Return()
        runtime = await self._open_runtime(plan, stop)
        try:
            directory = self._open_directory()
            return await self._sessions(plan, runtime, directory, back, stop)
        finally:
            stop.settled = True
            self._callbacks.close()
            await close_in_time(runtime, stop)

    async def _sessions(
        self, plan: PlanT, runtime: Runtime, directory: RunDirectory, back: Return, stop: Stop
    ) -> TrainOutput:
        """One session after the other, each from the last checkpoint, until training ends."""
        restarts = CheckpointBudget(allowed=self.config.runtime.max_learner_restarts)
        while True:
            session = self._open_session(plan, runtime, directory, back, resuming=self._resume or restarts.used > 0)
            try:
                output = await self._run_session(session, runtime, directory, stop)
            except LearnerLostError as error:
                session.recorder.say(EventKind.ACTOR_LOST, "learner", reason=str(error))
                found = list_checkpoints(directory.checkpoints)
                if not restarts.take(checkpoint_step(found[-1]) if found else 0):
                    self._end(session.recorder, EventKind.RUN_FAILED, error)
                    raise
                try:
                    back = self._find_return(Wish(), before=back)
                except RunError as useless:
                    self._end(session.recorder, EventKind.RUN_FAILED, useless)
                    raise
                await self._dismiss(session, runtime)
            except (InterruptedRun, asyncio.CancelledError, KeyboardInterrupt) as error:
                stop.settled = True
                self._end(session.recorder, EventKind.INTERRUPTED, error, stop=stop)
                raise
            except TrlRayError as error:
                self._end(session.recorder, EventKind.RUN_FAILED, error)
                raise
            else:
                self._end(session.recorder, EventKind.RUN_FINISHED, None)
                return output

    async def _run_session(
        self, session: Session, runtime: Runtime, directory: RunDirectory, stop: Stop
    ) -> TrainOutput:
        """To its end, to the end of the time that a signal leaves, or of Ray itself."""

        def missed(detail: str) -> None:
            session.recorder.say(EventKind.WAITING, "ray", on=detail)

        stop.hold()
        telling = asyncio.create_task(tell_of_stop(stop, session.recorder))
        try:
            with stop.ends_in_order(lambda: what_is_left(directory)), waits.heard_by(session.recorder.emit):
                return await beside_guards(session.run(stop), runtime.watch(missed))
        finally:
            telling.cancel()

    async def _dismiss(self, session: Session, runtime: Runtime) -> None:
        """End a session's actors, so that others may begin on the nodes that are left."""
        try:
            with waits.heard_by(session.recorder.emit):
                await session.dismiss()
                await runtime.renew()
        except TrlRayError as error:
            self._end(session.recorder, EventKind.RUN_FAILED, error)
            raise
        session.recorder.close()

    def _find_return(self, wish: Wish, *, before: Return | None = None) -> Return:
        """Where the run goes on from; changes nothing. See `find_return`."""
        directory = RunDirectory.open_existing(self.config.output_dir)
        has_journal = self.resumes_within is not None
        return find_return(
            directory,
            origin=RunOrigin.of(self.config),
            wish=wish,
            has_journal=has_journal,
            before=before,
        )

    def _open_session(
        self, plan: PlanT, runtime: Runtime, directory: RunDirectory, back: Return, *, resuming: bool
    ) -> Session:
        """The session that goes on from there; metrics are cut once its actors are started."""
        config = self.config
        observer = open_observer(
            directory,
            config=config.model_dump(mode="json"),
            total_steps=plan.total_steps,
            report_to=config.report_to,
            wandb_project=config.project or config.wandb_project,
            wandb_entity=config.wandb_entity,
            wandb_run_group=config.wandb_run_group,
            trackio_space_id=config.trackio_space_id,
            trackio_bucket_id=config.trackio_bucket_id,
            private=config.hub_private_repo,
            logging_first_step=config.logging_first_step,
            run_name=config.run_name,
            print_completions=config.num_completions_to_print,
            logging_steps=self._logging_steps(plan),
            log_completions=config.log_completions,
        )
        session = self._make_session(
            plan,
            Opening(
                runtime=runtime,
                directory=directory,
                observer=observer,
                checkpoint=back.checkpoint,
                step=back.step,
                ledger_copy=back.ledger_copy,
                resuming=resuming,
                callbacks=self._callbacks,
            ),
        )
        if self._lock is not None:
            session.recorder.guard = self._lock.check
            if self._lock.taken_from is not None:
                session.recorder.say(EventKind.WARNING, "driver", detail=self._lock.taken_from)
                self._lock.taken_from = None
        if config.runtime.kind is RuntimeKind.RAY and (loose := loose_token()):
            session.recorder.say(EventKind.WARNING, "driver", detail=loose)
        if resuming:
            session.recorder.cut = partial(directory.truncate_after, back.step)
            for sentence in leave_aside(directory, back):
                session.recorder.say(EventKind.WARNING, "driver", detail=sentence)
        session.recorder.say(
            EventKind.RUN_RESUMED if resuming else EventKind.RUN_STARTED,
            "driver",
            pipeline=self.name,
            step=back.step,
            total_steps=plan.total_steps,
            computes_in=config.computes_in,
            **({"changed": self._changes} if resuming and self._changes else {}),
            **self._announcement(),
        )
        if resuming and (config.resume_from_checkpoint or self._changes):
            self._write_config(directory)
            self._changes = {}
        slow = plan.expected_memory()[Role.LEARNER] / _DISK_BYTES_PER_S
        session.recorder.tell_of_lost_folder()
        session.recorder.tell_of_grace(slow, grace=grace_s(config.runtime.stop_grace_s), is_measured=False)
        return session

    def _logging_steps(self, plan: PlanT) -> int:
        """Steps between lines of the console and points of services."""
        config = self.config
        if config.logging_strategy is Strategy.STEPS:
            return steps_of(config.logging_steps, plan.total_steps)
        per_epoch = plan.steps_per_epoch if config.logging_strategy is Strategy.EPOCH else None
        return plan.total_steps + 1 if per_epoch is None else max(1, round(per_epoch))

    def _announcement(self) -> Mapping[str, Any]:
        """What else a run says of itself when it starts."""
        return {}

    def _end(
        self, recorder: RunRecorder, kind: EventKind, error: BaseException | None, *, stop: Stop | None = None
    ) -> None:
        try:
            recorder.guard()  # else another process may be writing there
            detail = {"error": f"{type(error).__name__}: {error}"} if error is not None else {}
            recorder.say(kind, "driver", **detail)
            hurries = stop is not None and (stop.at_once or stop.left_s is not None)
            if not hurries:
                recorder.close()
            if self.config.html_report and not (stop is not None and stop.at_once):
                build_report(recorder.directory.path)
            if hurries:  # a service may take its time
                recorder.close()
        except RunError as unwritten:
            if error is None:
                raise
            # What the run has failed for is told; that a full disk takes no more words is not news.
            _LOG.warning("the end of the run could not be written down: %s", unwritten)

    def _open_directory(self) -> RunDirectory:
        if self._resume:
            directory = RunDirectory.open_existing(self.config.output_dir)
            return directory
        directory = RunDirectory.create(self.config.output_dir, overwrite=self.config.overwrite_output_dir)
        self._write_config(directory)
        self._given.keep()
        return directory

    def _write_config(self, directory: RunDirectory) -> None:
        # The last option is not of the run but of this start.
        directory.write_config(dump_yaml(self.config.replace(resume_from_checkpoint=None)))

    async def _open_runtime(self, plan: PlanT, stop: Stop) -> Runtime:
        if self.config.runtime.kind is RuntimeKind.LOCAL:
            return LocalRuntime()
        # Imported here so that runtime.kind=local starts without Ray's import.
        from trl_ray.runtime.cluster import RayRuntime

        try:
            return await unless(stop, RayRuntime.open(self.config.runtime, plan.actors()))
        except StopRequested:
            raise stop.error(" while Ray started; nothing was begun") from None
        finally:
            stop.hold()
