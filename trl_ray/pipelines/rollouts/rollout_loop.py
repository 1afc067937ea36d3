"""The loop of pipelines that train on rollouts: three tasks around the queue.  (How a datum walks: ARCHITECTURE.md)

dataset -> _admit -> RolloutQueue -> rollout workers -> rewards, teachers -> RolloutQueue -> _train -> learner
             ^                                                                                 |
             +----------------- release, once the weights are pulled <------------- publish ---+

_admit   consumes: free slots, prompts.  produces: tickets.      waits for: a slot.
         unblocked by: release, and drops.
_train   consumes: P ready groups.       produces: weights, a metrics line.   waits for: ready groups.
         unblocked by: commits of rollout workers.
pull     consumes: published weights.    produces: freed slots.  waits for: every working worker.
         unblocked by: their answers, or their replacement.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trl_ray.errors import (
    InterruptedRun,
    RewardError,
    StallError,
    TeacherError,
)
from trl_ray.models.checkpoint import prune
from trl_ray.models.companions.teacher_rules import FOLDER
from trl_ray.pipelines.callbacks.hooks import CallbackList
from trl_ray.pipelines.rollouts.evaluation import evaluate, held_out_loss
from trl_ray.pipelines.rollouts.objective import with_metrics
from trl_ray.pipelines.rollouts.preparation import OBJECTIVE_STATE, Preparation
from trl_ray.pipelines.rollouts.rollout_actors import RolloutActors
from trl_ray.pipelines.rollouts.updates import Prepared, Updated, prepare_step, train_on
from trl_ray.pipelines.run.recording import Recorder, StepTimes
from trl_ray.types import Event, EventKind, Metric, RolloutGroup, StepResult

_POLL_S = 2.0
_SAY_WAITING_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TooManyFailures:
    """Groups in a row that were dropped for one reason."""

    count: int
    allowed: int
    last: Event

    def describe(self, what: str) -> str:
        """What must hold, and what was given."""
        return (
            f"fewer than {self.allowed} groups in a row may lose {what}, but {self.count} did without one trained "
            f"step. The last one: {dict(self.last.detail)}."
        )


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far the run is; mutable, and owned by the loop."""

    step: int
    """Finished optimizer steps."""
    saved: int
    """Step of the newest checkpoint."""


