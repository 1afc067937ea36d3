"""Brings lost actors back: rollout workers by others in their places, the rest by Ray, all within their restarts.

lost worker --> its leases to others --> room on a node? --> restart left? --> start, pull, work   (others work on)
lost queue, reward worker, teacher --> killed if it hangs --> Ray restarts it --> it answers
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable

from trl_ray.actors.calling import Patience, call_patiently
from trl_ray.config.sections import RuntimeConfig
from trl_ray.errors import ActorLostError, DeadlineError, EngineError, LearnerLostError, ResourceError, RunError
from trl_ray.pipelines.rollouts.weight_pulls import WeightPulls
from trl_ray.pipelines.run.learner_actors import Emit
from trl_ray.runtime import waits
from trl_ray.runtime.restart_budget import STEPS_PER_RESTART, RestartBudget
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime
from trl_ray.runtime.supervision import Watched
from trl_ray.types import Event, EventKind, Health

_PAUSE_S = 0.25
_ROOM_S = 0.5
"""Between two looks for room, or for a restart that was given back."""


class LostActors:
    """Replaces what was lost.

    Args:
        runtime: where actors live.
        config: says how often and how long.
        pulls: gives fresh workers their weights.
        emit: takes events.
        spawn: starts a rollout worker of a name in a place.
        lose_leases: has the ledger give what a worker of a name holds to others.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        config: RuntimeConfig,
        pulls: WeightPulls,
        emit: Emit,
        spawn: Callable[[str, int], Awaitable[ActorHandle]],
        lose_leases: Callable[[str], Awaitable[None]],
    ) -> None:
        self._runtime, self._config, self._pulls, self._emit = runtime, config, pulls, emit
        self._spawn, self._lose_leases = spawn, lose_leases
        self._budgets: dict[str, RestartBudget] = {}
        self._begun: Counter[int] = Counter()
        self._empty: set[int] = set()
        """Places that wait for room, or for a restart; in all others a worker works, comes up, or is being ended."""
        self.workers: set[ActorHandle] = set()
        """All rollout workers that were started and not ended."""
        self.steps = 0
        """Finished optimizer steps."""

    async def first_worker(self, slot: int) -> ActorHandle:
        """Start the first worker of a place; it has yet to load its model."""
        return await self._next_worker(slot)

    async def _next_worker(self, slot: int) -> ActorHandle:
        # None gets the name of another: the ledger knows workers by name.
        begun = self._begun[slot]
        handle = await self._spawn(f"rollout-{slot}+{begun}" if begun else f"rollout-{slot}", slot)
        self.workers.add(handle)
        self._begun[slot] += 1
        return handle

    def budget(self, name: str) -> RestartBudget:
        """The restarts of whoever stands in the place of an actor."""
        fresh = RestartBudget(allowed=self._config.max_restarts)
        return self._budgets.setdefault(name.partition("+")[0], fresh)

    def count_restart(self, watched: Watched, reason: str) -> None:
        """Raises RunError where the actor was lost more often than it may be."""
        if self.budget(watched.handle.name).take(self.steps) is None:
            raise self._lost_too_often(watched.handle.name, reason)

    def _lost_too_often(self, name: str, reason: str) -> RunError:
        return RunError(
            f"{name} may be restarted {self._config.max_restarts} times (runtime.max_restarts), and "
            f"{STEPS_PER_RESTART} finished steps give one back, but it was lost again: {reason}"
        )

    async def start_worker(self, slot: int, reason: str) -> tuple[Health, ActorHandle]:
        """Start a rollout worker in a place that has none, again if it is lost before it works; others work meanwhile.

        Args:
            slot: the place.
            reason: why the last one was lost.

        Raises:
            RunError: the worker was lost more often than it may be, and no other one works.
            InputError: the first worker of the place cannot start with these options, or this memory.
        """
        base = f"rollout-{slot}"
        again: tuple[type[Exception], ...] = (EngineError, ActorLostError, DeadlineError)
        if self._begun[slot]:
            # One has worked here, so there is memory enough: what it held of the GPU may be free a little later.
            again = (*again, ResourceError)
        while True:
            self._empty.add(slot)
            try:
                await self._room_for(base, slot)
                pause_s = await self._allow_restart(base, reason) if self._begun[slot] else 0.0
            finally:
                self._empty.discard(slot)
            await waits.pause(pause_s)
            handle = await self._next_worker(slot)
            try:
                return await self._bring_up(handle), handle
            except LearnerLostError:
                raise
            except again as error:
                reason = str(error)
                self._emit(Event.now(EventKind.ACTOR_LOST, handle.name, reason=reason))
                await self.discard(handle)

    async def _bring_up(self, handle: ActorHandle) -> Health:
        """Have a fresh worker load its model, pull, and work."""
        health: Health = await handle.call("health", deadline_s=self._config.start_deadline_s)
        await self._pulls.refit(handle)
        return health

    async def _room_for(self, name: str, slot: int) -> None:
        """Wait for a node that has room for a worker; tells so at once, as the run goes on with fewer."""

        async def look() -> bool:
            return await self._runtime.has_room(Role.ROLLOUT, slot=slot)

        await waits.until(look, on=f"a node with room for {name}", every_s=_ROOM_S, told_at_once=True)

    async def _allow_restart(self, name: str, reason: str) -> float:
        """Wait until there is a restart, for as long as others can work, whose steps give one back.

        Returns:
            Seconds to wait before it, the longer the more there were.

        Raises:
            RunError: the worker was lost more often than it may be, and so was every other one.
        """
        budget, waits_s = self.budget(name), list[float]()

        async def look() -> bool:
            if (wait_s := budget.take(self.steps)) is not None:
                waits_s.append(wait_s)
            elif all(map(self._is_lost_too_often, self._begun.keys() | self._empty)):
                raise self._lost_too_often(name, reason)
            return bool(waits_s)

        on = f"{STEPS_PER_RESTART} finished steps to restart {name}, which was lost too often (runtime.max_restarts)"
        await waits.until(look, on=on, every_s=_ROOM_S, told_at_once=True)
        return waits_s[0]

    def _is_lost_too_often(self, slot: int) -> bool:
        """Whether nobody can work in a place before a restart is given back."""
        may_start = not self._begun[slot] or self.budget(f"rollout-{slot}").has_one(self.steps)
        return slot in self._empty and not may_start

    async def discard(self, handle: ActorHandle) -> None:
        """Give a worker's leases to others, at once, and end it for good.

        Should it still work, the ledger refuses what it brings.
        """
        self._pulls.working.pop(handle.name, None)
        await self._lose_leases(handle.name)
        await self._runtime.end(handle)
        self.workers.discard(handle)

    async def await_rebirth(self, watched: Watched, reason: str) -> tuple[Health, ActorHandle]:
        """Wait until Ray has brought an actor back; one that hangs, or asks to be replaced, is killed first.

        One that turns out to have been slow, and no more, costs no restart.
        """
        handle = watched.handle
        if not self._runtime.survives(handle.role):
            raise RunError(f"{handle.name} died and cannot come back in this runtime.")
        found = await self._found_sound(watched)
        if found is not None and watched.health is not None and found.pid == watched.health.pid:
            return found, handle
        self.count_restart(watched, reason)
        if found is not None:
            return found, handle
        patience = Patience(deadline_s=self._config.health_deadline_s, total_s=self._config.start_deadline_s)
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
        handle, deadline_s = watched.handle, self._config.health_deadline_s
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
