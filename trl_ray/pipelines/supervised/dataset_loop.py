"""The loop of pipelines that train on datasets: one step after the other, the next step's examples made meanwhile.

feed --> StepsAhead: step k+1 --> learner.step: step k --> evaluation, metrics, checkpoint      (the rest: step_loop.py)
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.errors import InputError
from trl_ray.pipelines.run.early_stopping import EarlyStopping
from trl_ray.pipelines.run.going_back import RunOrigin
from trl_ray.pipelines.run.learner_actors import LearnerActors, under_watch
from trl_ray.pipelines.run.session import Opening
from trl_ray.pipelines.run.signals import Stop, heed_signals
from trl_ray.pipelines.run.step_loop import StepLoop, TrainedStep
from trl_ray.pipelines.supervised.dataset_preparation import SupervisedPlan
from trl_ray.pipelines.supervised.dataset_recording import Accounts, SupervisedRecorder, SupervisedTimes
from trl_ray.pipelines.supervised.example_feed import Fed, Feed, ShuffledFeed
from trl_ray.pipelines.supervised.example_updates import ReadyStep, StepsAhead, example_update, with_kl
from trl_ray.pipelines.supervised.rows_fingerprint import rows_fingerprint
from trl_ray.pipelines.supervised.user_metrics import HeldOutPredictions
from trl_ray.types import Evaluation, Example, StepResult, steady_time

PROGRESS = "progress.json"
"""In checkpoints: what the loop goes on from."""


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
        held_out: examples to evaluate on, by the names of their sets; empty for none.
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
        held_out: Mapping[str, Sequence[Example]],
        accounts: Accounts,
        stopping: EarlyStopping,
        stop: Stop,
    ) -> None:
        super().__init__(
            plan=plan, recorder=recorder, opening=opening, stopping=stopping, can_evaluate=bool(held_out), stop=stop
        )
        self._actors, self._feed, self._held_out = actors, feed, held_out
        self.accounts = accounts
        self._evaluations = {
            name: example_update(plan, found, step=1, is_training=False) for name, found in held_out.items()
        }
        self._ahead = StepsAhead(plan, feed)
        self._fingerprint: str | None = None
        """Of the examples, of a stream its first window's, once a checkpoint is written."""
        metrics = plan.inputs.metrics
        self._predictions = (
            None if metrics is None else HeldOutPredictions(plan.config, metrics, ask=actors.ask, loss_of=self._loss_of)
        )

    @property
    def _place(self) -> int:
        return self.step + self.accounts.left_out

    @property
    def _evaluation_is_due(self) -> bool:
        ends = self._config.evaluates and self._place >= self._plan.total_steps
        return super()._evaluation_is_due or (self._can_evaluate and ends)

    async def run(self) -> None:
        """Train to the last step.

        Raises:
            InputError: a row of a stream cannot be used; what was trained before it is saved.
        """
        try:
            await under_watch(self._actors.supervisor, self._begin_and_train())
        finally:
            self._ahead.close()

    async def _begin_and_train(self) -> None:
        if in_memory := isinstance(self._feed, ShuffledFeed):
            per_epoch = self._feed.steps_per_epoch
            epoch, epochs = self._place / per_epoch, self._plan.total_steps / per_epoch
        else:
            streamed = self.accounts.place
            epoch, epochs = float(streamed.epoch) if streamed is not None else 0.0, self._config.num_train_epochs
        await self._begin(epoch=epoch, num_train_epochs=math.ceil(epochs), can_stop_epoch=in_memory)
        await self._train()

    async def _train_step(self, step: int) -> _Trained:
        begin = steady_time()
        ready = await self._take(step)
        fed = steady_time()
        if self._place + 1 < self._plan.total_steps:
            self._ahead.begin(step + 1, place=self._place + 2)
        result: StepResult = await self._actors.ask("step", await with_kl(ready.update, self._actors.ask))
        trained = steady_time()
        self.accounts.advance(ready.fed, step=step, skipped=result.skipped)
        times = SupervisedTimes(begin=begin, fed=fed, trained=trained)
        return _Trained(epoch=ready.fed.epoch, result=result, fed=ready.fed, times=times)

    async def _report(self, trained: _Trained) -> None:
        evaluated = await self._evaluate_in_time() if self._evaluation_is_due else {}
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
            self._recorder.skipped(self.step, what="rows")
        await self._callbacks.logged(self._recorder.last)

    def _leave_epoch(self) -> None:
        assert isinstance(self._feed, ShuffledFeed), "callbacks may not leave the epoch of a stream"
        left_out = -self._place % self._feed.steps_per_epoch
        if left_out:
            self.accounts.left_out += left_out
            self._ahead.forget()

    async def _heed_stop(self) -> None:
        await heed_signals()
        await super()._heed_stop()

    async def _take(self, step: int) -> ReadyStep:
        """The examples of a step; before a row that cannot be used, what was trained is saved."""
        try:
            return await self._ahead.take(step, place=self._place + 1)
        except InputError as error:
            if not self.step:
                raise
            await self._save_last()
            raise type(error)(
                f"{error} {self.step} steps were trained before it and are kept; once it is mended, go on "
                f"with: trl-ray resume {self._recorder.directory.path}"
            ) from error

    async def _evaluate(self) -> Mapping[str, float]:
        numbers: dict[str, float] = {}
        for name, update in self._evaluations.items():
            begin, count = steady_time(), len(self._held_out[name])
            evaluation: Evaluation = await self._actors.ask("evaluate", await with_kl(update, self._actors.ask))
            own = {} if self._predictions is None else await self._predictions.measure(self._held_out[name])
            numbers |= self._recorder.evaluated(self.step, evaluation, examples=count, begin=begin, name=name, own=own)
        await self._judge(numbers)
        return numbers

    async def _loss_of(self, examples: Sequence[Example]) -> float:
        """The loss of some held-out examples alone."""
        update = example_update(self._plan, examples, step=1, is_training=False)
        found: Evaluation = await self._actors.ask("evaluate", await with_kl(update, self._actors.ask))
        return found.loss

    async def _write_checkpoint(self, path: Path) -> None:
        accounts, train = self.accounts, self._plan.train
        if self._fingerprint is None and (known := self._plan.known) is not None:
            self._fingerprint = await asyncio.to_thread(rows_fingerprint, known.examples)
        progress = {
            "accounts": accounts.state_dict(),
            "stopping": self._stopping.state_dict(),
            "examples": None if train is None else len(train),
            "fingerprint": self._fingerprint,
        }
        kept = {PROGRESS: progress, "ledger.json": accounts.snapshot().to_json()}
        extra = {name: json.dumps(state).encode() for name, state in kept.items()} | self._callbacks.files()
        extra |= RunOrigin.of(self._config).file()
        await self._actors.ask("save", str(path.parent), step=self.step, extra=extra, **self._save_options)