class RolloutLoop:
    """Runs the loops from one checkpoint to the end of training."""

    def __init__(
        self,
        *,
        preparation: Preparation,
        actors: RolloutActors,
        recorder: Recorder,
        callbacks: CallbackList,
        start_step: int,
        stop: asyncio.Event,
    ) -> None:
        self._preparation, self._config = preparation, preparation.config
        self._actors, self._recorder, self._callbacks, self._stop = actors, recorder, callbacks, stop
        self.progress = Progress(step=start_step, saved=start_step)
        self._pulling: asyncio.Task[None] | None = None
        self._staleness: dict[str, Metric] = {}
        self._failures = dict.fromkeys((EventKind.REWARD_FAILED, EventKind.TEACHER_FAILED), 0)

    async def run(self) -> None:
        """Train to the last step.

        Raises:
            InterruptedRun: the stop event was set; a checkpoint was written.
            RunError: whatever ended a loop.
        """
        train = asyncio.create_task(self._train(), name="train")
        supervise = asyncio.create_task(self._actors.supervisor.run(), name="supervise")
        tasks = [train, supervise, asyncio.create_task(self._admit(), name="admit")]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # Two may end together; the supervisor knows best why an actor is gone.
            for task in sorted(done, key=lambda task: task is not supervise):
                task.result()
            assert train in done, "only the training loop may end by itself"
        finally:
            pulling = [self._pulling] if self._pulling is not None else []
            for task in (*tasks, *pulling):
                task.cancel()
            await asyncio.gather(*tasks, *pulling, return_exceptions=True)

    async def _admit(self) -> None:
        """Keeps the slots charged, and issues no more groups than the remaining steps need."""
        prompts, config = self._preparation.prompts, self._config
        while True:
            free: int = await self._actors.ask_queue("wait_for_slots", wait_s=_POLL_S)
            snapshot = await self._actors.ask_queue("snapshot")
            remaining = (self._preparation.total_steps - snapshot.step) * config.groups_per_step
            count = min(free, remaining - snapshot.live_total)
            if count <= 0:
                await asyncio.sleep(0.25 if free else 0)
                continue
            first: int = await self._actors.ask_queue("next_ordinal")
            chosen = [prompts.prompt(ordinal) for ordinal in range(first, first + count)]
            await self._actors.ask_queue("admit", prompts=chosen, version=self._recorder.pulled_version)

    async def _train(self) -> None:
        if self._config.eval_steps and self.progress.step == 0:
            await self._evaluate()
        while not self._is_over:
            await self._callbacks.step_begin()
            step, begin = self.progress.step + 1, time.time()
            groups = await self._take(step)
            taken = time.time()
            updated = await self._optimize(step, groups)
            trained = time.time()
            await self._settle(step, updated.result)
            version = await self._publish(step, wait_s=taken - begin, step_s=trained - begin)
            published = time.time()
            self.progress.step = step
            times = StepTimes(begin=begin, taken=taken, trained=trained, published=published)
            await self._callbacks.step_end(step=step, epoch=self._preparation.epoch_after(step))
            await self._record(step, groups, updated, times, version)
            await self._finish(step)
        if self._pulling is not None:
            await self._pulling
        if self.progress.saved != self.progress.step or self.progress.step == 0:
            await self.save()
        await self._callbacks.train_end()

    @property
    def _is_over(self) -> bool:
        return self._callbacks.control.should_training_stop or self.progress.step >= self._preparation.total_steps

    async def _finish(self, step: int) -> None:
        """What follows a step and its line: evaluation, a checkpoint, and perhaps the end."""
        config, callbacks = self._config, self._callbacks
        await callbacks.logged(self._recorder.last)
        if callbacks.control.should_evaluate or (config.eval_steps and step % config.eval_steps == 0):
            await self._evaluate()
        await callbacks.epoch_end()
        if callbacks.control.should_evaluate:
            await self._evaluate()
        if self._is_over:
            if callbacks.stopped_by is not None:
                detail = f"training ends early: the callback {callbacks.stopped_by} asked for it"
                self._recorder.say(EventKind.WARNING, "driver", step=step, detail=detail)
            return
        if callbacks.control.should_save or (config.save_steps and step % config.save_steps == 0):
            await self.save()
        if self._stop.is_set():
            await self._interrupt()

    async def _take(self, step: int) -> list[RolloutGroup]:
        """Wait for the groups of one step; say who is waited for, and give up when nothing moves any more."""
        config = self._config
        began = moved = said = time.monotonic()
        seen: int | None = None
        while True:
            groups: list[RolloutGroup] = await self._actors.ask_queue(
                "take", n=config.groups_per_step, step=step, wait_s=_POLL_S
            )
            if groups:
                return groups
            await self._drain()
            if self._stop.is_set():
                await self._interrupt()
            if self._pulling is not None and self._pulling.done():
                self._pulling.result()
            now = time.monotonic()
            progress = (await self._actors.ask_queue("health")).progress
            if progress != seen:
                seen, moved = progress, now
            if now - moved > config.runtime.stall_deadline_s:
                raise StallError(
                    f"step {step} needs {config.groups_per_step} groups, but nothing has moved for {now - moved:.0f} s "
                    f"(runtime.stall_deadline_s): {await self._culprits()}. Resume from the checkpoint."
                )
            if now - said > _SAY_WAITING_S:
                said = now
                self._recorder.say(
                    EventKind.WAITING, "learner", step=step, seconds=round(now - began, 1), on=await self._culprits()
                )

    async def _culprits(self) -> str:
        named: str = await self._actors.ask_queue("describe_wait", n=self._config.groups_per_step)
        return named

    async def _optimize(self, step: int, groups: list[RolloutGroup]) -> Updated:
        self._staleness = self._recorder.check_staleness(step, groups)
        prepared = await self._prepare(step, groups)
        await self._preparation.objective.show(
            self._callbacks, groups, prepared.samples, pad_token_id=self._preparation.pad_token_id
        )
        return await train_on(
            prepared,
            step=step,
            config=self._config,
            objective=self._preparation.objective,
            cut=self._preparation.cut,
            ask_learner=self._actors.ask_learner,
        )

    async def _prepare(self, step: int, groups: list[RolloutGroup]) -> Prepared:
        """Samples of one step, and what there is to say of their groups."""
        objective = self._preparation.objective
        prepared = await prepare_step(
            groups,
            step=step,
            objective=objective,
            cut=self._preparation.cut,
            ask_learner=self._actors.ask_learner,
            deadline_s=self._config.runtime.step_deadline_s,
        )
        observed = objective.observe(groups)
        for warning in observed.warnings:
            self._recorder.say(EventKind.WARNING, "driver", step=step, detail=warning)
        return replace(prepared, built=with_metrics(prepared.built, observed.metrics))

    async def _settle(self, step: int, result: StepResult) -> None:
        """Tell the ledger what became of the groups of this step."""
        await self._actors.ask_queue("skip" if result.skipped else "trained", step=step)
        if not result.skipped:
            self._failures = dict.fromkeys(self._failures, 0)
            return
        self._recorder.say(
            EventKind.WARNING,
            "learner",
            step=step,
            detail="loss or gradients were not finite; the step was skipped and its groups dropped",
        )

    async def _publish(self, step: int, *, wait_s: float, step_s: float) -> int:
        """Publish, and pull beside the next step; a pull must have ended before the next one begins."""
        if self._pulling is not None:
            await self._pulling
        identity = await self._actors.publish(step=step)
        self._pulling = asyncio.create_task(self._pull(step, identity.version, wait_s, step_s), name=f"pull {step}")
        if self._config.slot_bounds.max_staleness == 0:
            await self._pulling
        return identity.version

    async def _pull(self, step: int, version: int, wait_s: float, step_s: float) -> None:
        await self._actors.pull()
        self._recorder.pulled_version = version
        await self._actors.ask_queue("release", step=step, wait_s=wait_s, step_s=step_s)

    async def _record(
        self, step: int, groups: list[RolloutGroup], updated: Updated, times: StepTimes, version: int
    ) -> None:
        await self._drain()
        snapshot, slots = await self._actors.ask_queue("snapshot"), await self._actors.ask_queue("slots")
        self._recorder.step(
            step,
            groups=groups,
            built=updated.built,
            result=updated.result,
            times=times,
            version=version,
            snapshot=snapshot,
            slots=slots,
            staleness=self._staleness,
        )

    async def _drain(self) -> None:
        """Write down what the actors have to tell, and stop when rewards or teachers fail without end."""
        report = await self._actors.drain()
        self._recorder.report(report)
        allowed: int | None = self._config.reward.max_failures_in_a_row
        rewards = self._count_failures(EventKind.REWARD_FAILED, report.events, allowed)
        if rewards is not None:
            raise RewardError(
                f"{rewards.describe('their rewards (reward.max_failures_in_a_row)')} Mend the reward function, then "
                "resume."
            )
        allowed = min((source.options.max_failures_in_a_row for source in self._config.teacher_sources), default=None)
        teachers = self._count_failures(EventKind.TEACHER_FAILED, report.events, allowed)
        if teachers is not None:
            raise TeacherError(
                f"{teachers.describe('their teacher (max_failures_in_a_row)')} Bring the teacher back, then resume."
            )

    def _count_failures(self, kind: EventKind, events: Sequence[Event], allowed: int | None) -> TooManyFailures | None:
        failed = [event for event in events if event.kind is kind]
        self._failures[kind] += len(failed)
        if not failed or allowed is None or self._failures[kind] < allowed:
            return None
        return TooManyFailures(count=self._failures[kind], allowed=allowed, last=failed[-1])

    async def _evaluate(self) -> None:
        """Answer the held-out prompts, once the workers hold the newest weights."""
        if self._pulling is not None:
            await self._pulling
        begin = time.time()
        evaluation = await evaluate(
            self._actors.working,
            self._preparation.eval_prompts,
            seed=self._config.seed,
            deadline_s=self._config.runtime.step_deadline_s,
        )
        for reason in evaluation.lost:
            self._recorder.say(EventKind.WARNING, "evaluation", detail=f"part of the evaluation was lost: {reason}")
        held_out = await held_out_loss(
            evaluation.answers,
            step=self.progress.step,
            objective=self._preparation.objective,
            cut=self._preparation.cut,
            ask_learner=self._actors.ask_learner,
            deadline_s=self._config.runtime.step_deadline_s,
        )
        numbers = self._recorder.evaluated(self.progress.step, evaluation.answers, held_out, time.time() - begin)
        await self._callbacks.evaluated(numbers)

    async def save(self) -> None:
        """Write a checkpoint of the last finished step, then let the journal forget what it no longer needs."""
        step, begin = self.progress.step, time.time()
        path = self._recorder.directory.checkpoint(step)
        snapshot = await self._actors.ask_queue("snapshot")
        extra = {
            "ledger.json": json.dumps(snapshot.to_json()).encode(),
            OBJECTIVE_STATE: json.dumps(self._preparation.objective.state_dict()).encode(),
            **self._callbacks.files(),
        }
        beside = path.with_name(f"{FOLDER}-{step}.tmp")
        adopt = {FOLDER: str(beside)} if await self._actors.teachers.save(beside) else {}
        deadline_s = self._config.runtime.step_deadline_s
        await self._actors.ask_learner(
            "save", str(path.parent), step=step, extra=extra, adopt=adopt, deadline_s=deadline_s
        )
        self._actors.teachers.checkpoint = str(path)
        # One checkpoint behind, so that a run whose newest checkpoint is damaged can go back to the one before.
        if self.progress.saved not in (0, step):
            await self._actors.ask_queue("checkpoint", step=self.progress.saved)
        self.progress.saved = step
        self._recorder.checkpoint(path, step=step, seconds=time.time() - begin)
        if self._config.save_total_limit is not None:
            prune(path.parent, keep=self._config.save_total_limit)
        await self._callbacks.saved()

    async def _interrupt(self) -> None:
        if self._pulling is not None:
            await self._pulling
        if self.progress.saved != self.progress.step or self.progress.step == 0:
            await self.save()
        raise InterruptedRun(
            f"interrupted after step {self.progress.step}; go on with: trl-ray resume {self._recorder.directory.path}"
        )
