"""The actors of a reinforcement-learning run, of which the learner's are part: started, kept alive, fed with weights.

RolloutActors = LearnerActors + queue + reward workers, reward models + TeacherActors + rollout workers, one Supervisor

learner --publish--> object store --pull--> rollout workers, teachers      (RolloutActors.publish, RolloutActors.pull)
Supervisor --lost--> RolloutActors: end it, reissue its leases, start anew, refit with current weights, work again
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl_ray.actors.calling import Patience, call_patiently
from trl_ray.actors.reward_worker import RewardWorker
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.errors import ActorLostError, DeadlineError, EngineError, RunError, WeightError
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.pipelines.rollouts.reward_model_actors import spawn_reward_models
from trl_ray.pipelines.rollouts.teacher_actors import TeacherActors, TeacherArguments
from trl_ray.pipelines.run.learner_actors import Emit, LearnerActors, drained, learner_lost
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime
from trl_ray.runtime.supervision import Supervisor, Watched
from trl_ray.runtime.weights import Published, WeightTransport
from trl_ray.types import (
    ActorReport,
    Event,
    EventKind,
    Health,
    IntArray,
    PullReport,
    SamplingGap,
    TrainingGap,
    WeightVersion,
)

_CONTROL_S = 60.0
_PAUSE_S = 0.25
QUEUE_PATIENCE = Patience(deadline_s=30.0, total_s=120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorArguments:
    """Constructor arguments by role."""

    learner: Mapping[str, Any]
    queue: Mapping[str, Any]
    rollout: Mapping[str, Any]
    """Without the handles of queue, rewards and teachers."""
    reward: Mapping[str, Any] | None
    """None where nothing is rewarded."""
    reward_models: tuple[Mapping[str, Any], ...] = ()
    """Of the actors of each reward model."""
    teachers: tuple[TeacherArguments, ...] = ()
    """Of those that have actors."""


class RolloutActors:
    """Starts the actors, replaces lost ones, and hands out weights.

    NOTE: a rollout worker gets work only after it has pulled the newest published weights.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        config: RolloutRunConfig,
        arguments: ActorArguments,
        weight_check_ids: IntArray,
        emit: Emit,
        first_check_ids: Sequence[IntArray] = (),
    ) -> None:
        self._runtime, self._config, self._arguments = runtime, config, arguments
        self._emit_event = emit
        self._weights = WeightTransport(
            weight_check_ids=weight_check_ids,
            weight_check_every=config.rollout.canary_every,
            deadline_s=config.runtime.pull_deadline_s,
            first_check_ids=first_check_ids,
        )
        self._checked: dict[str, PullReport] = {}
        self._sampled: dict[str, SamplingGap] = {}
        self._training: TrainingGap | None = None
        self.teachers = TeacherActors(
            runtime=runtime,
            arguments=arguments.teachers,
            weights=self._weights,
            emit=emit,
            checkpoint=arguments.learner.get("checkpoint"),
            deadline_s=config.runtime.pull_deadline_s,
        )
        self._workers: set[ActorHandle] = set()
        self._working, self._rewards = dict[str, ActorHandle](), list[ActorHandle]()
        self._reward_models = list[ActorHandle]()
        self._queue: ActorHandle | None = None
        self.supervisor = Supervisor(
            interval_s=config.runtime.health_interval_s,
            deadline_s=config.runtime.health_deadline_s,
            on_lost=self._on_lost,
            on_reborn=self._on_reborn,
        )
        self.learner = LearnerActors(
            runtime=runtime, config=config, arguments=arguments.learner, emit=emit, supervisor=self.supervisor
        )

    @property
    def queue(self) -> ActorHandle:
        """The queue's handle."""
        assert self._queue is not None, "the actors must be started first"
        return self._queue

    @property
    def working(self) -> tuple[ActorHandle, ...]:
        """Rollout workers that hold current weights."""
        return tuple(self._working.values())

    @property
    def weights(self) -> WeightTransport:
        """How weights reach the engines; its state goes into checkpoints."""
        return self._weights

    @property
    def evidence(self) -> Evidence:
        """What the newest weight checks of working engines, and of the learner, have shown."""
        reports = [report for name, report in self._checked.items() if name in self._working]
        means = [report.weight_check_mean for report in reports if report.weight_check_mean is not None]
        own = [report.own_files_mean for report in reports if report.own_files_mean is not None]
        return Evidence(
            weights=max(means, default=None),
            own_files=max(own, default=None),
            training=self._training,
            sampling=tuple(gap for name, gap in self._sampled.items() if name in self._working),
        )

    async def start(self) -> None:
        """Start every actor side by side, publish the learner's weights, and let the workers begin."""
        self._queue = await self._runtime.spawn(Role.QUEUE, "queue", RolloutQueue, **self._arguments.queue)
        await self.learner.spawn()
        await self._spawn_rewards()
        await self.teachers.spawn()
        workers = [
            await self._spawn_worker(f"rollout-{slot}", slot) for slot in range(self._config.rollout.num_workers)
        ]
        await self.learner.meet()
        others = (self._queue, self.learner.handle, *self._reward_models, *self._rewards, *self.teachers.handles)
        await asyncio.gather(*(self._greet(handle) for handle in others))
        healths = await asyncio.gather(*(self._greet(handle, watch=False) for handle in workers))
        await self.publish(step=0)
        await self.teachers.feed_all()
        for slot, (handle, health) in enumerate(zip(workers, healths, strict=True)):
            await self._refit(handle)
            self.supervisor.watch(handle, slot=slot, health=health)

    async def _spawn_rewards(self) -> None:
        if self._arguments.reward is None:
            return
        models = await spawn_reward_models(
            self._runtime, self._arguments.reward_models, lease_s=self._config.rollout.lease_s
        )
        self._reward_models = [handle for model in models for handle in model.handles]
        scoring = tuple(model.scoring for model in models)
        for slot in range(self._config.reward.num_workers):
            name = f"reward-{slot}"
            arguments = {**self._arguments.reward, "name": name, "models": scoring}
            self._rewards.append(await self._runtime.spawn(Role.REWARD, name, RewardWorker, **arguments))

    async def publish(self, *, step: int) -> WeightVersion:
        """Take the learner's weights, and a weight check when one is due.

        Raises:
            LearnerLostError: the learner died or hung.
        """
        begin = time.time()
        with learner_lost():
            published = await self._weights.publish(self.learner.handle, step=step)
        identity = published.identity
        if published.check is not None and published.check.training is not None:
            self._training = published.check.training
        seconds = round(time.time() - begin, 4)
        self._emit(EventKind.WEIGHTS_PUBLISHED, "learner", **asdict(identity), seconds=seconds)
        return identity

    async def pull(self) -> None:
        """Have every working rollout worker and every teacher pull the newest weights; replace those that cannot."""
        handles = (*self.working, *self.teachers.following)
        await asyncio.gather(*(self._pull_or_replace(handle) for handle in handles))

    async def drain(self) -> ActorReport:
        """Events and spans of all actors since the last call."""
        scorers = (*self._reward_models, *self._rewards, *self.teachers.handles)
        handles = (self.queue, self.learner.handle, *scorers, *self.working)
        reports = [await drained(handle) for handle in handles]
        events = [event for report in reports for event in report.events]
        return ActorReport(events=events, spans=[span for report in reports for span in report.spans])

    async def ask_queue(self, method: str, /, **kwargs: Any) -> Any:
        """Call the queue, waiting out its restart."""
        return await call_patiently(self.queue, method, QUEUE_PATIENCE, **kwargs)

    def _emit(self, kind: EventKind, actor: str, /, **detail: Any) -> None:
        self._emit_event(Event.now(kind, actor, **detail))

    async def _spawn_worker(self, name: str, slot: int) -> ActorHandle:
        handles = {"queue": self.queue, "rewards": tuple(self._rewards), "teachers": self.teachers.by_teacher}
        arguments = {**self._arguments.rollout, **handles, "name": name}
        handle = await self._runtime.spawn(Role.ROLLOUT, name, RolloutWorker, slot=slot, **arguments)
        self._workers.add(handle)
        return handle

    async def _greet(self, handle: ActorHandle, *, watch: bool = True) -> Health:
        """Wait for an actor's constructor."""
        health: Health = await handle.call("health", deadline_s=self._config.runtime.start_deadline_s)
        self._emit(EventKind.ACTOR_STARTED, handle.name, pid=health.pid)
        if watch:
            self.supervisor.watch(handle, health=health)
        return health

    async def _refit(self, handle: ActorHandle) -> None:
        """Give a fresh worker the newest weights, then work; weights published meanwhile are pulled too."""
        pulled: Published | None = None
        while pulled is not self._weights.newest:
            pulled = self._weights.newest
            await self._pull_one(handle)
        # Before it starts: weights published during that call must reach it before their step's slots are released.
        self._working[handle.name] = handle
        await handle.call("start", deadline_s=_CONTROL_S)

    async def _pull_one(self, handle: ActorHandle) -> None:
        report = await self._weights.pull(handle)
        version, seconds = report.version, round(report.seconds, 4)
        self._emit(EventKind.WEIGHTS_PULLED, handle.name, version=version, checksum=report.checksum, seconds=seconds)
        # Kept over pulls that found no tokens to compare, of which there may be some between two steps.
        if report.sampling is not None:
            self._sampled[handle.name] = report.sampling
        if report.weight_check_mean is None:
            return
        agrees = report.disagreement is None
        proof = {"mean": report.weight_check_mean, "max": report.weight_check_max, "agrees": agrees}
        self._emit(EventKind.WEIGHT_CHECK, handle.name, version=version, **proof)
        if report.disagreement is not None:
            self._emit(EventKind.WARNING, handle.name, detail=report.disagreement)
        self._checked[handle.name] = report
        if version == 0:
            self._weights.showed_at_first(report.weight_check_mean)

    async def _pull_or_replace(self, handle: ActorHandle) -> None:
        pull = self.teachers.follow if handle.role is Role.TEACHER else self._pull_one
        try:
            await pull(handle)
        except (WeightError, EngineError, ActorLostError, DeadlineError) as error:
            if isinstance(error, WeightError):
                self._emit(EventKind.WEIGHT_CHECK, handle.name, agrees=False, detail=str(error))
            for watched in self.supervisor.watched:
                if watched.handle.name == handle.name:
                    await self._on_lost(watched, str(error))

    async def _on_lost(self, watched: Watched, reason: str) -> None:
        """Bring a lost actor back, or end the run when it may not be.

        Raises:
            LearnerLostError: the learner is gone; the pipeline restarts from the last checkpoint.
            RunError: the actor was lost more often than it may be.
        """
        name, role = watched.handle.name, watched.handle.role
        if role is Role.LEARNER:
            await self.learner.lost(watched, reason)
        self.supervisor.forget(name)
        self._working.pop(name, None)
        self.teachers.lose(watched.handle)
        pid = watched.health.pid if watched.health else None
        self._emit(EventKind.ACTOR_LOST, name, reason=reason, pid=pid)
        begin = time.time()
        if role is Role.ROLLOUT:
            health, handle = await self._replace_worker(watched, reason)
        else:
            self._count_restart(watched, reason)
            health, handle = await self._await_rebirth(watched)
            if role is Role.TEACHER:
                await self._feed(handle)
        self.supervisor.watch(handle, slot=watched.slot, restarts=watched.restarts, health=health)
        self._emit(
            EventKind.ACTOR_RESTARTED, handle.name, replaces=name, pid=health.pid, seconds=round(time.time() - begin, 3)
        )

    async def _feed(self, handle: ActorHandle) -> None:
        """Give a teacher that came back its weights; one that is lost meanwhile is found by the next probe."""
        try:
            await self.teachers.feed(handle)
        except (ActorLostError, DeadlineError) as error:
            self._emit(EventKind.WARNING, handle.name, detail=f"it could not be given its weights: {error}")

    def _count_restart(self, watched: Watched, reason: str) -> None:
        allowed = self._config.runtime.max_restarts
        if watched.restarts >= allowed:
            raise RunError(
                f"{watched.handle.name} may be restarted {allowed} times (runtime.max_restarts), but was lost again: "
                f"{reason}"
            )
        watched.restarts += 1

    async def _replace_worker(self, watched: Watched, reason: str) -> tuple[Health, ActorHandle]:
        """Start another rollout worker in the place of a lost one, again if that one is lost before it works."""
        await self._discard(watched.handle)
        base = watched.handle.name.partition("+")[0]
        while True:
            self._count_restart(watched, reason)
            handle = await self._spawn_worker(f"{base}+{watched.restarts}", watched.slot)
            try:
                health: Health = await handle.call("health", deadline_s=self._config.runtime.start_deadline_s)
                await self._refit(handle)
            except (EngineError, ActorLostError, DeadlineError) as error:
                reason = str(error)
                self._emit(EventKind.ACTOR_LOST, handle.name, reason=reason)
                await self._discard(handle)
            else:
                return health, handle

    async def dismiss(self) -> None:
        """End all actors for good, before a session begins anew from a checkpoint."""
        for watched in self.supervisor.watched:
            self.supervisor.forget(watched.handle.name)
        scorers = (*self._rewards, *self._reward_models, *self.teachers.handles)
        others = (*scorers, *self._workers)
        ends = [self._runtime.end(handle) for handle in others]
        await asyncio.gather(self._runtime.end(self.queue), self.learner.dismiss(), *ends)

    async def _discard(self, handle: ActorHandle) -> None:
        """End a worker for good and give its leases to others."""
        self._working.pop(handle.name, None)
        await self._runtime.end(handle)
        self._workers.discard(handle)
        await self.ask_queue("lose_worker", worker=handle.name)

    async def _await_rebirth(self, watched: Watched) -> tuple[Health, ActorHandle]:
        """Wait until Ray has brought an actor back; one that hangs, or asks to be replaced, is killed first."""
        handle = watched.handle
        if not self._runtime.survives(handle.role):
            raise RunError(f"{handle.name} died and cannot come back in this runtime.")
        try:
            health: Health = await handle.call("health", deadline_s=self._config.runtime.health_deadline_s)
        except DeadlineError:
            await self._runtime.kill(handle)
        except ActorLostError:
            pass
        else:
            if health.problem is None:
                return health, handle
            await self._runtime.kill(handle)
        patience = Patience(
            deadline_s=self._config.runtime.health_deadline_s, total_s=self._config.runtime.start_deadline_s
        )
        end = time.monotonic() + patience.total_s
        while True:
            health = await call_patiently(handle, "health", patience)
            if health.problem is None:
                return health, handle
            # The process that was killed may answer once more.
            if time.monotonic() >= end:
                raise RunError(f"{handle.name} must come back sound, but still says: {health.problem}")
            await asyncio.sleep(_PAUSE_S)

    async def _on_reborn(self, watched: Watched, health: Health) -> None:
        """Tell of an actor that died and came back between two probes.

        Raises:
            LearnerLostError: it is the learner.
            RunError: it did so more often than it may.
        """
        name = watched.handle.name
        if watched.handle.role is Role.LEARNER:
            await self.learner.reborn(watched, health)
        reason = f"{name} answers from another process than before"
        self._emit(EventKind.ACTOR_LOST, name, reason=reason)
        self._count_restart(watched, reason)
        if watched.handle.role is Role.TEACHER:
            await self._feed(watched.handle)
        self._emit(EventKind.ACTOR_RESTARTED, name, replaces=name, pid=health.pid)
