"""The pipeline object behind `grpo` and `async-grpo`: prepares, starts the crew, walks, and tells how it ended.

prepare -> run directory -> runtime -> [crew -> walk] -> final checkpoint -> report
                                       ^     | learner lost
                                       +-----+ (again, from the last checkpoint)
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.grpo import GRPOConfig
from trl_ray.config.load import dump_yaml, load_config
from trl_ray.config.sections import RuntimeKind
from trl_ray.errors import ConfigError, InterruptedRun, LearnerLostError, TrlRayError
from trl_ray.models.adapter_config import adapter_options
from trl_ray.models.checkpoint import checkpoint_step, latest_checkpoint
from trl_ray.observe.observer import open_observer
from trl_ray.observe.report import build_report
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.pipelines.crew import Crew
from trl_ray.pipelines.preparation import FROM_PYTHON, Inputs, Preparation, RewardFunction, prepare
from trl_ray.pipelines.record import Recorder
from trl_ray.pipelines.signals import run_to_end
from trl_ray.pipelines.walk import Walk
from trl_ray.runtime.local import LocalRuntime
from trl_ray.runtime.runtime import Runtime
from trl_ray.types import EventKind


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutput:
    """How a run ended."""

    steps: int
    run_dir: Path
    metrics: dict[str, float]
    """The last step's line of metrics.jsonl."""
    ledger: LedgerSnapshot
    worst_age: int
    """The oldest token trained on, in optimizer steps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Session:
    """One life of the crew, from a checkpoint on."""

    crew: Crew
    recorder: Recorder
    start_step: int


class PolicyOptimizationPipeline:
    """Trains a policy on rewards.

    Example::

        pipeline = AsyncGRPOPipeline(
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            reward_funcs=my_reward,              # TRL's signature
            args=AsyncGRPOConfig(max_staleness=2, max_steps=24),
            train_dataset=dataset,
        )
        output = pipeline.train()
    """

    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    name: ClassVar[str] = "grpo"

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: object | None = None,
    ) -> None:
        """Take what TRL's trainer takes; what is None comes from `args`.

        Raises:
            ConfigError: `args` is of another pipeline.
            ModelError: `peft_config` is no `peft.LoraConfig`, or asks for what engines cannot be given.
        """
        args = args if args is not None else self.config_class()
        if type(args) is not self.config_class:
            raise ConfigError(f"args must be a {self.config_class.__name__}, got a {type(args).__name__}.")
        if isinstance(reward_funcs, str) or callable(reward_funcs):
            reward_funcs = [reward_funcs]
        changes: dict[str, Any] = {"model_name_or_path": model} if model is not None else {}
        if peft_config is not None:
            changes |= adapter_options(peft_config)
        if reward_funcs is not None:
            # Functions given as objects cannot be written to config.yaml; a run of named ones resumes by its folder.
            changes["reward_funcs"] = [
                function if isinstance(function, str) else f"{FROM_PYTHON}{getattr(function, '__name__', 'reward')}"
                for function in reward_funcs
            ]
        self.config = args.replace(**changes) if changes else args
        self._inputs = Inputs(train_dataset=train_dataset, eval_dataset=eval_dataset, reward_funcs=reward_funcs)
        self._resume = False

    @classmethod
    def from_run(cls, run_dir: str | Path, **inputs: Any) -> PolicyOptimizationPipeline:
        """The pipeline of an interrupted run, ready to go on; `inputs` are those that Python gave the first time.

        Raises:
            ConfigError: there is no run, or not of this pipeline.
        """
        directory = RunDirectory.open_existing(run_dir)
        config = load_config(cls.config_class, directory.config).replace(output_dir=str(directory.path))
        pipeline = cls(args=config, **inputs)
        pipeline._resume = True
        return pipeline

    def prepare(self) -> Preparation:
        """Check and resolve everything, starting and writing nothing.

        Raises:
            InputError: what is wrong, and what to do.
        """
        if not self._resume:
            RunDirectory.check_free(self.config.output_dir, overwrite=self.config.overwrite_output_dir)
        return prepare(self.config, self._inputs)

    def train(self) -> TrainOutput:
        """Run to the end.

        Raises:
            InputError: the input was wrong; nothing was started.
            RunError: the run failed; its last checkpoint and its journal are kept.
            InterruptedRun: it was interrupted, and a checkpoint was written.
        """
        preparation = self.prepare()
        return run_to_end(lambda stop: self._train(preparation, stop))

    async def _train(self, preparation: Preparation, stop: asyncio.Event) -> TrainOutput:
        runtime = self._open_runtime()
        try:
            directory = self._open_directory()
            return await self._sessions(preparation, runtime, directory, stop)
        finally:
            await runtime.close()

    async def _sessions(
        self, preparation: Preparation, runtime: Runtime, directory: RunDirectory, stop: asyncio.Event
    ) -> TrainOutput:
        """One session after the other, each from the last checkpoint, until training ends."""
        restarts = 0
        while True:
            session = self._open_session(preparation, runtime, directory, resuming=self._resume or restarts > 0)
            try:
                output = await self._session(preparation, session, stop)
            except LearnerLostError as error:
                restarts += 1
                session.recorder.say(EventKind.ACTOR_LOST, "learner", reason=str(error))
                if restarts > self.config.runtime.max_learner_restarts:
                    self._end(session.recorder, EventKind.RUN_FAILED, error)
                    raise
                session.recorder.close()
                await session.crew.dismiss()
            except InterruptedRun as error:
                self._end(session.recorder, EventKind.INTERRUPTED, error)
                raise
            except (TrlRayError, asyncio.CancelledError, KeyboardInterrupt) as error:
                self._end(session.recorder, EventKind.RUN_FAILED, error)
                raise
            else:
                self._end(session.recorder, EventKind.RUN_FINISHED, None)
                return output

    def _open_session(
        self, preparation: Preparation, runtime: Runtime, directory: RunDirectory, *, resuming: bool
    ) -> _Session:
        """Rewind the run directory to the last good checkpoint, and make the crew that goes on from it."""
        config = self.config
        found = latest_checkpoint(directory.checkpoints)
        step = checkpoint_step(found.path) if found.path is not None else 0
        if resuming:
            # Before the files are opened: what is written must follow what was kept.
            directory.truncate_after(step)
        observer = open_observer(
            directory,
            config=config.model_dump(mode="json"),
            total_steps=preparation.total_steps,
            report_to=config.report_to,
            wandb_project=config.wandb_project,
            run_name=config.run_name,
            print_completions=config.num_completions_to_print,
            logging_steps=config.logging_steps,
            log_completions=config.log_completions,
        )
        recorder = Recorder(
            directory=directory, observer=observer, staleness_bound=config.staleness_bound, start_step=step
        )
        for problem in found.problems:
            recorder.say(EventKind.WARNING, "driver", detail=f"a checkpoint cannot be used: {problem}")
        recorder.say(
            EventKind.RUN_RESUMED if resuming else EventKind.RUN_STARTED,
            "driver",
            pipeline=self.name,
            step=step,
            total_steps=preparation.total_steps,
            staleness_bound=config.staleness_bound,
        )
        arguments = preparation.arguments(
            journal=str(directory.journal),
            checkpoint=found.path,
            resume_from=step if resuming else None,
            incarnation=uuid.uuid4().hex,
        )
        crew = Crew(
            runtime=runtime, config=config, arguments=arguments, canary_ids=preparation.canary_ids, emit=recorder.emit
        )
        return _Session(crew=crew, recorder=recorder, start_step=step)

    async def _session(self, preparation: Preparation, session: _Session, stop: asyncio.Event) -> TrainOutput:
        crew, recorder, begin = session.crew, session.recorder, time.time()
        await crew.start()
        recorder.say(EventKind.SLOTS, "driver", detail="all actors are ready", seconds=round(time.time() - begin, 2))
        walk = Walk(preparation=preparation, crew=crew, recorder=recorder, start_step=session.start_step, stop=stop)
        await walk.run()
        await crew.ask_queue("finish")
        recorder.report(await crew.drain())
        snapshot: LedgerSnapshot = await crew.ask_queue("snapshot")
        recorder.directory.write_ledger(snapshot.to_json())
        return TrainOutput(
            steps=walk.progress.step,
            run_dir=recorder.directory.path,
            metrics=dict(recorder.last),
            ledger=snapshot,
            worst_age=recorder.worst_age,
        )

    def _end(self, recorder: Recorder, kind: EventKind, error: BaseException | None) -> None:
        recorder.say(kind, "driver", **({"error": f"{type(error).__name__}: {error}"} if error is not None else {}))
        recorder.close()
        if self.config.html_report:
            build_report(recorder.directory.path)

    def _open_directory(self) -> RunDirectory:
        if self._resume:
            return RunDirectory.open_existing(self.config.output_dir)
        directory = RunDirectory.create(self.config.output_dir, overwrite=self.config.overwrite_output_dir)
        directory.write_config(dump_yaml(self.config))
        return directory

    def _open_runtime(self) -> Runtime:
        config = self.config
        if config.runtime.kind is RuntimeKind.LOCAL:
            return LocalRuntime()
        # Imported here so that runtime.kind=local starts without Ray's import.
        from trl_ray.runtime.cluster import RayRuntime
        from trl_ray.runtime.remote import plan_actors

        plans = plan_actors(runtime=config.runtime, rollout=config.rollout, reward=config.reward)
        return RayRuntime(config.runtime, plans)
