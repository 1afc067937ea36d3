"""Watches actors: probes each one, and says which are lost and why.

Supervisor -- health (deadline) --> actor
           <-- Health: pid, progress, problem
           -- on_lost(watched, reason) --> pipeline: kill, reissue leases, start anew, refit
whoever meets a loss -- report(name, reason) --> Supervisor: the same, in a task of its own
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.runtime import waits
from trl_ray.runtime.runtime import ActorHandle
from trl_ray.types import Health

T = TypeVar("T")


@dataclass(slots=True, kw_only=True, eq=False)
class Watched:
    """One actor under watch; mutable, and owned by the supervisor."""

    handle: ActorHandle
    slot: int
    health: Health | None = None
    loss: asyncio.Event = field(default_factory=asyncio.Event)
    """Set as soon as the actor counts as lost."""
    reason: str = ""
    """Why it is lost."""
    is_silent: bool = False
    """It is lost because it has answered nothing for too long; it may be alive, and hang."""


OnLost = Callable[[Watched, str], Awaitable[None]]
OnReborn = Callable[[Watched, Health], Awaitable[None]]


class Supervisor:
    """Probes every watched actor, each in a task of its own, so that one slow recovery hides no other loss.

    Protocol in use::

        supervisor = Supervisor(interval_s=1, deadline_s=15, on_lost=replace, on_reborn=record)
        supervisor.watch(handle, slot=0)
        await supervisor.run()          # until cancelled; an error of a callback ends it

    An actor is lost when it died, when it has answered nothing for `deadline_s` (a stopped process answers nothing,
    ever), when it says itself that it must be replaced, or when somebody who met its loss reports it. `on_lost` is told
    once. `on_reborn` is told when an actor that its runtime restarts by itself answers from another process than
    before.
    """

    def __init__(self, *, interval_s: float, deadline_s: float, on_lost: OnLost, on_reborn: OnReborn) -> None:
        self._interval_s, self._deadline_s = interval_s, deadline_s
        self._on_lost, self._on_reborn = on_lost, on_reborn
        self._watched: dict[str, Watched] = {}
        self._beside: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = []
        self._changed = asyncio.Event()

    @property
    def watched(self) -> tuple[Watched, ...]:
        """The actors under watch."""
        return tuple(self._watched.values())

    def watch(self, handle: ActorHandle, *, slot: int = 0, health: Health | None = None) -> None:
        """Begin to probe an actor that has answered its first call."""
        self._watched[handle.name] = Watched(handle=handle, slot=slot, health=health)
        self._changed.set()

    def forget(self, name: str) -> None:
        """Stop probing an actor."""
        self._watched.pop(name, None)

    def report(self, name: str, reason: str) -> None:
        """Somebody met the loss of an actor before a probe did: go on as if a probe had, and return at once."""
        watched = self._watched.get(name)
        if watched is not None and not watched.loss.is_set():
            self._mark(watched, reason)
            self.also(f"replace {name}", partial(self._tell_lost, watched, reason))

    def also(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have something done beside the probes, for as long as they go on; its error ends them."""
        self._beside.append((name, work))
        self._changed.set()

    async def while_alive(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """What a watched actor answers; its loss, however it was noticed, ends the wait at once.

        Raises:
            ActorLostError: it counts as lost.
        """
        watched = self._watched.get(name)
        if watched is None:
            return await work
        answer, loss = asyncio.create_task(work), asyncio.create_task(watched.loss.wait())
        if (task := asyncio.current_task()) is not None:
            answer.set_name(task.get_name())
        try:
            await waits.first([answer, loss], on=name)
            if answer.done():
                return answer.result()
            raise ActorLostError(watched.reason)
        finally:
            for each in (answer, loss):
                each.cancel()
            await asyncio.gather(answer, loss, return_exceptions=True)

    async def run(self) -> None:
        """Probe for ever.

        consumes: answers to `health`, reports. produces: calls of `on_lost` and `on_reborn`.
        waits for: a loss that is dealt with, a new actor. unblocked by: cancellation, or an error of a callback.
        """
        tasks: dict[Watched, asyncio.Task[None]] = {}
        beside: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._changed.clear()
                for watched in self.watched:
                    if watched not in tasks:
                        name = f"probe {watched.handle.name}"
                        tasks[watched] = asyncio.create_task(self._keep_probing(watched), name=name)
                while self._beside:
                    name, work = self._beside.pop(0)
                    beside.add(asyncio.create_task(work(), name=name))
                changed = asyncio.ensure_future(self._changed.wait())
                try:
                    done, _ = await waits.first([*tasks.values(), *beside, changed], on="a loss")
                finally:
                    changed.cancel()
                for task in done - {changed}:
                    task.result()
                tasks = {watched: task for watched, task in tasks.items() if task not in done}
                beside -= done
        finally:
            left = [*tasks.values(), *beside]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _keep_probing(self, watched: Watched) -> None:
        """Until it is lost or forgotten. Silence is counted from its last answer, whenever a probe was sent."""
        loop = asyncio.get_running_loop()
        answered = loop.time()
        while self._is_current(watched):
            # At least half: a loop that was held for a while, with whatever arrived, is no silence of the actor's.
            left_s = max(self._deadline_s - (loop.time() - answered), self._deadline_s / 2)
            try:
                health: Health = await watched.handle.call("health", deadline_s=round(left_s, 2))
            except (ActorLostError, DeadlineError) as error:
                watched.is_silent = isinstance(error, DeadlineError)
                await self._lose(watched, str(error))
                return
            answered = loop.time()
            if not self._is_current(watched):
                return
            before, watched.health = watched.health, health
            if health.problem is not None:
                await self._lose(watched, health.problem)
                return
            if before is not None and before.pid != health.pid:
                await self._on_reborn(watched, health)
            await waits.pause(self._interval_s)

    def _is_current(self, watched: Watched) -> bool:
        """Whether it is neither forgotten, nor replaced, nor reported as lost."""
        return self._watched.get(watched.handle.name) is watched and not watched.loss.is_set()

    async def _lose(self, watched: Watched, reason: str) -> None:
        # It may have been forgotten, replaced or reported while the probe was under way.
        if self._is_current(watched):
            self._mark(watched, reason)
            await self._tell_lost(watched, reason)

    def _mark(self, watched: Watched, reason: str) -> None:
        watched.reason = reason
        watched.loss.set()

    async def _tell_lost(self, watched: Watched, reason: str) -> None:
        await self._on_lost(watched, reason)
        if self._watched.get(watched.handle.name) is watched:
            self.forget(watched.handle.name)
