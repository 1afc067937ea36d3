"""The loop of steps over a dataset, with a learner whose answers a test writes: order, accounts, stops, resumption."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.work import CutRules
from trl_ray.config.preference import UnpairedLossConfig
from trl_ray.config.supervised import SupervisedLossConfig
from trl_ray.config.supervised_runs import KTOConfig, SFTConfig, SupervisedRunConfig
from trl_ray.data.examples import ExampleTask
from trl_ray.errors import InterruptedRun, LearnerLostError
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.sinks import EventsFile, MetricsFile, Observer
from trl_ray.pipelines.example_feed import Fed, ShuffledFeed
from trl_ray.pipelines.stopping import EarlyStopping
from trl_ray.pipelines.supervised_preparation import SupervisedInputs, SupervisedPlan
from trl_ray.pipelines.supervised_record import Accounts, SupervisedRecorder
from trl_ray.pipelines.supervised_walk import PROGRESS, SupervisedWalk
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
    supervisor: Watch = field(default_factory=Watch)

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        answers = {"step": self._step, "evaluate": self._evaluate, "score": self._score, "save": self._save}
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

    def _save(self, directory: str, *, step: int, extra: Mapping[str, bytes]) -> str:
        self.saved[step] = json.loads(extra[PROGRESS])
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
    """One walk over five examples, two a step, and what it left behind."""

    path: Path
    learner: Learner = field(default_factory=Learner)
    config: SupervisedRunConfig = field(
        default_factory=lambda: SFTConfig(per_device_train_batch_size=2, save_steps=2, shuffle_dataset=False)
    )
    total: int = 6
    held_out: int = 0
    mismatched: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    accounts: Accounts = field(default_factory=Accounts)

    def walk(self) -> SupervisedWalk:
        directory = RunDirectory.create(self.path / "run", overwrite=True)
        observer = Observer([MetricsFile(directory.metrics), EventsFile(directory.events)])
        kto = isinstance(self.config, KTOConfig)
        plan = SupervisedPlan(
            config=self.config,
            task=ExampleTask.UNPAIRED_WITH_KL if kto else ExampleTask.SUPERVISED,
            loss=UnpairedLossConfig() if kto else SupervisedLossConfig(),
            inputs=SupervisedInputs(),
            tokenizer=None,
            train=None,
            evaluation=None,
            total_steps=self.total,
            cut=CutRules(max_examples=2),
            eval_cut=CutRules(max_examples=2),
        )
        crew: Any = self.learner
        return SupervisedWalk(
            plan=plan,
            crew=crew,
            recorder=SupervisedRecorder(directory=directory, observer=observer),
            feed=ShuffledFeed(examples(5, mismatched=self.mismatched), per_step=2, seed=1, shuffle=False),
            held_out=examples(self.held_out, mismatched=self.mismatched),
            accounts=self.accounts,
            stopping=EarlyStopping.of(self.config),
            stop=self.stop,
        )

    def go(self) -> Run:
        asyncio.run(self.walk().run())
        return self

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "run" / name).read_text().splitlines()]

    @property
    def rows(self) -> list[list[int]]:
        return [[one.group_id for one in batch.samples] for batch in self.learner.batches]


def test_steps_take_their_examples_in_order_and_the_ledger_balances(tmp_path: Path) -> None:
    run = Run(tmp_path).go()
    assert run.rows == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]
    last = run.lines("metrics.jsonl")[-1]
    assert (last["ledger/issued"], last["ledger/trained"], last["ledger/dropped"]) == (10, 10, 0)
    assert (last["epoch"], last["tokens/seen"], last["tokens/trained"]) == (2.0, 4, 2)


def test_rows_of_a_skipped_step_are_dropped_with_their_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, learner=Learner(skips=frozenset({2})), total=3).go()
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (ledger["issued"], ledger["trained"], ledger["dropped"]) == (5, 3, {"numerics": 2})
    assert any("not finite" in str(event["detail"]) for event in run.lines("events.jsonl"))


def test_checkpoints_are_written_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, total=5).go()
    assert sorted(run.learner.saved) == [2, 4, 5]
    assert run.learner.saved[4]["accounts"]["trained"] == 7


def test_a_resumed_walk_takes_the_examples_that_follow(tmp_path: Path) -> None:
    whole = Run(tmp_path).go()
    state = whole.learner.saved[4]["accounts"]
    resumed = Run(tmp_path, accounts=Accounts.from_state(state)).go()
    assert resumed.rows == whole.rows[4:]
    assert [batch.step for batch in resumed.learner.batches] == [5, 6]
    assert resumed.lines("metrics.jsonl")[-1]["ledger/issued"] == 10


def test_held_out_examples_are_evaluated_before_the_first_step_and_after_every_so_many(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=2)
    run = Run(tmp_path, config=config, total=5, held_out=3).go()
    told = [
        (e["detail"]["step"], e["detail"]["eval/loss"]) for e in run.lines("events.jsonl") if "evaluated" in e["kind"]
    ]
    assert told == [(0, 5.0), (2, 4.0), (4, 3.0), (5, 2.0)]
    assert [line.get("eval/loss") for line in run.lines("metrics.jsonl")] == [None, 4.0, None, 3.0, 2.0]


def test_it_ends_when_the_held_out_loss_gets_no_better(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=1, early_stopping_patience=2)
    run = Run(tmp_path, config=config, held_out=1, learner=Learner(eval_losses=[3.0, 2.0, 2.5, 2.0, 9.0])).go()
    assert len(run.learner.batches) == 3 and list(run.learner.saved) == [3]
    assert run.learner.saved[3]["stopping"] == {"best": 2.0, "best_step": 1, "worse": 2}


def test_a_stop_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.learner.on_step = lambda step: run.stop.set() if step == 3 else None
    with pytest.raises(InterruptedRun, match="after step 3"):
        run.go()
    assert sorted(run.learner.saved) == [2, 3]


def test_a_lost_learner_ends_the_walk(tmp_path: Path) -> None:
    run = Run(tmp_path, learner=Learner(supervisor=Watch(LearnerLostError("learner died"))))
    with pytest.raises(LearnerLostError, match="learner died"):
        run.go()


def test_kto_gets_the_kl_of_the_weights_as_they_are_at_every_step_and_evaluation(tmp_path: Path) -> None:
    config = KTOConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=3)
    run = Run(tmp_path, config=config, total=3, held_out=2, mismatched=True).go()
    # Two tokens of a nat each above the reference.
    assert [batch.totals["kl"] for batch in run.learner.batches] == [2.0, 2.0, 2.0]
    assert [batch.num_samples for batch in run.learner.scored] == [2, 2, 2, 1, 2]


def test_the_next_examples_are_made_while_the_learner_trains(tmp_path: Path) -> None:
    run, second_made = Run(tmp_path, total=2), threading.Event()
    walk = run.walk()
    take = walk._feed.take

    def note(step: int) -> Fed:
        if step == 2:
            second_made.set()
        return take(step)

    setattr(walk._feed, "take", note)  # noqa: B010
    found: list[bool] = []
    run.learner.on_step = lambda step: found.append(second_made.wait(timeout=10.0))
    asyncio.run(walk.run())
    assert found == [True, True]
