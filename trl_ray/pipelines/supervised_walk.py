"""The walk of a datum from a dataset: one loop of steps, with the next step's examples made meanwhile.

feed --thread: take, cut--> _Ready --> learner.step --> metrics, evaluation, checkpoint
          ^ step k+1 while the learner trains step k

_train   consumes: the examples of a step.  produces: weights, a metrics line.  waits for: the examples, the learner.
         unblocked by: the thread's answer; the learner's, or its loss.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from trl_ray.algorithms.example_batches import example_batch, mismatched_batch, mismatched_kl
from trl_ray.algorithms.losses import update_totals
from trl_ray.data.examples import ExampleTask
from trl_ray.errors import InputError, InterruptedRun
from trl_ray.models.checkpoint import prune
from trl_ray.pipelines.example_feed import Fed, Feed
from trl_ray.pipelines.learner_crew import LearnerCrew, under_watch
from trl_ray.pipelines.signals import heed_signals
from trl_ray.pipelines.stopping import EarlyStopping
from trl_ray.pipelines.supervised_preparation import SupervisedPlan
from trl_ray.pipelines.supervised_record import Accounts, SupervisedRecorder, SupervisedTimes
from trl_ray.types import Evaluation, EventKind, Example, StepResult, TrainBatch

PROGRESS = "progress.json"
"""In checkpoints: what the walk goes on from."""


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


class SupervisedWalk:
    """Trains from a checkpoint to the end.

    Args:
        plan: of the run.
        crew: started.
        recorder: takes what happens.
        feed: of the examples, at the place of `accounts`.
        held_out: examples to evaluate on; empty for none.
        accounts, stopping: as the checkpoint left them.
        stop: ends the run in order once it is set.
    """

    def __init__(
        self,
        *,
        plan: SupervisedPlan,
        crew: LearnerCrew,
        recorder: SupervisedRecorder,
        feed: Feed,
        held_out: Sequence[Example],
        accounts: Accounts,
        stopping: EarlyStopping,
        stop: asyncio.Event,
    ) -> None:
        self._plan, self._config, self._crew, self._recorder = plan, plan.config, crew, recorder
        self._feed, self._stop, self._stopping = feed, stop, stopping
        self.accounts = accounts
        self._saved = accounts.step
        self._held_out = held_out
        self._evaluation = self._update(held_out, step=1, is_training=False) if held_out else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")

    async def run(self) -> None:
        """Train to the last step.

        Raises:
            InterruptedRun: the stop event was set; a checkpoint was written.
            LearnerLostError: the learner died or hung.
            InputError: a row of a stream cannot be used; what was trained before it is saved.
            RunError: whatever else ended training.
        """
        try:
            await under_watch(self._crew.supervisor, self._train())
        finally:
            self._thread.shutdown(cancel_futures=True)

    async def _train(self) -> None:
        """See the module."""
        total = self._plan.total_steps
        if self.accounts.step == 0:
            await self._evaluate()
        coming = self._coming(self.accounts.step + 1)
        while self.accounts.step < total and not self._stopping.is_due:
            step, begin = self.accounts.step + 1, time.time()
            ready = await self._arrived(coming)
            fed = time.time()
            if step < total:
                coming = self._coming(step + 1)
            result = await self._step(ready.update)
            trained = time.time()
            self.accounts.advance(ready.fed, step=step, skipped=result.skipped)
            times = SupervisedTimes(begin=begin, fed=fed, trained=trained)
            await self._finish(ready.fed, result, times)
        await self.save()

    async def _finish(self, fed: Fed, result: StepResult, times: SupervisedTimes) -> None:
        """What follows a step: evaluation, its line, a checkpoint, and perhaps the end."""
        config, step, total = self._config, self.accounts.step, self._plan.total_steps
        evaluates = config.eval_steps > 0 and (step % config.eval_steps == 0 or step == total)
        evaluated = await self._evaluate() if evaluates else {}
        self._recorder.report(await self._crew.drain())
        self._recorder.step(step, fed=fed, result=result, times=times, accounts=self.accounts, evaluated=evaluated)
        if result.skipped:
            self._recorder.say(
                EventKind.WARNING,
                "learner",
                step=step,
                detail="loss or gradients were not finite; the step was skipped and its rows dropped",
            )
        if self._stopping.is_due:
            self._say_stopping()
            return
        if config.save_steps and step % config.save_steps == 0 and step < total:
            await self.save()
        await heed_signals()
        if self._stop.is_set() and step < total:
            await self._interrupt()

    def _coming(self, step: int) -> asyncio.Future[_Ready]:
        """Make a step's examples on the thread, from now on."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self._ready, step)

    async def _arrived(self, coming: asyncio.Future[_Ready]) -> _Ready:
        """The examples of the step; before a row that cannot be used, what was trained is saved."""
        try:
            return await coming
        except InputError as error:
            if not self.accounts.step:
                raise
            if self._saved != self.accounts.step:
                await self.save()
            path = self._recorder.directory.path
            raise type(error)(
                f"{error} {self.accounts.step} steps were trained before it and are kept; once it is mended, go on "
                f"with: trl-ray resume {path}"
            ) from error

    def _ready(self, step: int) -> _Ready:
        fed = self._feed.take(step)
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

    async def _step(self, update: _Update) -> StepResult:
        result: StepResult = await self._crew.ask("step", await self._with_kl(update))
        return result

    async def _with_kl(self, update: _Update) -> TrainBatch:
        """The batch, with the KL under the weights as they are where its loss asks for it."""
        if update.mismatched is None:
            return update.batch
        scores = await self._crew.ask("score", update.mismatched)
        kl = mismatched_kl(update.mismatched, scores)
        return replace(update.batch, totals={**update.batch.totals, "kl": kl})

    async def _evaluate(self) -> Mapping[str, float]:
        """The held-out metrics under the weights as they are; empty where there is nothing to evaluate on."""
        if self._evaluation is None:
            return {}
        begin, step = time.time(), self.accounts.step
        evaluation: Evaluation = await self._crew.ask("evaluate", await self._with_kl(self._evaluation))
        numbers = self._recorder.evaluated(step, evaluation, examples=len(self._held_out), begin=begin)
        self._stopping.observe(step, numbers)
        return numbers

    def _say_stopping(self) -> None:
        stopping = self._stopping
        self._recorder.say(
            EventKind.WARNING,
            "driver",
            step=self.accounts.step,
            detail=f"training ends early: eval/{stopping.metric} was no better {stopping.worse} times in a row",
            best=stopping.best,
            best_step=stopping.best_step,
        )

    async def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        step, begin = self.accounts.step, time.time()
        path = self._recorder.directory.checkpoint(step)
        train = self._plan.train
        progress = {
            "accounts": self.accounts.state_dict(),
            "stopping": self._stopping.state_dict(),
            "examples": None if train is None else len(train),
        }
        ledger = self.accounts.snapshot().to_json()
        extra = {PROGRESS: json.dumps(progress).encode(), "ledger.json": json.dumps(ledger).encode()}
        await self._crew.ask("save", str(path.parent), step=step, extra=extra)
        self._saved = step
        self._recorder.checkpoint(path, step=step, seconds=time.time() - begin)
        if self._config.save_total_limit is not None:
            prune(path.parent, keep=self._config.save_total_limit)

    async def _interrupt(self) -> None:
        if self._saved != self.accounts.step:
            await self.save()
        raise InterruptedRun(
            f"interrupted after step {self.accounts.step}; go on with: trl-ray resume {self._recorder.directory.path}"
        )
