"""Calls that outlast a restart of the actor they go to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from trl_ray.errors import ActorLostError, DeadlineError, RunError
from trl_ray.types import Handle

_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a caller waits."""

    deadline_s: float
    """Seconds for one try."""
    total_s: float
    """Seconds over all tries."""
    outlasts: tuple[type[RunError], ...] = (ActorLostError, DeadlineError)
    """What it tries again after."""


async def call_patiently(handle: Handle, method: str, patience: Patience, /, **kwargs: Any) -> Any:
    """Call an idempotent method, again and again while its actor is being restarted.

    Args:
        handle: the actor.
        method: must give the same answer when it is called twice: an answer may have been lost.
        patience: for one try and for all.

    Raises:
        ActorLostError, DeadlineError: of the last try, when patience has run out.
    """
    again = AsyncRetrying(
        retry=retry_if_exception_type(patience.outlasts),
        stop=stop_after_delay(patience.total_s),
        wait=wait_fixed(_PAUSE_S),
        sleep=asyncio.sleep,
        reraise=True,
    )
    return await again(handle.call, method, deadline_s=patience.deadline_s, **kwargs)
