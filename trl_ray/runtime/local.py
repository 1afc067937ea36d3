"""All actors in this process, on one event loop: for a debugger, and for runs that repeat bit for bit."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from trl_ray.errors import ActorLostError
from trl_ray.runtime import waits
from trl_ray.runtime.runtime import ActorHandle, Role


class LocalHandle:
    """A plain object behind the face of an actor.

    Synchronous methods run on the caller's thread, so breakpoints stop where one expects.
    """

    def __init__(self, name: str, role: Role, instance: Any) -> None:
        self._name, self._role, self._instance = name, role, instance

    @property
    def name(self) -> str:
        """The actor's name."""
        return self._name

    @property
    def role(self) -> Role:
        """What the actor does."""
        return self._role

    @property
    def instance(self) -> Any:
        """The object itself.

        Raises:
            ActorLostError: the actor was ended.
        """
        if self._instance is None:
            raise ActorLostError(f"{self._name} must be alive to be called, but was ended.")
        return self._instance

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """A synchronous method cannot be cut short by its deadline."""
        answer = getattr(self.instance, method)(*args, **kwargs)
        if not inspect.isawaitable(answer):
            return answer
        return await waits.answer(answer, on=f"{self._name}.{method}", deadline_s=deadline_s)

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """In one process the answer itself is the token."""
        return await self.call(method, *args, deadline_s=deadline_s, **kwargs)

    def end(self) -> None:
        """Close the object, once."""
        instance, self._instance = self._instance, None
        if instance is not None and hasattr(instance, "close"):
            instance.close()


class LocalRuntime:
    """Makes objects instead of actors."""

    def __init__(self) -> None:
        self._handles: list[LocalHandle] = []

    async def spawn(
        self, role: Role, name: str, cls: type, /, *, slot: int = 0, plan: str | None = None, **kwargs: Any
    ) -> ActorHandle:
        """The constructor runs here, so its errors arrive unchanged."""
        del slot, plan
        handle = LocalHandle(name, role, cls(**kwargs))
        self._handles.append(handle)
        return handle

    async def kill(self, handle: ActorHandle) -> None:
        """End one object; nothing comes back by itself here."""
        await self.end(handle)

    async def end(self, handle: ActorHandle) -> None:
        """End one object."""
        assert isinstance(handle, LocalHandle)
        handle.end()
        if handle in self._handles:
            self._handles.remove(handle)

    async def has_room(self, role: Role, *, slot: int = 0) -> bool:
        """There is always room in a process."""
        del role, slot
        return True

    async def renew(self) -> None:
        """Nothing was reserved."""

    def survives(self, role: Role) -> bool:
        """Nothing comes back by itself here."""
        del role
        return False

    async def watch(self, say: Callable[[str], None]) -> None:
        """This process cannot be lost without its driver."""
        del say
        await asyncio.Event().wait()

    async def close(self) -> None:
        """End all objects, the youngest first."""
        while self._handles:
            self._handles.pop().end()
