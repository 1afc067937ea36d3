"""The pipelines that train a policy on its own completions: `grpo`, `async-grpo`, `rloo`, `sdpo`, `distill`.

prepare -> session: [actors -> loop] -> how it ended          (the rest of a run's life: pipeline.py)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.object_paths import FROM_PYTHON
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.preparation import Inputs, Preparation, prepare
from trl_ray.pipelines.rollouts.reward_model_actors import GivenReward, name_reward_models, separate_reward_models
from trl_ray.pipelines.rollouts.rollout_actors import RolloutActors
from trl_ray.pipelines.rollouts.rollout_loop import RolloutLoop
from trl_ray.pipelines.run.given_objects import GivenFolders, trainer_objects
from trl_ray.pipelines.run.given_rows import given_rows, is_stream
from trl_ray.pipelines.run.own_metrics import ComputeMetrics, named_metrics
from trl_ray.pipelines.run.pipeline import Pipeline
from trl_ray.pipelines.run.recording import Recorder
from trl_ray.pipelines.run.session import Opening, Session, TrainOutput
from trl_ray.pipelines.run.signals import Stop
from trl_ray.pipelines.run.stopping import started
from trl_ray.rewards.reward_registry import function_name
from trl_ray.types import EventKind


class RolloutSession(Session):
    """One life of the actors, from a checkpoint on."""

    recorder: Recorder

    def __init__(
        self, *, preparation: Preparation, actors: RolloutActors, recorder: Recorder, opening: Opening
    ) -> None:
        self._preparation, self._actors, self.recorder, self._opening = preparation, actors, recorder, opening

    async def run(self, stop: Stop) -> TrainOutput:
        actors, recorder, begin = self._actors, self.recorder, time.monotonic()
        for sentence in () if self._opening.resuming else self._preparation.notes:
            recorder.say(EventKind.WARNING, "data", detail=sentence)
        await started(actors.start(), stop=stop, run_dir=recorder.directory.path)
        seconds = round(time.monotonic() - begin, 2)
        recorder.say(EventKind.READY, "driver", detail="all actors are ready", seconds=seconds)
        loop = RolloutLoop(plan=self._preparation, actors=actors, recorder=recorder, opening=self._opening, stop=stop)
        await loop.run()
        await actors.ask_queue("finish")
        recorder.report(await actors.drain())
        snapshot: LedgerSnapshot = await actors.ask_queue("snapshot")
        snapshot = snapshot.with_bad_rows(self._preparation.prompts.num_left_out)
        recorder.directory.write_ledger(snapshot.to_json())
        return TrainOutput(
            steps=loop.step,
            run_dir=recorder.directory.path,
            metrics=dict(recorder.last),
            ledger=snapshot,
            model=loop.model,
            worst_age=recorder.worst_age,
        )

    async def dismiss(self) -> None:
        await self._actors.dismiss()


class RolloutPipeline(Pipeline[RolloutRunConfig, Preparation]):
    """Trains a policy on its own completions: on their rewards, or on what teachers say of them.

    Example::

        pipeline = AsyncGRPOPipeline(
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            reward_funcs=my_reward,              # TRL's signature
            args=AsyncGRPOConfig(max_staleness=2, max_steps=24),
            train_dataset=dataset,
        )
        output = pipeline.train()
    """

    config_class: ClassVar[type[RunConfig]]
    resumes_within: ClassVar[int | None] = 2
    reads_held_out: ClassVar[bool] = False
    objective_class: ClassVar[type[Objective[Any]]]
    """What the pipeline makes of finished groups; with the configuration it is what a pipeline is."""
    _inputs: Inputs

    def __init__(
        self,
        model: object | None = None,
        reward_funcs: GivenReward | Sequence[GivenReward] | None = None,
        args: RolloutRunConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: object | None = None,
        callbacks: Sequence[Any] | None = None,
        *,
        reward_processing_classes: object | Sequence[object] | None = None,
        compute_metrics: ComputeMetrics | None = None,
        **objects: Any,
    ) -> None:
        """Take what TRL's trainer takes; what is None comes from `args`, and `callbacks` follow those of `args`.

        Args:
            model: a name, a folder, or a model of transformers or peft, whose weights are written down once.
            reward_funcs: names, functions, and reward models by folder or as objects.
            args, train_dataset, eval_dataset, peft_config, callbacks: as in TRL.
            reward_processing_classes: tokenizers of the reward models given as objects, one for each of `reward_funcs`.
            compute_metrics: measures answers to held-out prompts, called here with a `RolloutPrediction`.
            objects: the further arguments of TRL's trainers, see `TrainerObjects`.

        Raises:
            ConfigError: `args` is of another pipeline, or an argument is unknown or cannot be had.
            ModelError: `peft_config` is no `peft.LoraConfig`, or asks for what engines cannot be given; a model cannot
                be written down.
        """
        folders = GivenFolders(self.checked(args).output_dir)
        named, written = name_reward_models(reward_funcs, reward_processing_classes, folders)
        separated = separate_reward_models(named, self.checked(args), models=written)
        changes = separated.changes
        if named is not None or changes:
            # Functions given as objects cannot be written to config.yaml; a run of named ones resumes by its folder.
            changes["reward_funcs"] = [
                function if isinstance(function, str) else f"{FROM_PYTHON}{function_name(function)}"
                for function in separated.functions
            ]
        changes["compute_metrics"] = named_metrics(compute_metrics, self.checked(args).compute_metrics)
        super().__init__(
            model=model,
            args=args,
            peft_config=peft_config,
            callbacks=callbacks,
            objects=trainer_objects(**objects),
            folders=folders,
            **changes,
        )
        if is_stream(train_dataset) and self.config.max_steps > 0:
            self.config = self.config.replace(dataset_streaming=True)
        self._inputs = Inputs(
            train_dataset=given_rows(train_dataset),
            eval_dataset=given_rows(eval_dataset, evaluation=self.reads_held_out),
            reward_funcs=separated.given,
            compute_metrics=compute_metrics,
        )

    def _prepare(self) -> Preparation:
        plan = prepare(self.config, self._inputs, objective=self.objective_class(self.config))
        self.config = plan.config
        return plan

    def _announcement(self) -> Mapping[str, Any]:
        return {"staleness_bound": self.config.max_age_at_use}

    def _make_session(self, plan: Preparation, opening: Opening) -> RolloutSession:
        recorder = Recorder(
            directory=opening.directory,
            observer=opening.observer,
            max_age_at_use=self.config.max_age_at_use,
            start_step=opening.step,
        )
        arguments = plan.arguments(
            journal=str(opening.directory.journal),
            checkpoint=opening.checkpoint,
            resume_from=opening.step if opening.resuming else None,
            incarnation=uuid.uuid4().hex,
        )
        if not opening.only_evaluates:  # held-out prompts stand in the place of the run's own
            plan.check_prompts(opening.checkpoint)
        plan.restore_objective(opening.checkpoint)
        actors = RolloutActors(
            runtime=opening.runtime,
            config=self.config,
            arguments=arguments,
            weight_check_ids=plan.weight_check_ids,
            first_check_ids=plan.first_check_ids,
            emit=recorder.emit,
        )
        return RolloutSession(preparation=plan, actors=actors, recorder=recorder, opening=opening)
