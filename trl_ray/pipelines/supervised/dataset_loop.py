"""The loop of pipelines that train on datasets: one step after the other, the next step's examples made meanwhile.

feed --thread: take, cut--> _Ready --> learner.step --> evaluation, metrics, checkpoint        (the rest: step_loop.py)
          ^ step k+1 while the learner trains step k
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from trl_ray.algorithms.batches.example_batches import example_batch, mismatched_batch, mismatched_kl
from trl_ray.algorithms.loss_registry import update_totals
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.errors import InputError
from trl_ray.pipelines.run.learner_actors import LearnerActors, under_watch
from trl_ray.pipelines.run.pipeline import Opening
from trl_ray.pipelines.run.signals import heed_signals
from trl_ray.pipelines.run.step_loop import StepLoop, TrainedStep
from trl_ray.pipelines.supervised.dataset_preparation import SupervisedPlan
from trl_ray.pipelines.supervised.dataset_recording import Accounts, SupervisedRecorder, SupervisedTimes
from trl_ray.pipelines.supervised.early_stopping import EarlyStopping
from trl_ray.pipelines.supervised.example_feed import Fed, Feed, ShuffledFeed
from trl_ray.types import Evaluation, EventKind, Example, StepResult, TrainBatch

PROGRESS = "progress.json"
"""In checkpoints: what the loop goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Update:
    """Examples as the learner takes them."""

    batch: TrainBatch
    mismatched: TrainBatch | None
    """What the KL of the update is estimated on, where its loss asks for one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ready:
    """A step that can be trained."""

    fed: Fed
    update: _Update


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trained(TrainedStep):
    fed: Fed
    times: SupervisedTimes


class DatasetLoop(StepLoop[_Trained]):
    """Trains on a dataset; evaluates before a step's line, which has the numbers in it.

    consumes: the examples of a step.  waits for: the examples, the learner.
    unblocked by: the thread's answer; the learner's, or its loss.

    Args:
        plan, recorder, opening, stop: see `StepLoop`.
        actors: started.
        feed: of the examples, at the place of `accounts`.
        held_out: examples to evaluate on; empty for none.
        accounts, stopping: as the checkpoint left them.
    """

    _plan: SupervisedPlan
    _config: SupervisedRunConfig
    _recorder: SupervisedRecorder

    def __init__(
        self,
        *,
        plan: SupervisedPlan,
        actors: LearnerActors,
        recorder: SupervisedRecorder,
        opening: Opening,
        feed: Feed,
        held_out: Sequence[Example],
        accounts: Accounts,
        stopping: EarlyStopping,
        stop: asyncio.Event,
    ) -> None:
        super().__init__(plan=plan, recorder=recorder, opening=opening, can_evaluate=bool(held_out), stop=stop)
        self._actors, self._feed, self._stopping, self._held_out = actors, feed, stopping, held_out
        self.accounts = accounts
        self._evaluation = self._update(held_out, step=1, is_training=False) if held_out else None
        self._coming: asyncio.Future[_Ready] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")

    @property
    def _place(self) -> int:
        return self.step + self.accounts.left_out

    @property
    def _is_over(self) -> bool:
        return self._stopping.is_due or super()._is_over

    @property
    def _evaluation_is_due(self) -> bool:
        ends = self._config.eval_steps > 0 and self._place >= self._plan.total_steps
        return super()._evaluation_is_due or (self._can_evaluate and ends)

    async def run(self) -> None:
        """Train to the last step; see `StepLoop.run`.

        Raises:
            InputError: a row of a stream cannot be used; what was trained before it is saved.
        """
        try:
            await under_watch(self._actors.supervisor, self._begin_and_train())
        finally:
            self._thread.shutdown(cancel_futures=True)

    async def _begin_and_train(self) -> None:
        if in_memory := isinstance(self._feed, ShuffledFeed):
            per_epoch = self._feed.steps_per_epoch
            epoch, epochs = self._place / per_epoch, self._plan.total_steps / per_epoch
        else:
            streamed = self.accounts.place
            epoch, epochs = float(streamed.epoch) if streamed is not None else 0.0, self._config.num_train_epochs
        await self._begin(epoch=epoch, num_train_epochs=math.ceil(epochs), can_stop_epoch=in_memory)
        self._callbacks.set_best(self._stopping.best, self._stopping.best_step)
        await self._train()

    async def _train_step(self, step: int) -> _Trained:
        begin = time.time()
        ready = await self._arrived(self._coming or self._make(step))
        fed = time.time()
        self._coming = self._make(step + 1) if self._place + 1 < self._plan.total_steps else None
        result: StepResult = await self._actors.ask("step", await self._with_kl(ready.update))
        trained = time.time()
        self.accounts.advance(ready.fed, step=step, skipped=result.skipped)
        times = SupervisedTimes(begin=begin, fed=fed, trained=trained)
        return _Trained(epoch=ready.fed.epoch, result=result, fed=ready.fed, times=times)

    async def _report(self, trained: _Trained) -> None:
        evaluated = await self._evaluate() if self._evaluation_is_due else {}
        self._recorder.report(await self._actors.drain())
        self._recorder.step(
            self.step,
            fed=trained.fed,
            result=trained.result,
            times=trained.times,
            accounts=self.accounts,
            evaluated=evaluated,
        )
        if trained.result.skipped:
            self._say_skipped(self.step, "rows")
        await self._callbacks.logged(self._recorder.last)

    def _leave_epoch(self) -> None:
        assert isinstance(self._feed, ShuffledFeed), "callbacks may not leave the epoch of a stream"
        left_out = -self._place % self._feed.steps_per_epoch
        if left_out:
            self.accounts.left_out += left_out
            self._coming = None

    async def _heed_stop(self) -> None:
        await heed_signals()
        await super()._heed_stop()

    def _make(self, step: int) -> asyncio.Future[_Ready]:
        """Make a step's examples on the thread, from now on."""
        place = step + self.accounts.left_out
        return asyncio.get_running_loop().run_in_executor(self._thread, self._ready, step, place)

    async def _arrived(self, coming: asyncio.Future[_Ready]) -> _Ready:
        """The examples of the step; before a row that cannot be used, what was trained is saved."""
        try:
            return await coming
        except InputError as error:
            if not self.step:
                raise
            await self._save_last()
            path = self._recorder.directory.path
            raise type(error)(
                f"{error} {self.step} steps were trained before it and are kept; once it is mended, go on "
                f"with: trl-ray resume {path}"
            ) from error

    def _ready(self, step: int, place: int) -> _Ready:
        fed = self._feed.take(place)
        return _Ready(fed=fed, update=self._update(fed.examples, step=step, is_training=True))

    def _update(self, examples: Sequence[Example], *, step: int, is_training: bool) -> _Update:
        plan = self._plan
        rules = plan.cut if is_training else plan.eval_cut
        totals = update_totals(plan.loss, [sample for example in examples for sample in example.samples])
        asks_kl = plan.task is ExampleTask.UNPAIRED_WITH_KL
        return _Update(
            batch=example_batch(examples, step=step, rules=rules, totals=totals),
            mismatched=mismatched_batch(examples, step=step, rules=rules) if asks_kl else None,
        )

    async def _with_kl(self, update: _Update) -> TrainBatch:
        """The batch, with the KL under the weights as they are where its loss asks for it."""
        if update.mismatched is None:
            return update.batch
        scores = await self._actors.ask("score", update.mismatched)
        kl = mismatched_kl(update.mismatched, scores)
        return replace(update.batch, totals={**update.batch.totals, "kl": kl})

    async def _evaluate(self) -> Mapping[str, float]:
        assert self._evaluation is not None, "there is something to evaluate on"
        begin, stopping = time.time(), self._stopping
        evaluation: Evaluation = await self._actors.ask("evaluate", await self._with_kl(self._evaluation))
        numbers = self._recorder.evaluated(self.step, evaluation, examples=len(self._held_out), begin=begin)
        stopping.observe(self.step, numbers)
        await self._callbacks.evaluated(numbers, best=stopping.best, best_step=stopping.best_step)
        return numbers

    def _say_why_over(self) -> None:
        super()._say_why_over()
        stopping = self._stopping
        if stopping.is_due:
            self._recorder.say(
                EventKind.WARNING,
                "driver",
                step=self.step,
                detail=f"training ends early: eval/{stopping.metric} was no better {stopping.worse} times in a row",
                best=stopping.best,
                best_step=stopping.best_step,
            )

    async def _state_files(self) -> Mapping[str, bytes]:
        train = self._plan.train
        progress = {
            "accounts": self.accounts.state_dict(),
            "stopping": self._stopping.state_dict(),
            "examples": None if train is None else len(train),
        }
        ledger = self.accounts.snapshot().to_json()
        return {PROGRESS: json.dumps(progress).encode(), "ledger.json": json.dumps(ledger).encode()}

    async def _write_checkpoint(self, path: Path, files: Mapping[str, bytes]) -> None:
        await self._actors.ask("save", str(path.parent), step=self.step, extra=files)
