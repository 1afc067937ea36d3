"""Watches actors: probes each one, and says which are lost and why.

Supervisor -- health (deadline) --> actor
           <-- Health: pid, progress, problem
           -- on_lost(watched, reason) --> pipeline: kill, reissue leases, start anew, refit
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.runtime.runtime import ActorHandle
from trl_ray.types import Health


@dataclass(slots=True, kw_only=True, eq=False)
class Watched:
    """One actor under watch; mutable, and owned by the supervisor."""

    handle: ActorHandle
    slot: int
    restarts: int = 0
    health: Health | None = None


OnLost = Callable[[Watched, str], Awaitable[None]]
OnReborn = Callable[[Watched, Health], Awaitable[None]]


class Supervisor:
    """Probes every watched actor, each in a task of its own, so that one slow recovery hides no other loss.

    Protocol in use::

        supervisor = Supervisor(interval_s=1, deadline_s=15, on_lost=replace, on_reborn=record)
        supervisor.watch(handle, slot=0)
        await supervisor.run()          # until cancelled; an error of a callback ends it

    An actor is lost when it died, when it does not answer in time (a stopped process answers nothing, ever), or
    when it says itself that it must be replaced. `on_reborn` is told when an actor that its runtime restarts by
    itself answers from another process than before.
    """

    def __init__(self, *, interval_s: float, deadline_s: float, on_lost: OnLost, on_reborn: OnReborn) -> None:
        self._interval_s, self._deadline_s = interval_s, deadline_s
        self._on_lost, self._on_reborn = on_lost, on_reborn
        self._watched: dict[str, Watched] = {}

    @property
    def watched(self) -> tuple[Watched, ...]:
        """The actors under watch."""
        return tuple(self._watched.values())

    def watch(self, handle: ActorHandle, *, slot: int = 0, restarts: int = 0, health: Health | None = None) -> None:
        """Begin to probe an actor that has answered its first call."""
        self._watched[handle.name] = Watched(handle=handle, slot=slot, restarts=restarts, health=health)

    def forget(self, name: str) -> None:
        """Stop probing an actor."""
        self._watched.pop(name, None)

    async def run(self) -> None:
        """Probe for ever.

        consumes: answers to `health`. produces: calls of `on_lost` and `on_reborn`.
        waits for: the interval. unblocked by: cancellation, or an error of a callback.
        """
        probes: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for watched in self.watched:
                    name = watched.handle.name
                    if name not in probes:
                        probes[name] = asyncio.create_task(self._probe(watched), name=f"probe {name}")
                await asyncio.sleep(self._interval_s)
                for name in [name for name, probe in probes.items() if probe.done()]:
                    probes.pop(name).result()
        finally:
            for probe in probes.values():
                probe.cancel()
            await asyncio.gather(*probes.values(), return_exceptions=True)

    async def _probe(self, watched: Watched) -> None:
        try:
            health: Health = await watched.handle.call("health", deadline_s=self._deadline_s)
        except (ActorLostError, DeadlineError) as error:
            # It may have been forgotten or replaced while the probe was under way.
            if self._watched.get(watched.handle.name) is watched:
                await self._on_lost(watched, str(error))
            return
        if self._watched.get(watched.handle.name) is not watched:
            return
        before, watched.health = watched.health, health
        if health.problem is not None:
            await self._on_lost(watched, health.problem)
        elif before is not None and before.pid != health.pid:
            await self._on_reborn(watched, health)
