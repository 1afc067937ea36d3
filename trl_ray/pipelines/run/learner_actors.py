"""The learner: started, watched, asked; alone in pipelines on datasets, part of the crew where there are rollouts.

LearnerActors.start --spawn, join--> learner, or its ranks          Supervisor --lost--> LearnerLostError
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ActorLostError, DeadlineError, LearnerLostError, StartError
from trl_ray.pipelines.run.learner_group import LearnerGroup, ranks_of, spawn_learner
from trl_ray.runtime import waits
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


async def under_watch(watch: Watch, work: Coroutine[Any, Any, T], *beside: Coroutine[Any, Any, None]) -> T:
    """The result of work that needs the learner, ended as soon as the learner is lost.

    What runs `beside` it never ends by itself, and ends it by an error.

    Raises:
        LearnerLostError: it died or hung.
    """
    return await beside_guards(work, watch.run(), *beside)


async def beside_guards(work: Coroutine[Any, Any, T], *beside: Coroutine[Any, Any, None]) -> T:
    """The result of work, ended by the first error of what runs beside it."""
    task = asyncio.create_task(work, name="work")
    guards = [asyncio.create_task(each) for each in beside]
    try:
        await waits.first([task, *guards], on="training")
        for guard in guards:  # two may end together; the supervisor knows best why an actor is gone
            if guard.done():
                guard.result()
        return await task
    finally:
        for each in (task, *guards):
            each.cancel()
        await asyncio.gather(task, *guards, return_exceptions=True)


@contextmanager
def learner_lost() -> Iterator[None]:
    """Whatever became of the call, the learner can only go on from a checkpoint; one that cannot start, not even so."""
    try:
        yield
    except StartError:
        raise
    except (ActorLostError, DeadlineError) as error:
        raise LearnerLostError(str(error)) from None


async def drained(handle: ActorHandle) -> ActorReport:
    """Events and spans of an actor since the last call; nothing where it is gone, which the supervisor tells of."""
    try:
        report: ActorReport = await handle.call("drain", deadline_s=_CONTROL_S)
    except (ActorLostError, DeadlineError):
        # Whatever it had gathered died with it.
        return ActorReport()
    return report


class LearnerActors:
    """Starts the ranks of one learner and keeps watch over them.

    Args:
        runtime: where actors live.
        config: of the run.
        arguments: of the learner's constructor.
        emit: takes events.
        supervisor: of a larger crew, which asks `lost` and `reborn` here; None watches the learner alone.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        config: RunConfig,
        arguments: Mapping[str, Any],
        emit: Emit,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._runtime, self._config, self._arguments, self._emit = runtime, config, arguments, emit
        self._learner: ActorHandle | None = None
        self.supervisor = supervisor or Supervisor(
            interval_s=config.runtime.health_interval_s,
            deadline_s=config.runtime.health_deadline_s,
            on_lost=self.lost,
            on_reborn=self.reborn,
        )

    @property
    def is_started(self) -> bool:
        """Whether there is a learner to ask."""
        return self._learner is not None

    @property
    def handle(self) -> ActorHandle:
        """The learner's handle; of several ranks, the one that stands for all."""
        assert self._learner is not None, "the actors must be started first"
        return self._learner

    async def start(self) -> None:
        """Load the model on every rank, and begin to watch.

        Raises:
            LearnerLostError: a rank died or did not come up in time.
        """
        await self.spawn()
        with learner_lost():
            await self.meet()
            health = await self._health(self.handle)
        if not isinstance(self.handle, LearnerGroup):
            self._tell_started(self.handle, health)
        self.supervisor.watch(self.handle, health=health)

    async def spawn(self) -> None:
        """Start the ranks; each has yet to load its model."""
        self._learner = await spawn_learner(self._runtime, self._config, self._arguments)

    async def meet(self) -> None:
        """Have the ranks meet and load the model, and tell of each; one alone has nobody to meet.

        Raises:
            ActorLostError, DeadlineError: of the first rank that fails.
        """
        if isinstance(self.handle, LearnerGroup):
            await self.handle.join(deadline_s=self._config.runtime.start_deadline_s)
            ranks = self.handle.members
            healths = await asyncio.gather(*(self._health(rank) for rank in ranks))
            for rank, health in zip(ranks, healths, strict=True):
                self._tell_started(rank, health)

    async def _health(self, handle: ActorHandle) -> Health:
        """What it answers once its constructor is done."""
        health: Health = await handle.call("health", deadline_s=self._config.runtime.start_deadline_s)
        return health

    def _tell_started(self, handle: ActorHandle, health: Health) -> None:
        detail = {"pid": health.pid}
        self._emit(Event.now(EventKind.ACTOR_STARTED, handle.name, **detail))

    async def ask(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call the learner; it may take as long as a step.

        Raises:
            LearnerLostError: it died, or did not answer in time.
        """
        with learner_lost():
            deadline_s = self._config.runtime.step_deadline_s
            return await self.handle.call(method, *args, deadline_s=deadline_s, **kwargs)

    async def drain(self) -> ActorReport:
        """Events and spans since the last call; nothing where the learner is gone, which the supervisor tells of."""
        return await drained(self.handle)

    async def dismiss(self) -> None:
        """End all ranks for good."""
        if self._learner is not None:
            self.supervisor.forget(self._learner.name)
        await asyncio.gather(*(self._runtime.end(handle) for handle in ranks_of(self._learner)))
        self._learner = None

    async def lost(self, watched: Watched, reason: str) -> NoReturn:
        """The learner is gone, and only a checkpoint brings it back.

        Raises:
            LearnerLostError: always; it is told once, by the pipeline, as a call may have met the loss first.
        """
        self.supervisor.forget(watched.handle.name)
        raise LearnerLostError(reason)

    async def reborn(self, watched: Watched, health: Health) -> NoReturn:
        """It died and came back between two probes, without what it had learnt.

        Raises:
            LearnerLostError: always.
        """
        del health
        raise LearnerLostError(f"{watched.handle.name} answers from another process than before")
