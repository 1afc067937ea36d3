"""The loop of optimizer steps, the same for rollouts and datasets: steps, epochs, checkpoints, interruption, the end.

[evaluate ->] [step_begin -> _train_step -> step_end -> _report -> epoch_end -> checkpoint] -> last checkpoint
                 ^                                                             |
                 '------------------ until _is_over ---------------------------+--> InterruptedRun, if stop is set
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from trl_ray.config.runs.cadence_options import SaveStrategy, Strategy
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.step_counts import steps_of
from trl_ray.models.checkpoint import prune
from trl_ray.pipelines.callbacks.hooks import TrainingSpan
from trl_ray.pipelines.run.early_stopping import EarlyStopping
from trl_ray.pipelines.run.recording import RunRecorder
from trl_ray.pipelines.run.session import Opening, Plan
from trl_ray.pipelines.run.signals import Stop, StopRequested, unless
from trl_ray.pipelines.run.stopping import what_is_left
from trl_ray.types import EventKind, StepResult


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedStep:
    """What a step leaves for its line; each loop adds its own."""

    epoch: float
    """Passes over the dataset that are done after it."""
    result: StepResult


TrainedT = TypeVar("TrainedT", bound=TrainedStep)


class StepLoop(ABC, Generic[TrainedT]):
    """Trains from a checkpoint to the end.

    consumes: what a step is trained on.  produces: weights, a metrics line a step, checkpoints.
    waits for: `_train_step`, and callbacks.  unblocked by: whatever the subclass waits for; `stop` after a step.

    Args:
        plan: of the run.
        recorder: takes what happens.
        opening: what the session starts from.
        stopping: the best evaluation, as the checkpoint left it.
        can_evaluate: whether there is something to evaluate on.
        stop: ends the run in order once it is set.
    """

    _plan: Plan
    _config: RunConfig
    _recorder: RunRecorder

    def __init__(
        self,
        *,
        plan: Plan,
        recorder: RunRecorder,
        opening: Opening,
        stopping: EarlyStopping,
        can_evaluate: bool,
        stop: Stop,
    ) -> None:
        self._plan, self._config, self._recorder, self._stop = plan, plan.config, recorder, stop
        self._opening, self._callbacks, self._can_evaluate = opening, opening.callbacks, can_evaluate
        self._stopping = stopping
        self.step = self._saved = opening.step  # finished optimizer steps, and those in the newest checkpoint
        self._epoch, self._epoch_ended = 0.0, False
        self._save_seconds = 0.0
        """What the last checkpoint took."""

    @abstractmethod
    async def run(self) -> None:
        """Train to the last step.

        Raises:
            InterruptedRun: the stop event was set; a checkpoint was written if there was time.
            LearnerLostError: the learner died or hung.
            RunError: whatever else ended training.
        """

    @abstractmethod
    async def _train_step(self, step: int) -> TrainedT:
        """Wait for what the step is trained on, and train it."""

    @abstractmethod
    async def _report(self, trained: TrainedT) -> None:
        """Write the step's line and show it to callbacks, and evaluate before or after if that is due."""

    @abstractmethod
    async def _evaluate(self) -> Mapping[str, float]:
        """The held-out numbers under the weights as they are, written down and told to callbacks."""

    @abstractmethod
    async def _write_checkpoint(self, path: Path) -> None:
        """Have the learner write a checkpoint, with what the loop and its callbacks go on from."""

    @property
    def _place(self) -> int:
        """Steps of the plan that are trained or left out."""
        return self.step

    @property
    def _is_over(self) -> bool:
        control = self._callbacks.control
        return self._stopping.is_due or control.should_training_stop or self._place >= self._plan.total_steps

    @property
    def _evaluation_is_due(self) -> bool:
        """Whether the step that was trained last is evaluated."""
        config = self._config
        if not self._can_evaluate:
            return False
        if self._callbacks.control.should_evaluate:
            return True
        if config.evaluation is Strategy.EPOCH:
            return self._epoch_ended and self._epoch >= config.eval_delay
        return config.evaluates and self._comes_now(config.eval_steps) and self.step >= config.eval_delay

    @property
    def _checkpoint_is_due(self) -> bool:
        """Whether a checkpoint of the last finished step is wanted."""
        if self._callbacks.control.should_save:
            return True
        match self._config.save_strategy:
            case SaveStrategy.STEPS:
                return self._comes_now(self._config.save_steps)
            case SaveStrategy.EPOCH:
                return self._epoch_ended
            case SaveStrategy.BEST:
                return self._stopping.was_best(self.step)
            case SaveStrategy.NO:
                return False

    def _leave_epoch(self) -> None:
        """A callback leaves out what is left of the epoch; it is refused that where it cannot be done."""

    def _say_why_over(self) -> None:
        """Why training ends before its last step, if it does."""
        if (name := self._callbacks.stopped_by) is not None:
            detail = f"training ends early: the callback {name} asked for it"
            self._recorder.say(EventKind.WARNING, "driver", step=self.step, detail=detail)
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

    async def _judge(self, numbers: Mapping[str, float]) -> None:
        """See whether the held-out numbers are the best so far, and tell callbacks of both."""
        stopping = self._stopping
        if self.step or not stopping.is_needed:  # the initial weights are in no checkpoint
            stopping.observe(self.step, numbers)
        await self._callbacks.evaluated(numbers, best=stopping.best, best_step=stopping.best_step)

    async def _begin(self, *, epoch: float, num_train_epochs: int, can_stop_epoch: bool) -> None:
        """Tell callbacks that the session starts, and where."""
        span = TrainingSpan(
            step=self.step,
            max_steps=self._plan.total_steps,
            epoch=epoch,
            num_train_epochs=num_train_epochs,
            checkpoints=self._recorder.directory.checkpoints,
            can_evaluate=self._can_evaluate,
            can_stop_epoch=can_stop_epoch,
        )
        self._epoch = epoch
        await self._callbacks.begin(span, checkpoint=self._opening.checkpoint, say=self._recorder.say)
        self._callbacks.set_best(self._stopping.best, self._stopping.best_step)

    async def _train(self) -> None:
        """All steps that are left, and the last checkpoint."""
        if self._opening.only_evaluates:
            await self._evaluate()
            return
        self._recorder.begin()
        if self.step == 0 and self._can_evaluate and self._config.evaluates_first:
            await self._evaluate_in_time()
            await self._heed_stop()
        while not self._is_over:
            await self._callbacks.step_begin()
            trained = await self._train_step(self.step + 1)
            self.step += 1
            self._enter_epoch(trained.epoch)
            await self._callbacks.step_end(step=self.step, epoch=trained.epoch, lr=trained.result.lr)
            await self._report(trained)
            await self._finish_step()
        await self._save_last()
        self._say_which_model()
        await self._callbacks.train_end()

    def _say_which_model(self) -> None:
        """Which checkpoint has the run's model, where it is not simply the last."""
        if not self._config.load_best_model_at_end:
            return
        best, step = self._best_checkpoint, self._stopping.best_step
        if best is None:
            detail = "the model of the run is the last one: the best evaluation has no checkpoint"
            self._recorder.say(EventKind.WARNING, "driver", step=self.step, detail=detail, best_step=step)
        else:
            detail = f"the model of the run is the best one, {best.name}"
            self._recorder.say(EventKind.SLOTS, "driver", detail=detail, best=self._stopping.best)

    def _enter_epoch(self, epoch: float) -> None:
        """Know whether the step was the last of its epoch, or of all."""
        before, self._epoch = self._epoch, epoch
        self._epoch_ended = math.floor(epoch) > math.floor(before) or self._place >= self._plan.total_steps

    async def _finish_step(self) -> None:
        """What follows the line of a step: the end of its epoch, a checkpoint, and perhaps the end."""
        control = self._callbacks.control
        await self._callbacks.epoch_end()
        ends_here = control.should_epoch_stop and not self._epoch_ended
        if self._can_evaluate and (
            control.should_evaluate or (ends_here and self._config.evaluation is Strategy.EPOCH)
        ):
            await self._evaluate_in_time()
        if control.should_epoch_stop:
            self._epoch, self._epoch_ended = float(math.ceil(self._epoch)), True
            self._leave_epoch()
        if self._is_over:
            self._say_why_over()
            return
        if self._checkpoint_is_due:
            await self.save()
        await self._heed_stop()

    def _comes_now(self, count: int | float) -> bool:
        """Whether what comes every so many steps comes after this one; with 0 it never does."""
        every = steps_of(count, self._plan.total_steps)
        return every > 0 and self.step % every == 0

    async def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        step, begin = self.step, time.monotonic()
        path = self._recorder.directory.checkpoint(step)
        self._recorder.guard()
        await self._write_checkpoint(path)
        self._saved, self._save_seconds = step, time.monotonic() - begin
        self._recorder.checkpoint(path, step=step, seconds=self._save_seconds)
        self._recorder.tell_of_grace(self._save_seconds, grace=self._stop.grace_s, is_measured=True)
        if self._config.save_total_limit is not None and not self._stop.is_set():
            # Reads the newest one whole, which may take a while: not where the run is about to end.
            keep = self._config.save_total_limit
            await asyncio.to_thread(prune, path.parent, keep=keep, spare=self._best_checkpoint)
        await self._callbacks.saved()

    @property
    def _best_checkpoint(self) -> Path | None:
        """The best model's folder, where the run is to end with it and it is written."""
        if not self._config.load_best_model_at_end or self._stopping.best is None:
            return None
        path = self._recorder.directory.checkpoint(self._stopping.best_step)
        return path if path.is_dir() else None

    @property
    def model(self) -> Path:
        """The checkpoint with the run's model, once it has ended: the last one, or the best one where that is asked."""
        return self._best_checkpoint or self._recorder.directory.checkpoint(self.step)

    @property
    def _save_options(self) -> dict[str, bool]:
        """What the learner is told of checkpoints beside their place."""
        return {"only_model": True} if self._config.save_only_model else {}

    async def _save_last(self) -> None:
        """A checkpoint of the last finished step, unless there is one; also of step 0."""
        if self._saved != self.step or self.step == 0:
            await self.save()

    async def _evaluate_in_time(self) -> Mapping[str, float]:
        """As `_evaluate`; given up, without numbers, where a signal leaves only the time that a checkpoint needs."""
        try:
            return await unless(self._stop.in_haste, self._evaluate())
        except StopRequested:
            detail = f"the evaluation after step {self.step} was given up: {self._stop.cause} leaves no time for it"
            self._recorder.say(EventKind.WARNING, "evaluation", step=self.step, detail=detail)
            return {}

    async def _heed_stop(self) -> None:
        """End the run in order if the stop event is set."""
        if not self._stop.is_set():
            return
        directory = self._recorder.directory
        if await self._save_in_time():
            left = f"go on with: trl-ray resume {directory.path}"
        else:
            left = f"no time was left for its checkpoint; {what_is_left(directory)}"
        raise self._stop.error(f" after step {self.step}; {left}")

    async def _save_in_time(self) -> bool:
        """As `_save_last`, if it is through before the process is killed; tell whether it was."""
        left = self._stop.left_s
        if left is not None and self._save_seconds > left:
            return self._saved == self.step > 0
        try:
            async with asyncio.timeout(left):
                await self._save_last()
        except TimeoutError:
            return self._recorder.directory.checkpoint(self.step).is_dir()
        return True
