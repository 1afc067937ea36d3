"""A loop over a dataset whose learner is a fake: it counts updates, and answers what a test writes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.algorithms.loss_registry import build_loss
from trl_ray.config.losses.preference_options import UnpairedLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.runs.dataset_config import KTOConfig, SFTConfig, SupervisedRunConfig
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.sinks import EventsFile, MetricsFile, Observer
from trl_ray.pipelines.callbacks.hooks import CallbackList
from trl_ray.pipelines.run.early_stopping import EarlyStopping
from trl_ray.pipelines.run.session import Opening
from trl_ray.pipelines.run.signals import Stop
from trl_ray.pipelines.supervised.dataset_loop import PROGRESS, DatasetLoop
from trl_ray.pipelines.supervised.dataset_preparation import DatasetInputs, SupervisedPlan
from trl_ray.pipelines.supervised.dataset_recording import Accounts, SupervisedRecorder
from trl_ray.pipelines.supervised.example_feed import ShuffledFeed
from trl_ray.runtime.local import LocalRuntime
from trl_ray.types import (
    ActorReport,
    Evaluation,
    Example,
    Metric,
    Reduce,
    SampleLabel,
    SampleScores,
    StepResult,
    TrainBatch,
    TrainingSample,
)


class Watch:
    """A supervisor that finds nothing, or what a test says."""

    def __init__(self, problem: Exception | None = None) -> None:
        self._problem = problem

    async def run(self) -> None:
        if self._problem is not None:
            raise self._problem
        await asyncio.Event().wait()


@dataclass(slots=True, eq=False)
class Learner:
    """Counts updates; writes checkpoints of nothing but what it is given."""

    skips: frozenset[int] = frozenset()
    eval_losses: list[float] = field(default_factory=lambda: [5.0, 4.0, 3.0, 2.0, 1.0])
    on_step: Callable[[int], None] = lambda step: None
    batches: list[TrainBatch] = field(default_factory=list)
    scored: list[TrainBatch] = field(default_factory=list)
    saved: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    files: dict[int, Mapping[str, bytes]] = field(default_factory=dict)
    """What came beside the weights of each checkpoint, by file name."""
    supervisor: Watch = field(default_factory=Watch)
    only_models: list[bool] = field(default_factory=list)
    """Of each checkpoint, in their order."""

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        answers: dict[str, Callable[..., Any]] = {
            "step": self._step,
            "evaluate": self._evaluate,
            "score": self._score,
            "save": self._save,
        }
        return answers[method](*args, **kwargs)

    async def drain(self) -> ActorReport:
        return ActorReport()

    def _step(self, batch: TrainBatch) -> StepResult:
        self.batches.append(batch)
        self.on_step(batch.step)
        skipped = batch.step in self.skips
        tokens = Metric(value=0.0 if skipped else batch.num_valid_tokens, reduce=Reduce.SUM)
        loss = math.nan if skipped else 1.0 / batch.step
        return StepResult(
            version=batch.step, loss=loss, grad_norm=1.0, lr=0.1, skipped=skipped, metrics={"tokens/trained": tokens}
        )

    def _evaluate(self, batch: TrainBatch) -> Evaluation:
        return Evaluation(loss=self.eval_losses.pop(0), metrics={"accuracy": Metric(value=0.5)})

    def _score(self, batch: TrainBatch) -> list[SampleScores]:
        """Every token of the policy is a nat above the reference."""
        self.scored.append(batch)
        ones = np.ones(2, np.float32)
        return [SampleScores(logprobs=-ones, entropy=ones, reference_logprobs=-2 * ones) for _ in batch.samples]

    def _save(self, directory: str, *, step: int, extra: Mapping[str, bytes], only_model: bool = False) -> str:
        Path(directory, f"step-{step}").mkdir()
        self.saved[step] = json.loads(extra[PROGRESS])
        self.only_models.append(only_model)
        self.files[step] = extra
        return f"{directory}/step-{step}"


def sample(row: int) -> TrainingSample:
    return TrainingSample(
        group_id=row,
        prompt_ids=np.array([1, row], np.int32),
        completion_ids=np.array([2, 3], np.int32),
        loss_mask=np.ones(2, np.bool_),
        label=SampleLabel(desirable=row % 2 == 0),
    )


def examples(count: int, *, mismatched: bool = False) -> list[Example]:
    return [
        Example(row=row, samples=(sample(row),), mismatched=sample(row) if mismatched else None) for row in range(count)
    ]


@dataclass(slots=True, eq=False)
class Run:
    """One loop over five examples, two a step, and what it left behind."""

    path: Path
    learner: Learner = field(default_factory=Learner)
    config: SupervisedRunConfig = field(
        default_factory=lambda: SFTConfig(per_device_train_batch_size=2, save_steps=2, shuffle_dataset=False)
    )
    total: int = 6
    held_out: int = 0
    sets: dict[str, list[Example]] = field(default_factory=dict)
    """Held-out sets with names, instead."""
    mismatched: bool = False
    stop: Stop = field(default_factory=Stop)
    accounts: Accounts = field(default_factory=Accounts)
    callbacks: list[Any] = field(default_factory=list)
    checkpoint: str | None = None

    def _examples(self, count: int) -> list[Example]:
        return examples(count, mismatched=self.mismatched)

    def loop(self) -> DatasetLoop:
        directory = RunDirectory.create(self.path / "run", overwrite=True)
        observer = Observer([MetricsFile(directory.metrics), EventsFile(directory.events)])
        kto = isinstance(self.config, KTOConfig)
        loss = UnpairedLossConfig() if kto else SupervisedLossConfig()
        plan = SupervisedPlan(
            config=self.config,
            task=ExampleTask.UNPAIRED_WITH_KL if kto else ExampleTask.SUPERVISED,
            loss=loss,
            built=build_loss(loss),
            inputs=DatasetInputs(),
            tokenizer=None,
            train=None,
            held_out={},
            total_steps=self.total,
            cut=CutRules(max_examples=2),
            eval_cut=CutRules(max_examples=2),
        )
        opening = Opening(
            runtime=LocalRuntime(),
            directory=directory,
            observer=observer,
            checkpoint=self.checkpoint,
            step=self.accounts.step,
            resuming=False,
            callbacks=CallbackList(self.callbacks, args=self.config),
        )
        actors: Any = self.learner
        return DatasetLoop(
            plan=plan,
            actors=actors,
            recorder=SupervisedRecorder(directory=directory, observer=observer),
            opening=opening,
            feed=ShuffledFeed(examples(5, mismatched=self.mismatched), per_step=2, seed=1, shuffle=False),
            held_out=self.sets or ({"": self._examples(self.held_out)} if self.held_out else {}),
            accounts=self.accounts,
            stopping=EarlyStopping.of(self.config),
            stop=self.stop,
        )

    def go(self) -> Run:
        asyncio.run(self.loop().run())
        return self

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "run" / name).read_text().splitlines()]

    @property
    def rows(self) -> list[list[int]]:
        return [[one.group_id for one in batch.samples] for batch in self.learner.batches]
