"""The actors of a reinforcement-learning run, of which the learner's are part: started, kept alive, fed with weights.

RolloutActors = LearnerActors + queue + reward workers, reward models + TeacherActors + rollout workers, one Supervisor

learner --publish--> object store --pull--> rollout workers, teachers      (RolloutActors.publish, RolloutActors.pull)
Supervisor --lost--> RolloutActors: end it, reissue its leases, start anew, refit with current weights, work again
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from trl_ray.actors.calling import Patience, call_patiently
from trl_ray.actors.reward_worker import RewardWorker
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.errors import ActorLostError, DeadlineError, EngineError, LearnerLostError, RunError, WeightError
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.pipelines.rollouts.reward_model_actors import spawn_reward_models
from trl_ray.pipelines.rollouts.teacher_actors import TeacherActors, TeacherArguments
from trl_ray.pipelines.run.learner_actors import Emit, LearnerActors, drained, learner_lost
from trl_ray.runtime import waits
from trl_ray.runtime.restart_budget import STEPS_PER_RESTART, RestartBudget
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime
from trl_ray.runtime.supervision import Supervisor, Watched
from trl_ray.runtime.weights import Published, WeightTransport
from trl_ray.types import (
    ActorReport,
    Event,
    EventKind,
    Handle,
    Health,
    IntArray,
    PullReport,
    SamplingGap,
    TrainingGap,
    WeightVersion,
)

_CONTROL_S = 60.0
_PAUSE_S = 0.25
_ROOM_S = 0.5
"""Between two looks for room, or for a restart that was given back."""
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
        self._budgets: dict[str, RestartBudget] = {}
        self._steps = 0
        """Finished optimizer steps."""
        self._begun: Counter[int] = Counter()
        """Workers that were ever started in each place; none gets the name of another."""
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._aside: set[str] = set()
        """Workers whose pull takes so much longer than others' that nobody waits for it."""
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
        slots = range(self._config.rollout.num_workers)
        placed = [slot for slot in slots if await self._runtime.has_room(Role.ROLLOUT, slot=slot)]
        workers = [await self._spawn_worker(f"rollout-{slot}", slot) for slot in placed]
        with learner_lost():
            await self.learner.meet()
            await self._greet(self.learner.handle)
        others = (self._queue, *self._reward_models, *self._rewards, *self.teachers.handles)
        await asyncio.gather(*(self._greet(handle) for handle in others))
        healths = await asyncio.gather(*(self._greet(handle, watch=False) for handle in workers))
        await self.publish(step=0)
        await self.teachers.feed_all()
        for slot, handle, health in zip(placed, workers, healths, strict=True):
            await self._refit(handle)
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
        begin, self._steps = time.time(), max(self._steps, step)
        with learner_lost():
            published = await self._weights.publish(self.learner.handle, step=step)
        identity = published.identity
        if published.check is not None and published.check.training is not None:
            self._training = published.check.training
        seconds = round(time.time() - begin, 4)
        self._emit(EventKind.WEIGHTS_PUBLISHED, "learner", **asdict(identity), seconds=seconds)
        return identity

    async def pull(self) -> None:
        """Have every working rollout worker and every teacher pull the newest weights, side by side.

        Nobody waits for those that cannot, which are replaced meanwhile, nor for a worker that takes far longer than
        another one: it catches up by itself.

        Raises:
            LearnerLostError: the weights were lost with the learner's node.
        """
        handles = (*self.working, *self.teachers.following)
        for handle in handles:
            if handle.name not in self._pulls:
                work = self._pull_newest(handle)
                self._pulls[handle.name] = asyncio.create_task(work, name=f"pull of {handle.name}")
        pulls = {handle.name: self._pulls[handle.name] for handle in handles}
        with waits.told(f"{', '.join(pulls)} to pull weights", self._config.runtime.pull_deadline_s):
            await self._all_but_late(pulls)
        for pull in pulls.values():
            if pull.done():
                pull.result()

    async def _all_but_late(self, pulls: Mapping[str, asyncio.Task[None]]) -> None:
        """Wait for pulls; those of workers that are late when another one has long pulled are set aside."""
        loop, patience_s = asyncio.get_running_loop(), self._config.runtime.health_deadline_s
        begin, slowest_s, pending = loop.time(), 0.0, set(pulls.values())
        while pending:
            done, _ = await waits.first(pending, on="pulls", deadline_s=patience_s)
            pending -= done
            taken_s = loop.time() - begin
            slowest_s = taken_s if done else slowest_s
            pulled = any(pulls[name].done() for name in self._working if name in pulls)
            if not pulled or taken_s < max(patience_s, 2 * slowest_s):
                continue
            for name in [name for name, pull in pulls.items() if pull in pending and name in self._working]:
                self._aside.add(name)
                del self._working[name]
                pending.discard(pulls[name])
                detail = "the run goes on without it until it has pulled the newest weights"
                self._emit(EventKind.WAITING, "driver", on=f"{name}.pull", seconds=round(taken_s, 1), detail=detail)

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
        handle = await self._runtime.spawn(Role.ROLLOUT, name, RolloutWorker, slot=slot, **arguments)
        self._workers.add(handle)
        self._begun[slot] += 1
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

    async def _pull_newest(self, handle: ActorHandle) -> None:
        """Have a worker or teacher pull until it has the newest weights, and report it lost when it cannot."""
        pull, name = self.teachers.follow if handle.role is Role.TEACHER else self._pull_one, handle.name
        try:
            pulled: Published | None = None
            while pulled is not self._weights.newest:
                pulled = self._weights.newest
                await self.supervisor.while_alive(name, pull(handle))
        except LearnerLostError:
            if name not in self._aside:  # else nobody waits, and the learner's loss is found by others
                raise
        except (WeightError, EngineError, ActorLostError, DeadlineError) as error:
            if isinstance(error, WeightError):
                self._emit(EventKind.WEIGHT_CHECK, name, agrees=False, detail=str(error))
            self.supervisor.report(name, str(error))
        else:
            if name in self._aside:
                self._working[name] = handle
        finally:
            self._aside.discard(name)
            self._pulls.pop(name, None)

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
            await self._discard(watched.handle)
            health, handle = await self._start_worker(watched.slot, reason)
        else:
            health, handle = await self._await_rebirth(watched, reason)
            if role is Role.TEACHER:
                await self._feed(handle)
        self.supervisor.watch(handle, slot=watched.slot, health=health)
        told = {"replaces": name, "pid": health.pid, "same_process": health.pid == pid}
        self._emit(EventKind.ACTOR_RESTARTED, handle.name, **told, seconds=round(time.time() - begin, 3))

    async def _feed(self, handle: ActorHandle) -> None:
        """Give a teacher that came back its weights; one that is lost meanwhile is found by the next probe."""
        try:
            await self.teachers.feed(handle)
        except (ActorLostError, DeadlineError) as error:
            self._emit(EventKind.WARNING, handle.name, detail=f"it could not be given its weights: {error}")

    def _budget(self, name: str) -> RestartBudget:
        """The restarts of whoever stands in the place of an actor."""
        fresh = RestartBudget(allowed=self._config.runtime.max_restarts)
        return self._budgets.setdefault(name.partition("+")[0], fresh)

    def _count_restart(self, watched: Watched, reason: str) -> None:
        if self._budget(watched.handle.name).take(self._steps) is None:
            raise self._lost_too_often(watched.handle.name, reason)

    def _lost_too_often(self, name: str, reason: str) -> RunError:
        return RunError(
            f"{name} may be restarted {self._config.runtime.max_restarts} times (runtime.max_restarts), and "
            f"{STEPS_PER_RESTART} finished steps give one back, but it was lost again: {reason}"
        )

    async def _start_worker(self, slot: int, reason: str) -> tuple[Health, ActorHandle]:
        """Start a rollout worker in a place that has none, again if it is lost before it works; others work meanwhile.

        Args:
            slot: the place.
            reason: why the last one was lost.
        """
        base = f"rollout-{slot}"
        while True:
            await self._room_for(base, slot)
            begun = self._begun[slot]
            if begun:
                await self._allow_restart(base, reason)
            handle = await self._spawn_worker(f"{base}+{begun}" if begun else base, slot)
            try:
                return await self._bring_up(handle), handle
            except LearnerLostError:
                raise
            except (EngineError, ActorLostError, DeadlineError) as error:
                reason = str(error)
                self._emit(EventKind.ACTOR_LOST, handle.name, reason=reason)
                await self._discard(handle)

    async def _bring_up(self, handle: ActorHandle) -> Health:
        """Have a fresh worker load its model, pull, and work."""
        health: Health = await handle.call("health", deadline_s=self._config.runtime.start_deadline_s)
        await self._refit(handle)
        return health

    async def _room_for(self, name: str, slot: int) -> None:
        """Wait for a node that has room for a worker; tells so at once, as the run goes on with fewer."""

        async def look() -> bool:
            return await self._runtime.has_room(Role.ROLLOUT, slot=slot)

        await waits.until(look, on=f"a node with room for {name}", every_s=_ROOM_S, told_at_once=True)

    async def _allow_restart(self, name: str, reason: str) -> None:
        """Wait before a restart the longer the more there were; where others work, also until one is given back.

        Raises:
            RunError: the worker was lost more often than it may be, and no other one works.
        """
        budget = self._budget(name)

        waits_s: list[float] = []

        async def look() -> bool:
            if (wait_s := budget.take(self._steps)) is not None:
                waits_s.append(wait_s)
            elif not self._working:
                raise self._lost_too_often(name, reason)
            return bool(waits_s)

        on = f"{STEPS_PER_RESTART} finished steps to restart {name}, which was lost too often (runtime.max_restarts)"
        await waits.until(look, on=on, every_s=_ROOM_S, told_at_once=True)
        await waits.pause(waits_s[0])

    async def _add_worker(self, slot: int) -> None:
        """Start a worker that had no room at first."""
        health, handle = await self._start_worker(slot, "it had no room")
        self._emit(EventKind.ACTOR_STARTED, handle.name, pid=health.pid)
        self.supervisor.watch(handle, slot=slot, health=health)

    async def dismiss(self) -> None:
        """End all actors for good, before a session begins anew from a checkpoint."""
        for watched in self.supervisor.watched:
            self.supervisor.forget(watched.handle.name)
        tasks = [*self._pulls.values(), *self._drains.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        scorers = (*self._rewards, *self._reward_models, *self.teachers.handles)
        others = (*scorers, *self._workers)
        ends = [self._runtime.end(handle) for handle in others]
        if self._queue is not None:
            ends.append(self._runtime.end(self._queue))
        await asyncio.gather(self.learner.dismiss(), *ends)

    async def _discard(self, handle: ActorHandle) -> None:
        """Give a worker's leases to others, at once, and end it for good.

        Should it still work, the ledger refuses what it brings.
        """
        self._working.pop(handle.name, None)
        await self.ask_queue("lose_worker", worker=handle.name)
        await self._runtime.end(handle)
        self._workers.discard(handle)

    async def _await_rebirth(self, watched: Watched, reason: str) -> tuple[Health, ActorHandle]:
        """Wait until Ray has brought an actor back; one that hangs, or asks to be replaced, is killed first.

        One that turns out to have been slow, and no more, costs no restart.
        """
        handle = watched.handle
        if not self._runtime.survives(handle.role):
            raise RunError(f"{handle.name} died and cannot come back in this runtime.")
        found = await self._found_sound(watched)
        if found is not None and watched.health is not None and found.pid == watched.health.pid:
            return found, handle
        self._count_restart(watched, reason)
        if found is not None:
            return found, handle
        patience = Patience(
            deadline_s=self._config.runtime.health_deadline_s, total_s=self._config.runtime.start_deadline_s
        )
        end = time.monotonic() + patience.total_s
        with waits.told(f"{handle.name} to come back", patience.total_s):
            while True:
                health = await call_patiently(handle, "health", patience)
                if health.problem is None:
                    return health, handle
                # The process that was killed may answer once more.
                if time.monotonic() >= end:
                    raise RunError(f"{handle.name} must come back sound, but still says: {health.problem}")
                await waits.pause(_PAUSE_S)

    async def _found_sound(self, watched: Watched) -> Health | None:
        """What a lost actor answers now; one that answers nothing or is not sound is killed."""
        handle, deadline_s = watched.handle, self._config.runtime.health_deadline_s
        if not watched.is_silent:
            try:
                health: Health = await handle.call("health", deadline_s=deadline_s)
            except ActorLostError:
                return None
            except DeadlineError:
                pass
            else:
                if health.problem is None:
                    return health
        await self._runtime.kill(handle)
        return None

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
