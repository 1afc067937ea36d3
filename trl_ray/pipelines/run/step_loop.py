"""The loop of optimizer steps, the same for rollouts and datasets: steps, epochs, checkpoints, interruption, the end.

evaluate at step 0 -> [step_begin -> _train_step -> step_end -> _report -> epoch_end -> checkpoint] -> last checkpoint
                       ^                                                             |
                       '------------------ until _is_over ---------------------------+--> InterruptedRun, if stop is set
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.step_counts import steps_of
from trl_ray.errors import InterruptedRun
from trl_ray.models.checkpoint import prune
from trl_ray.pipelines.callbacks.hooks import TrainingSpan
from trl_ray.pipelines.run.pipeline import Opening, Plan
from trl_ray.pipelines.run.recording import RunRecorder
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
        can_evaluate: whether there is something to evaluate on.
        stop: ends the run in order once it is set.
    """

    _plan: Plan
    _config: RunConfig
    _recorder: RunRecorder

    def __init__(
        self, *, plan: Plan, recorder: RunRecorder, opening: Opening, can_evaluate: bool, stop: asyncio.Event
    ) -> None:
        self._plan, self._config, self._recorder, self._stop = plan, plan.config, recorder, stop
        self._opening, self._callbacks, self._can_evaluate = opening, opening.callbacks, can_evaluate
        self.step = self._saved = opening.step  # finished optimizer steps, and those in the newest checkpoint

    @abstractmethod
    async def run(self) -> None:
        """Train to the last step.

        Raises:
            InterruptedRun: the stop event was set; a checkpoint was written.
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
        return self._callbacks.control.should_training_stop or self._place >= self._plan.total_steps

    @property
    def _evaluation_is_due(self) -> bool:
        """Whether the step that was trained last is evaluated."""
        asked = self._callbacks.control.should_evaluate or self._comes_now(self._config.eval_steps)
        return self._can_evaluate and asked

    def _leave_epoch(self) -> None:
        """A callback leaves out what is left of the epoch; it is refused that where it cannot be done."""

    def _say_why_over(self) -> None:
        """Why training ends before its last step, if it does."""
        if (name := self._callbacks.stopped_by) is not None:
            detail = f"training ends early: the callback {name} asked for it"
            self._recorder.say(EventKind.WARNING, "driver", step=self.step, detail=detail)

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
        await self._callbacks.begin(span, checkpoint=self._opening.checkpoint, say=self._recorder.say)

    async def _train(self) -> None:
        """All steps that are left, and the last checkpoint."""
        if self.step == 0 and self._can_evaluate:
            await self._evaluate()
        while not self._is_over:
            await self._callbacks.step_begin()
            trained = await self._train_step(self.step + 1)
            self.step += 1
            await self._callbacks.step_end(step=self.step, epoch=trained.epoch)
            await self._report(trained)
            await self._finish_step()
        await self._save_last()
        await self._callbacks.train_end()

    async def _finish_step(self) -> None:
        """What follows the line of a step: the end of its epoch, a checkpoint, and perhaps the end."""
        control = self._callbacks.control
        await self._callbacks.epoch_end()
        if control.should_evaluate and self._can_evaluate:
            await self._evaluate()
        if control.should_epoch_stop:
            self._leave_epoch()
        if self._is_over:
            self._say_why_over()
            return
        if control.should_save or self._comes_now(self._config.save_steps):
            await self.save()
        await self._heed_stop()

    def _comes_now(self, count: int | float) -> bool:
        """Whether what comes every so many steps comes after this one; with 0 it never does."""
        every = steps_of(count, self._plan.total_steps)
        return every > 0 and self.step % every == 0

    async def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        step, begin = self.step, time.time()
        path = self._recorder.directory.checkpoint(step)
        await self._write_checkpoint(path)
        self._saved = step
        self._recorder.checkpoint(path, step=step, seconds=time.time() - begin)
        if self._config.save_total_limit is not None:
            prune(path.parent, keep=self._config.save_total_limit)
        await self._callbacks.saved()

    async def _save_last(self) -> None:
        """A checkpoint of the last finished step, unless there is one; also of step 0."""
        if self._saved != self.step or self.step == 0:
            await self.save()

    async def _heed_stop(self) -> None:
        """End the run in order if the stop event is set."""
        if self._stop.is_set():
            await self._save_last()
            path = self._recorder.directory.path
            raise InterruptedRun(f"interrupted after step {self.step}; go on with: trl-ray resume {path}")
