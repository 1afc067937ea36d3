"""Rollout actors on a fake runtime that writes down what happened in order."""

import asyncio
from dataclasses import dataclass, replace

import numpy as np

from fakes import FakeHandle, health, until
from trl_ray.actors.rollout_worker import PullReport
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.pipelines.rollouts.rollout_actors import ActorArguments, RolloutActors
from trl_ray.pipelines.rollouts.teacher_actors import TeacherArguments
from trl_ray.runtime.runtime import Role
from trl_ray.types import ActorReport, EventKind, WeightCheck, WeightVersion


def version(number):
    return WeightVersion(version=number, checksum=f"c{number}")


class FakeRuntime:
    """Hands out fake handles; `script` says how an actor of a name answers, `log` what happened in order."""

    def __init__(self):
        self.handles, self.log, self.script, self.given = {}, [], {}, {}
        self.published = 0
        self.full = set()
        """Places of workers on a node that is lost."""

    async def spawn(self, role, name, cls, /, *, slot=0, **kwargs):
        self.log.append(f"spawn {name}")
        self.given[name] = {"role": role, "slot": slot, **kwargs}
        made = LoggedHandle(name=name, role=role, runtime=self)
        made.answers = {"health": health(pid=len(self.handles) + 1), "drain": ActorReport(), **self.defaults(role)}
        made.answers |= self.script.get(name, {})
        self.handles[name] = made
        return made

    def defaults(self, role):
        if role is Role.LEARNER:
            return {
                "publish": lambda: version(self.published),
                "identity": lambda: version(self.published),
                "weight_check": lambda ids, **further: WeightCheck(
                    token_ids=ids, logprobs=np.zeros(2, np.float32), version=self.published
                ),
            }
        if role is Role.ROLLOUT:
            return {"pull": lambda shared, check: report(shared, check)}
        return Weighing(pid=len(self.handles) + 1).answers if role is Role.TEACHER else {}

    async def kill(self, handle):
        self.log.append(f"kill {handle.name}")

    async def end(self, handle):
        self.log.append(f"end {handle.name}")

    async def has_room(self, role, *, slot=0):
        return slot not in self.full

    async def renew(self):
        self.log.append("renew")

    def survives(self, role):
        return role in (Role.QUEUE, Role.REWARD, Role.REWARD_MODEL, Role.TEACHER)

    async def close(self):
        pass


class Weighing:
    """A teacher that knows which version it holds: none at first, 4 from a checkpoint, else what it pulled."""

    def __init__(self, *, pid):
        self.health = health(pid=pid)
        names = ("health", "pull", "restore", "save")
        self.answers = {name: getattr(self, f"_{name}") for name in names}

    def _health(self):
        return self.health

    def _pull(self, shared, check):
        self.health = replace(self.health, version=shared.version)
        return report(shared, None)

    def _restore(self, folder):
        self.health = replace(self.health, version=4)

    def _save(self, folder):
        return True


@dataclass(slots=True, kw_only=True, eq=False)
class LoggedHandle(FakeHandle):
    """Writes what matters for the order into the runtime's log."""

    runtime: FakeRuntime

    async def call(self, method, /, *args, deadline_s, **kwargs):
        if method in ("restore", "save"):
            self.runtime.log.append(f"{self.name} {method} {args[0]}")
        if method in ("pull", "start"):
            what = f" {args[0].version}" if method == "pull" else ""
            self.runtime.log.append(f"{self.name} {method}{what}")
        if method == "lose_worker":
            self.runtime.log.append(f"{self.name} lose_worker {kwargs['worker']}")
        return await FakeHandle.call(self, method, *args, deadline_s=deadline_s, **kwargs)


def report(shared, check):
    agrees = {"weight_check_mean": 0.0, "weight_check_max": 0.0} if check is not None else {}
    return PullReport(version=shared.version, checksum=shared.checksum, seconds=0.1, **agrees)


class Stage:
    """Rollout actors, their runtime and its events."""

    def __init__(self, *, workers=1, max_restarts=10, canary_every=1, models=(), teachers=(), checkpoint=None, ranks=1):
        self.runtime, self.events = FakeRuntime(), []
        config = GRPOConfig(
            rollout={"num_workers": workers, "canary_every": canary_every},
            runtime={"max_restarts": max_restarts, "num_learners": ranks},
        )
        arguments = ActorArguments(
            learner={} if checkpoint is None else {"checkpoint": checkpoint},
            queue={},
            rollout={},
            reward={} if not teachers else None,
            reward_models=tuple(models),
            teachers=tuple(TeacherArguments(source=source, vocab_size=9) for source in teachers),
        )
        self.actors = RolloutActors(
            runtime=self.runtime,
            config=config,
            arguments=arguments,
            weight_check_ids=np.arange(3, dtype=np.int32),
            emit=self.events.append,
        )

    async def start(self):
        await self.actors.start()
        self.runtime.log.clear()
        self.events.clear()

    async def lose(self, name, reason="it died"):
        """What the supervisor does when a probe fails."""
        [watched] = [each for each in self.actors.supervisor.watched if each.handle.name == name]
        await self.actors._on_lost(watched, reason)

    async def pull(self):
        """What the loop has them do after a step, under watch; until whoever was lost by it is back."""
        watch = asyncio.create_task(self.actors.supervisor.run())
        pull = asyncio.create_task(self.actors.pull())
        try:
            await until(lambda: (pull.done() and self._is_whole()) or watch.done())
            for task in (watch, pull):
                if task.done():
                    task.result()
        finally:
            for task in (watch, pull):
                task.cancel()
            await asyncio.gather(watch, pull, return_exceptions=True)

    def _is_whole(self):
        return len(self.told(EventKind.ACTOR_LOST)) == len(self.told(EventKind.ACTOR_RESTARTED))

    def told(self, kind):
        return [(event.actor, dict(event.detail)) for event in self.events if event.kind is kind]

    def watched(self):
        return sorted(each.handle.name for each in self.actors.supervisor.watched)
