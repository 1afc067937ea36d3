"""What pipelines ask of the place where actors live, whether that is Ray or this process.

pipeline -- spawn(role, name, cls, **kwargs) --> Runtime --> ActorHandle
pipeline -- await handle.call("method", ..., deadline_s=...) --> answer, DeadlineError or ActorLostError
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

from trl_ray.types import Handle


class Role(enum.StrEnum):
    """What an actor does; decides its resources, restarts and concurrency (see `runtime.remote`)."""

    LEARNER = "learner"
    QUEUE = "queue"
    ROLLOUT = "rollout"
    REWARD = "reward"
    REWARD_MODEL = "reward_model"
    TEACHER = "teacher"


def reward_model_plan(label: str) -> str:
    """The key of a reward model's plan."""
    return f"{Role.REWARD_MODEL.value} {label}"


def teacher_plan(name: str) -> str:
    """The key of a teacher's plan."""
    return f"{Role.TEACHER.value} {name}"


class ActorHandle(Handle, Protocol):
    """A handle as its owner holds it: it can also share large answers and end the actor."""

    @property
    def role(self) -> Role:
        """What the actor does."""
        ...

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Like `call`, but leaves the answer where it was made.

        Returns:
            A token that stands for the answer as an argument of another actor's `call`.
        """
        ...


class Runtime(Protocol):
    """Makes, restarts and ends actors."""

    async def spawn(
        self, role: Role, name: str, cls: type, /, *, slot: int = 0, plan: str | None = None, **kwargs: Any
    ) -> ActorHandle:
        """Start an actor and return at once; its first call waits for its constructor.

        Args:
            role: decides resources, restarts and concurrency.
            name: as events and errors give it.
            cls: a plain class; `kwargs` go to its constructor.
            slot: which of the places reserved for this role or plan.
            plan: key of the plan to follow where a role has several; None: the role's only one.
        """
        ...

    async def kill(self, handle: ActorHandle) -> None:
        """Kill an actor's process. Roles that the runtime restarts by itself come back under the same handle."""
        ...

    async def end(self, handle: ActorHandle) -> None:
        """End an actor for good, whatever its role."""
        ...

    async def has_room(self, role: Role, *, slot: int = 0) -> bool:
        """Whether the place reserved for an actor is on a node that lives; one that is started without it waits."""
        ...

    async def renew(self) -> None:
        """Where nodes were lost, reserve places on those that are left; every actor was ended before.

        Raises:
            RunError: there is no room, not even with fewer rollout workers.
        """
        ...

    def survives(self, role: Role) -> bool:
        """Whether an actor of this role comes back under its own handle after it died."""
        ...

    async def watch(self, say: Callable[[str], None]) -> None:
        """Until cancelled, telling of what is missed for a moment.

        Raises:
            ClusterLostError: the place itself is gone.
        """
        ...

    async def close(self) -> None:
        """End every actor, and Ray if this runtime started it. May be called twice."""
        ...
