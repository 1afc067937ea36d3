"""The learner alone: started, watched, asked; what a pipeline without rollouts needs of actors.

LearnerActors.start --spawn, join--> learner, or its ranks          Supervisor --lost--> LearnerLostError
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ActorLostError, DeadlineError, LearnerLostError
from trl_ray.pipelines.run.learner_group import LearnerGroup, ranks_of, spawn_learner
from trl_ray.runtime.runtime import ActorHandle, Runtime
from trl_ray.runtime.supervision import Supervisor, Watched
from trl_ray.types import ActorReport, Event, EventKind, Health

Emit = Callable[[Event], None]
T = TypeVar("T")
_CONTROL_S = 60.0


class Watch(Protocol):
    """What notices that a learner is gone or hangs."""

    async def run(self) -> None:
        """Until cancelled; raises when the learner is lost."""
        ...


async def under_watch(watch: Watch, work: Coroutine[Any, Any, T]) -> T:
    """The result of work that needs the learner, ended as soon as the learner is lost.

    Raises:
        LearnerLostError: it died or hung.
    """
    task = asyncio.create_task(work, name="work")
    supervise = asyncio.create_task(watch.run(), name="supervise")
    try:
        await asyncio.wait([task, supervise], return_when=asyncio.FIRST_COMPLETED)
        if supervise.done():  # two may end together; the supervisor knows best why an actor is gone
            supervise.result()
        return await task
    finally:
        for each in (task, supervise):
            each.cancel()
        await asyncio.gather(task, supervise, return_exceptions=True)


@contextmanager
def learner_lost() -> Iterator[None]:
    """Whatever became of the call, the learner can only go on from a checkpoint."""
    try:
        yield
    except (ActorLostError, DeadlineError) as error:
        raise LearnerLostError(str(error)) from None


class LearnerActors:
    """Starts the ranks of one learner and keeps watch over them.

    Args:
        runtime: where actors live.
        config: of the run.
        arguments: of the learner's constructor.
        emit: takes events.
    """

    def __init__(self, *, runtime: Runtime, config: RunConfig, arguments: Mapping[str, Any], emit: Emit) -> None:
        self._runtime, self._config, self._arguments, self._emit_event = runtime, config, arguments, emit
        self._learner: ActorHandle | None = None
        self.supervisor = Supervisor(
            interval_s=config.runtime.health_interval_s,
            deadline_s=config.runtime.health_deadline_s,
            on_lost=self._on_lost,
            on_reborn=self._on_reborn,
        )

    @property
    def is_started(self) -> bool:
        """Whether there is a learner to ask."""
        return self._learner is not None

    async def start(self) -> None:
        """Load the model on every rank, and begin to watch.

        Raises:
            LearnerLostError: a rank died or did not come up in time.
        """
        deadline_s = self._config.runtime.start_deadline_s
        self._learner = await spawn_learner(self._runtime, self._config, self._arguments)
        with learner_lost():
            if isinstance(self._learner, LearnerGroup):
                await self._learner.join(deadline_s=deadline_s)
            ranks = ranks_of(self._learner)
            healths: list[Health] = await asyncio.gather(*(r.call("health", deadline_s=deadline_s) for r in ranks))
            merged: Health = await self._learner.call("health", deadline_s=deadline_s)
        for rank, health in zip(ranks, healths, strict=True):
            self._emit(EventKind.ACTOR_STARTED, rank.name, pid=health.pid)
        self.supervisor.watch(self._learner, health=merged)

    async def ask(self, method: str, /, *args: Any, deadline_s: float | None = None, **kwargs: Any) -> Any:
        """Call the learner; None allows it as long as a step.

        Raises:
            LearnerLostError: it died, or did not answer in time.
        """
        assert self._learner is not None, "the actors must be started first"
        with learner_lost():
            return await self._learner.call(
                method, *args, deadline_s=deadline_s or self._config.runtime.step_deadline_s, **kwargs
            )

    async def drain(self) -> ActorReport:
        """Events and spans since the last call; nothing where the learner is gone, which the supervisor tells of."""
        try:
            assert self._learner is not None, "the actors must be started first"
            report: ActorReport = await self._learner.call("drain", deadline_s=_CONTROL_S)
        except (ActorLostError, DeadlineError):
            return ActorReport()
        return report

    async def dismiss(self) -> None:
        """End all ranks for good."""
        if self._learner is not None:
            self.supervisor.forget(self._learner.name)
        await asyncio.gather(*(self._runtime.end(handle) for handle in ranks_of(self._learner)))
        self._learner = None

    def _emit(self, kind: EventKind, actor: str, /, **detail: Any) -> None:
        self._emit_event(Event(kind=kind, actor=actor, time=time.time(), detail=detail))

    async def _on_lost(self, watched: Watched, reason: str) -> None:
        self.supervisor.forget(watched.handle.name)
        raise LearnerLostError(reason)

    async def _on_reborn(self, watched: Watched, health: Health) -> None:
        del health
        raise LearnerLostError(f"{watched.handle.name} answers from another process than before")
