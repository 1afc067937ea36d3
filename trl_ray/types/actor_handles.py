"""How actors are reached, and what they answer to a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What an actor answers to a probe, from a thread of its own so that busy work cannot delay it."""

    pid: int
    progress: int
    """Counts up whenever the actor gets something done."""
    busy_since: float | None
    """When the work at hand began (seconds since the epoch); None while idle."""
    version: int | None = None
    """Weight version, for actors that hold weights."""
    checksum: str | None = None
    problem: str | None = None
    """Set when the actor itself knows that it must be replaced."""


@runtime_checkable
class Handle(Protocol):
    """One face for an actor in this process and for an actor across the cluster: await a method."""

    @property
    def name(self) -> str:
        """The actor's name, as events and errors give it."""
        ...

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a method and wait for its answer.

        Raises:
            DeadlineError: no answer within `deadline_s` seconds; names actor and method.
            ActorLostError: the actor died; whether the call took effect is unknown.
        """
        ...
