"""The actors of a reinforcement-learning run, of which the learner's are part: started, kept alive, fed with weights.

RolloutActors = LearnerActors + queue + reward workers, reward models + TeacherActors + rollout workers, one Supervisor

learner --publish--> object store --pull--> rollout workers, teachers      (RolloutActors.publish, WeightPulls)
Supervisor --lost--> LostActors: reissue its leases, end it, start anew, refit with current weights, work again
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from trl_ray.actors.calling import Patience, call_patiently
from trl_ray.actors.reward_worker import RewardWorker
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.pipelines.rollouts.lost_actors import LostActors
from trl_ray.pipelines.rollouts.reward_model_actors import spawn_reward_models
from trl_ray.pipelines.rollouts.teacher_actors import TeacherActors, TeacherArguments
from trl_ray.pipelines.rollouts.weight_pulls import WeightPulls
from trl_ray.pipelines.run.learner_actors import Emit, LearnerActors, drained, learner_lost
from trl_ray.runtime import waits
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime
from trl_ray.runtime.supervision import Supervisor, Watched
from trl_ray.runtime.weights import WeightTransport
from trl_ray.types import (
    ActorReport,
    Event,
    EventKind,
    Handle,
    Health,
    IntArray,
    TrainingGap,
    WeightVersion,
    steady_time,
)

_DRAIN_S = 1.0
"""Actors that are well answer in a moment; the events of others are written down when they come."""
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
        self._training: TrainingGap | None = None
        self.teachers = TeacherActors(
            runtime=runtime,
            arguments=arguments.teachers,
            weights=self._weights,
            emit=emit,
            checkpoint=arguments.learner.get("checkpoint"),
            deadline_s=config.runtime.pull_deadline_s,
        )
        self._rewards, self._reward_models = list[ActorHandle](), list[ActorHandle]()
        self._queue: ActorHandle | None = None
        self.restarts = 0
        """How often an actor came back, or a worker was added."""
        self._drains: dict[str, asyncio.Task[ActorReport]] = {}
        self.supervisor = Supervisor(
            interval_s=config.runtime.health_interval_s,
            deadline_s=config.runtime.health_deadline_s,
            on_lost=self._on_lost,
            on_reborn=self._on_reborn,
        )
        self.learner = LearnerActors(
            runtime=runtime, config=config, arguments=arguments.learner, emit=emit, supervisor=self.supervisor
        )
        self._pulls = WeightPulls(
            weights=self._weights,
            teachers=self.teachers,
            supervisor=self.supervisor,
            emit=emit,
            patience_s=config.runtime.health_deadline_s,
            deadline_s=config.runtime.pull_deadline_s,
        )
        self._lost = LostActors(
            runtime=runtime,
            config=config.runtime,
            pulls=self._pulls,
            emit=emit,
            spawn=self._spawn_worker,
            lose_leases=lambda name: self.ask_queue("lose_worker", worker=name),
        )

    @property
    def queue(self) -> ActorHandle:
        """The queue's handle."""
        assert self._queue is not None, "the actors must be started first"
        return self._queue

    @property
    def working(self) -> tuple[ActorHandle, ...]:
        """Rollout workers that hold current weights."""
        return tuple(self._pulls.working.values())

    @property
    def weights(self) -> WeightTransport:
        """How weights reach the engines; its state goes into checkpoints."""
        return self._weights

    @property
    def evidence(self) -> Evidence:
        """What the newest weight checks of working engines, and of the learner, have shown."""
        return self._pulls.evidence(self._training)

    async def start(self) -> None:
        """Start every actor side by side, publish the learner's weights, and let the workers begin."""
        self._queue = await self._runtime.spawn(Role.QUEUE, "queue", RolloutQueue, **self._arguments.queue)
        await self.learner.spawn()
        await self._spawn_rewards()
        await self.teachers.spawn()
        slots = range(self._config.rollout.most_workers)
        placed = [slot for slot in slots if await self._runtime.has_room(Role.ROLLOUT, slot=slot)]
        workers = [await self._lost.first_worker(slot) for slot in placed]
        with learner_lost():
            await self.learner.meet()
            await self._greet(self.learner.handle)
        others = (self._queue, *self._reward_models, *self._rewards, *self.teachers.handles)
        await asyncio.gather(*(self._greet(handle) for handle in others))
        healths = await asyncio.gather(*(self._greet(handle, watch=False) for handle in workers))
        await self.publish(step=0)
        await self.teachers.feed_all()
        for slot, handle, health in zip(placed, workers, healths, strict=True):
            await self._pulls.refit(handle)
            self.supervisor.watch(handle, slot=slot, health=health)
        for slot in set(slots) - set(placed):
            self.supervisor.also(f"start rollout-{slot}", partial(self._add_worker, slot))

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
        begin, self._lost.steps = steady_time(), max(self._lost.steps, step)
        with learner_lost():
            published = await self._weights.publish(self.learner.handle, step=step)
        identity = published.identity
        if published.check is not None and published.check.training is not None:
            self._training = published.check.training
        seconds = round(steady_time() - begin, 4)
        self._emit(EventKind.WEIGHTS_PUBLISHED, "learner", **asdict(identity), seconds=seconds)
        return identity

    async def pull(self) -> None:
        """Have everybody who works pull the newest weights; see `WeightPulls`."""
        await self._pulls.pull()

    async def drain(self) -> ActorReport:
        """Events and spans of all actors since the last call; of those that do not answer at once, with a later one."""
        scorers = (*self._reward_models, *self._rewards, *self.teachers.handles)
        fresh = [each for each in (self.queue, self.learner.handle, *scorers, *self.working) if self._is_drained(each)]
        for handle in fresh:
            self._drains[handle.name] = asyncio.create_task(drained(handle), name=f"drain of {handle.name}")
        asked = [self._drains[handle.name] for handle in fresh]
        await waits.first(asked, on="events", deadline_s=_DRAIN_S, return_when=asyncio.ALL_COMPLETED)
        names = [name for name, each in self._drains.items() if each.done()]
        reports = [self._drains.pop(name).result() for name in names]
        events = [event for report in reports for event in report.events]
        return ActorReport(events=events, spans=[span for report in reports for span in report.spans])

    def _is_drained(self, handle: ActorHandle) -> bool:
        """Whether nothing is outstanding that the actor was asked for before."""
        return handle.name not in self._drains

    async def ask_queue(self, method: str, /, **kwargs: Any) -> Any:
        """Call the queue, waiting out its restart."""
        with waits.told(f"queue.{method}", QUEUE_PATIENCE.total_s):
            return await call_patiently(self.queue, method, QUEUE_PATIENCE, **kwargs)

    async def ask_worker(self, handle: Handle, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a rollout worker; the wait ends with the worker, however its loss was noticed.

        Raises:
            ActorLostError, DeadlineError: of the worker, which is replaced.
        """
        call = handle.call(method, *args, deadline_s=deadline_s, **kwargs)
        return await self.supervisor.while_alive(handle.name, call)

    def _emit(self, kind: EventKind, actor: str, /, **detail: Any) -> None:
        self._emit_event(Event.now(kind, actor, **detail))

    async def _spawn_worker(self, name: str, slot: int) -> ActorHandle:
        handles = {"queue": self.queue, "rewards": tuple(self._rewards), "teachers": self.teachers.by_teacher}
        arguments = {**self._arguments.rollout, **handles, "name": name}
        return await self._runtime.spawn(Role.ROLLOUT, name, RolloutWorker, slot=slot, **arguments)

    async def _greet(self, handle: ActorHandle, *, watch: bool = True) -> Health:
        """Wait for an actor's constructor."""
        health: Health = await handle.call("health", deadline_s=self._config.runtime.start_deadline_s)
        self._emit(EventKind.ACTOR_STARTED, handle.name, pid=health.pid)
        if watch:
            self.supervisor.watch(handle, health=health)
        return health

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
        self._pulls.working.pop(name, None)
        self.teachers.lose(watched.handle)
        pid = watched.health.pid if watched.health else None
        self._emit(EventKind.ACTOR_LOST, name, reason=reason, pid=pid)
        begin = steady_time()
        if role is Role.ROLLOUT:
            await self._lost.discard(watched.handle)
            health, handle = await self._lost.start_worker(watched.slot, reason)
        else:
            health, handle = await self._lost.await_rebirth(watched, reason)
            if role is Role.TEACHER:
                await self._feed(handle)
        self.supervisor.watch(handle, slot=watched.slot, health=health)
        self.restarts += 1
        told = {"replaces": name, "pid": health.pid, "same_process": health.pid == pid}
        self._emit(EventKind.ACTOR_RESTARTED, handle.name, **told, seconds=round(steady_time() - begin, 3))

    async def _feed(self, handle: ActorHandle) -> None:
        """Give a teacher that came back its weights; one that is lost meanwhile is found by the next probe."""
        try:
            await self.teachers.feed(handle)
        except (ActorLostError, DeadlineError) as error:
            self._emit(EventKind.WARNING, handle.name, detail=f"it could not be given its weights: {error}")

    async def _add_worker(self, slot: int) -> None:
        """Start a worker that had no room at first."""
        health, handle = await self._lost.start_worker(slot, "it had no room")
        self.restarts += 1
        self._emit(EventKind.ACTOR_STARTED, handle.name, pid=health.pid)
        self.supervisor.watch(handle, slot=slot, health=health)

    async def dismiss(self) -> None:
        """End all actors for good, before a session begins anew from a checkpoint."""
        for watched in self.supervisor.watched:
            self.supervisor.forget(watched.handle.name)
        await self._pulls.close()
        drains = list(self._drains.values())
        for task in drains:
            task.cancel()
        await asyncio.gather(*drains, return_exceptions=True)
        scorers = (*self._rewards, *self._reward_models, *self.teachers.handles)
        others = (*scorers, *self._lost.workers)
        ends = [self._runtime.end(handle) for handle in others]
        if self._queue is not None:
            ends.append(self._runtime.end(self._queue))
        await asyncio.gather(self.learner.dismiss(), *ends)

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
        self._lost.count_restart(watched, reason)
        if watched.handle.role is Role.TEACHER:
            await self._feed(watched.handle)
        self._emit(EventKind.ACTOR_RESTARTED, name, replaces=name, pid=health.pid)
