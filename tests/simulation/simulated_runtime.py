"""Actors in one process that die, hang, and are called over a network that loses, delays and repeats.

    SimulatedHandle.call -- delay, fate --> SimulatedProcess: a plain actor and its tasks --> answer, late or never

The queue and its kind come back under their own handle, from what lies on the disk; rollout workers do not.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable
from typing import Any

from simulation.faults import Fate, Faults
from simulation.simulated_disk import KilledError
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.errors import ActorLostError, DeadlineError, TrlRayError
from trl_ray.runtime.runtime import ActorHandle, Role

_REBIRTH_S = 1.5
_ZOMBIE_S = 40.0
"""How much later a repeated request may arrive."""


class SimulatedProcess:
    """One actor, the tasks that run in it, and whether it lives."""

    def __init__(self, name: str, role: Role, make: Callable[[SimulatedProcess], Any], *, reborn: bool) -> None:
        self.name, self.role, self.reborn = name, role, reborn
        self._make = make
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in order, so that a seed is a history
        self.awake = asyncio.Event()
        self.awake.set()
        self.instance: Any = None
        self.ended = False
        self.problem: str | None = None
        self.start()

    def start(self) -> None:
        """Construct it; what its constructor raises is kept, and the process stays dead."""
        self.awake.set()
        if self.ended:
            return
        try:
            self.instance = self._make(self)
        except KilledError:
            asyncio.get_running_loop().call_later(_REBIRTH_S, self.start)
        except TrlRayError as error:
            self.problem = str(error)
            raise

    @property
    def alive(self) -> bool:
        return self.instance is not None

    async def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method in the process, which may die in it."""
        await self.awake.wait()
        if self.instance is None:
            raise ActorLostError(f"{self.name} is dead")
        try:
            answer = getattr(self.instance, method)(*args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer
        except KilledError:
            self.kill()
            raise ActorLostError(f"{self.name} died in {method}") from None

    def begin(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Task[Any]:
        """As a task that dies with the process."""
        task = asyncio.create_task(self.run(method, args, kwargs))
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled():
            task.exception()  # whoever called has heard of it, or is gone

    def hang(self, seconds: float) -> None:
        """Answer nothing for a while."""
        self.awake.clear()
        asyncio.get_running_loop().call_later(seconds, self.awake.set)

    def kill(self) -> None:
        """As SIGKILL does: nothing is closed in order, no task runs on."""
        instance, self.instance = self.instance, None
        self.awake.set()
        current = asyncio.current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()
        if isinstance(instance, RolloutQueue):
            _drop_files(instance)
        for task in getattr(instance, "_tasks", ()):
            task.cancel()
        if instance is not None and self.reborn and not self.ended:
            asyncio.get_running_loop().call_later(_REBIRTH_S, self.start)

    def end(self) -> None:
        """For good."""
        self.ended = True
        self.kill()


def _drop_files(queue: RolloutQueue) -> None:
    """The system closes a dead process's files; nothing else of it happens."""
    store = queue._store
    if queue._compacting is not None:
        queue._compacting.cancel()
    files = [store.journal._file, store.journal._lock, *store._payloads._open.values()]
    if store._compaction is not None and store._compaction._rewrite._file >= 0:
        files.append(store._compaction._rewrite._file)
        store._compaction._rewrite._file = -1
    if store.journal._open:
        store.journal._open = False
        for file in files:
            os.close(file)
    store._payloads._open.clear()
    store._compaction = None
    queue._closed = True


class SimulatedHandle:
    """The face of a process across the network; see `trl_ray.runtime.runtime.ActorHandle`."""

    def __init__(self, process: SimulatedProcess, faults: Faults, heard: Callable[..., None]) -> None:
        self.process, self._faults, self._heard = process, faults, heard

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def role(self) -> Role:
        return self.process.role

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        loop, rng = asyncio.get_running_loop(), self._faults.rng
        end = loop.time() + deadline_s
        fate = self._faults.fate(self.role.value, method)
        await asyncio.sleep(0.001 + 0.02 * rng.random())
        if fate is Fate.LOST_REQUEST:
            await asyncio.sleep(rng.choice([0.0, deadline_s]))
            raise rng.choice([ActorLostError, DeadlineError])(f"{self.name}.{method} was lost on its way")
        if fate is Fate.LATE_REQUEST:
            loop.call_later(2 * deadline_s * rng.random(), self._again, method, args, kwargs)
            await asyncio.sleep(deadline_s)
            raise DeadlineError(f"{self.name}.{method} is still on its way")
        if not self.process.alive:
            await asyncio.sleep(0.3)
            raise ActorLostError(f"{self.name} is dead")
        task = self.process.begin(method, args, kwargs)
        if fate is Fate.REPEATED_REQUEST:
            loop.call_later(_ZOMBIE_S * rng.random(), self._again, method, args, kwargs)
        await asyncio.wait([task], timeout=end - loop.time())
        if not task.done():
            raise DeadlineError(f"{self.name}.{method} must answer within {deadline_s:g} s, but did not.")
        if task.cancelled():
            raise ActorLostError(f"{self.name} died during {method}")
        answer = task.result()
        if fate is Fate.LOST_REPLY:
            raise ActorLostError(f"the answer of {self.name}.{method} was lost")
        if fate is Fate.LATE_REPLY:
            await asyncio.sleep(max(0.0, end - loop.time()))
            raise DeadlineError(f"the answer of {self.name}.{method} came too late")
        self._heard(self, method, kwargs, answer)
        return answer

    def _again(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A stray long-poll or a restore of an earlier learner cannot outlive its caller's connection.
        if self.process.alive and method not in ("lease", "take_stored", "wait_for_slots", "restore"):
            self.process.begin(method, args, kwargs)

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        return await self.call(method, *args, deadline_s=deadline_s, **kwargs)


class HandleOf:
    """A handle as another actor holds it: whoever hangs neither asks nor hears."""

    def __init__(self, owner: SimulatedProcess, handle: ActorHandle) -> None:
        self._owner, self._handle = owner, handle

    @property
    def name(self) -> str:
        return self._handle.name

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        await self._owner.awake.wait()
        try:
            return await self._handle.call(method, *args, deadline_s=deadline_s, **kwargs)
        finally:
            await self._owner.awake.wait()


class SimulatedRuntime:
    """Makes processes; see `trl_ray.runtime.runtime.Runtime`.

    Args:
        faults: of calls.
        make: the actor of a role and name, given its constructor's arguments.
        heard: is told of every call that was answered.
    """

    def __init__(self, faults: Faults, make: Callable[..., Any], heard: Callable[..., None]) -> None:
        self._faults, self._make, self._heard = faults, make, heard
        self.processes: list[SimulatedProcess] = []

    async def spawn(
        self, role: Role, name: str, cls: type, /, *, slot: int = 0, plan: str | None = None, **kwargs: Any
    ) -> ActorHandle:
        await asyncio.sleep(0.5)

        def make(process: SimulatedProcess) -> Any:
            own = {name: HandleOf(process, each) for name, each in kwargs.items() if isinstance(each, SimulatedHandle)}
            return self._make(role, name, cls, **kwargs | own)

        process = SimulatedProcess(name, role, make, reborn=self.survives(role))
        self.processes.append(process)
        return SimulatedHandle(process, self._faults, self._heard)

    async def kill(self, handle: ActorHandle) -> None:
        assert isinstance(handle, SimulatedHandle)
        handle.process.kill()

    async def end(self, handle: ActorHandle) -> None:
        assert isinstance(handle, SimulatedHandle)
        handle.process.end()
        if handle.process in self.processes:
            self.processes.remove(handle.process)

    async def has_room(self, role: Role, *, slot: int = 0) -> bool:
        """Now and then the nodes that are left have none."""
        return not self._faults.happens(self._faults.plan.no_room, "no room")

    async def renew(self) -> None:
        """Nothing was reserved."""

    async def watch(self, say: Callable[[str], None]) -> None:
        """The driver's death is decided elsewhere."""
        del say
        await asyncio.Event().wait()

    def survives(self, role: Role) -> bool:
        return role is Role.QUEUE

    def of(self, role: Role) -> list[SimulatedProcess]:
        """The processes of a role that live."""
        return [process for process in self.processes if process.role is role and process.alive]

    async def close(self) -> None:
        while self.processes:
            self.processes.pop().end()
