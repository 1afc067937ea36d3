"""The loop of pipelines that train on datasets: one step after the other, the next step's examples made meanwhile.

feed --thread: take, cut--> _Ready --> learner.step --> metrics, evaluation, checkpoint
          ^ step k+1 while the learner trains step k

_train   consumes: the examples of a step.  produces: weights, a metrics line.  waits for: the examples, the learner.
         unblocked by: the thread's answer; the learner's, or its loss.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from trl_ray.algorithms.batches.example_batches import example_batch, mismatched_batch, mismatched_kl
from trl_ray.algorithms.loss_registry import update_totals
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.errors import InputError, InterruptedRun
from trl_ray.models.checkpoint import prune
from trl_ray.pipelines.callbacks.hooks import CallbackList, TrainingSpan
from trl_ray.pipelines.run.learner_actors import LearnerActors, under_watch
from trl_ray.pipelines.run.signals import heed_signals
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


class DatasetLoop:
    """Trains from a checkpoint to the end.

    Args:
        plan: of the run.
        actors: started.
        recorder: takes what happens.
        feed: of the examples, at the place of `accounts`.
        held_out: examples to evaluate on; empty for none.
        accounts, stopping: as the checkpoint left them.
        callbacks: of the run.
        checkpoint: that training goes on from.
        stop: ends the run in order once it is set.
    """

    def __init__(
        self,
        *,
        plan: SupervisedPlan,
        actors: LearnerActors,
        recorder: SupervisedRecorder,
        feed: Feed,
        held_out: Sequence[Example],
        accounts: Accounts,
        stopping: EarlyStopping,
        callbacks: CallbackList,
        checkpoint: str | None,
        stop: asyncio.Event,
    ) -> None:
        self._plan, self._config, self._actors, self._recorder = plan, plan.config, actors, recorder
        self._feed, self._stop, self._stopping = feed, stop, stopping
        self._callbacks, self._checkpoint = callbacks, checkpoint
        self.accounts = accounts
        self._saved = accounts.step
        self._held_out = held_out
        self._evaluation = self._update(held_out, step=1, is_training=False) if held_out else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")

    @property
    def _place(self) -> int:
        """Steps in the dataset's order that are trained or left out."""
        return self.accounts.step + self.accounts.left_out

    @property
    def _is_over(self) -> bool:
        stops = self._stopping.is_due or self._callbacks.control.should_training_stop
        return stops or self._place >= self._plan.total_steps

    async def _begin(self) -> None:
        """Tell callbacks that the session starts, and where."""
        total, per_epoch = self._plan.total_steps, None
        if isinstance(self._feed, ShuffledFeed):
            per_epoch = self._feed.steps_per_epoch
        epochs = self._config.num_train_epochs if per_epoch is None else total / per_epoch
        streamed = self.accounts.place.epoch if self.accounts.place is not None else 0
        span = TrainingSpan(
            step=self.accounts.step,
            max_steps=total,
            epoch=float(streamed) if per_epoch is None else self._place / per_epoch,
            num_train_epochs=math.ceil(epochs),
            checkpoints=self._recorder.directory.checkpoints,
            can_evaluate=self._evaluation is not None,
            can_stop_epoch=per_epoch is not None,
        )
        await self._callbacks.begin(span, checkpoint=self._checkpoint, say=self._recorder.say)
        self._callbacks.set_best(self._stopping.best, self._stopping.best_step)

    async def run(self) -> None:
        """Train to the last step.

        Raises:
            InterruptedRun: the stop event was set; a checkpoint was written.
            LearnerLostError: the learner died or hung.
            InputError: a row of a stream cannot be used; what was trained before it is saved.
            RunError: whatever else ended training.
        """
        try:
            await under_watch(self._actors.supervisor, self._train())
        finally:
            self._thread.shutdown(cancel_futures=True)

    async def _train(self) -> None:
        await self._begin()
        if self.accounts.step == 0:
            await self._evaluate()
        coming = self._coming(self.accounts.step + 1)
        while not self._is_over:
            await self._callbacks.step_begin()
            step, left_out, begin = self.accounts.step + 1, self.accounts.left_out, time.time()
            ready = await self._arrived(coming)
            fed = time.time()
            if self._place + 1 < self._plan.total_steps:
                coming = self._coming(step + 1)
            result = await self._step(ready.update)
            trained = time.time()
            self.accounts.advance(ready.fed, step=step, skipped=result.skipped)
            times = SupervisedTimes(begin=begin, fed=fed, trained=trained)
            await self._finish(ready.fed, result, times)
            if self.accounts.left_out > left_out and not self._is_over:
                coming = self._coming(step + 1)
        if self._saved != self.accounts.step or not self.accounts.step:
            await self.save()
        await self._callbacks.train_end()

    async def _finish(self, fed: Fed, result: StepResult, times: SupervisedTimes) -> None:
        """What follows a step: evaluation, its line, a checkpoint, and perhaps the end."""
        config, step, control = self._config, self.accounts.step, self._callbacks.control
        await self._callbacks.step_end(step=step, epoch=fed.epoch)
        evaluates = config.eval_steps > 0 and (step % config.eval_steps == 0 or self._place >= self._plan.total_steps)
        evaluated = await self._evaluate() if evaluates or control.should_evaluate else {}
        self._recorder.report(await self._actors.drain())
        self._recorder.step(step, fed=fed, result=result, times=times, accounts=self.accounts, evaluated=evaluated)
        if result.skipped:
            self._recorder.say(
                EventKind.WARNING,
                "learner",
                step=step,
                detail="loss or gradients were not finite; the step was skipped and its rows dropped",
            )
        await self._tell_log()
        if self._is_over:
            self._say_stopping()
            return
        if control.should_save or (config.save_steps and step % config.save_steps == 0):
            await self.save()
        await heed_signals()
        if self._stop.is_set():
            await self._interrupt()

    async def _tell_log(self) -> None:
        """Show callbacks the line of the step and the end of its epoch, and do at once what they ask for then."""
        callbacks = self._callbacks
        await callbacks.logged(self._recorder.last)
        await callbacks.epoch_end()
        if callbacks.control.should_evaluate:
            await self._evaluate()
        if callbacks.control.should_epoch_stop and isinstance(self._feed, ShuffledFeed):
            self.accounts.left_out += -self._place % self._feed.steps_per_epoch

    def _coming(self, step: int) -> asyncio.Future[_Ready]:
        """Make a step's examples on the thread, from now on."""
        place = step + self.accounts.left_out
        return asyncio.get_running_loop().run_in_executor(self._thread, self._ready, step, place)

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

    async def _step(self, update: _Update) -> StepResult:
        result: StepResult = await self._actors.ask("step", await self._with_kl(update))
        return result

    async def _with_kl(self, update: _Update) -> TrainBatch:
        """The batch, with the KL under the weights as they are where its loss asks for it."""
        if update.mismatched is None:
            return update.batch
        scores = await self._actors.ask("score", update.mismatched)
        kl = mismatched_kl(update.mismatched, scores)
        return replace(update.batch, totals={**update.batch.totals, "kl": kl})

    async def _evaluate(self) -> Mapping[str, float]:
        """The held-out metrics under the weights as they are; empty where there is nothing to evaluate on."""
        if self._evaluation is None:
            return {}
        begin, step = time.time(), self.accounts.step
        evaluation: Evaluation = await self._actors.ask("evaluate", await self._with_kl(self._evaluation))
        numbers = self._recorder.evaluated(step, evaluation, examples=len(self._held_out), begin=begin)
        self._stopping.observe(step, numbers)
        best = self._stopping.best
        await self._callbacks.evaluated(numbers, best=best, best_step=self._stopping.best_step)
        return numbers

    def _say_stopping(self) -> None:
        """Why training ends before its last step, if it does."""
        stopping, stopped_by = self._stopping, self._callbacks.stopped_by
        if stopped_by is not None:
            detail = f"training ends early: the callback {stopped_by} asked for it"
            self._recorder.say(EventKind.WARNING, "driver", step=self.accounts.step, detail=detail)
        if not stopping.is_due:
            return
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
        extra |= self._callbacks.files()
        await self._actors.ask("save", str(path.parent), step=step, extra=extra)
        self._saved = step
        self._recorder.checkpoint(path, step=step, seconds=time.time() - begin)
        if self._config.save_total_limit is not None:
            prune(path.parent, keep=self._config.save_total_limit)
        await self._callbacks.saved()

    async def _interrupt(self) -> None:
        if self._saved != self.accounts.step:
            await self.save()
        raise InterruptedRun(
            f"interrupted after step {self.accounts.step}; go on with: trl-ray resume {self._recorder.directory.path}"
        )
