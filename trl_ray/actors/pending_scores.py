"""Scores that take longer than a call: callers come back for them, and waiting in a healthy queue is no failure.

    ask_for_scores ─ score(key, wait_s) ─► PendingScores: a task per key ─► ScoredGroup, or None: not yet, ask again
                          ▲───────────────────────────────────────────────────────────────────┘

A key that nobody has asked for in a while is forgotten, and its work with it, where that has not begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.actors.calling import Patience, call_patiently
from trl_ray.types import Completion, Handle, Prompt, ScoredGroup

_WAIT_S = 10.0
"""One question; well below the patience of whoever asks."""
_FORGOTTEN_AFTER_S = 60.0


@dataclass(slots=True, eq=False)
class _Pending:
    """One group's scores; mutable, of the event loop."""

    task: asyncio.Task[ScoredGroup]
    callers: int = 0
    left: float = 0.0
    """When the last caller went, monotonic seconds."""


class PendingScores:
    """The scores that one actor is asked for, by key."""

    def __init__(self, *, forgotten_after_s: float = _FORGOTTEN_AFTER_S) -> None:
        self._forgotten_after_s = forgotten_after_s
        self._pending: dict[str, _Pending] = {}

    async def get(
        self, key: str, begin: Callable[[], Coroutine[Any, Any, ScoredGroup]], *, wait_s: float
    ) -> ScoredGroup | None:
        """The scores, or None after `wait_s`; only the first question of a key begins the work.

        consumes: nothing; produces: the scores, to everybody who asks; waits for: the work; unblocked by: its end, or
        `wait_s`.
        """
        self._forget()
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _Pending(asyncio.create_task(begin(), name=f"scores {key}"))
        pending.callers += 1
        try:
            # Kept when it is done: the answer may get lost, and is asked for again.
            await asyncio.wait([pending.task], timeout=wait_s)
        finally:
            pending.callers -= 1
            pending.left = time.monotonic()
        return pending.task.result() if pending.task.done() else None

    def _forget(self) -> None:
        now = time.monotonic()
        old = [k for k, p in self._pending.items() if not p.callers and now - p.left > self._forgotten_after_s]
        for key in old:
            self._pending.pop(key).task.cancel()


async def ask_for_scores(
    handle: Handle,
    prompt: Prompt,
    completions: Sequence[Completion],
    *,
    key: str,
    patience: Patience,
    **more: Any,
) -> ScoredGroup:
    """Have an actor score a group, however long others take before it.

    Args:
        handle: an actor whose `score` takes `key` and `wait_s`.
        prompt: of the group.
        completions: of the group.
        key: one for each group and attempt; no other caller may have it.
        patience: for an actor that answers no question at all.
        more: arguments of its `score`.

    Raises:
        ActorLostError, DeadlineError: it does not answer any more.
    """
    given = {"completions": tuple(completions), "key": key, "wait_s": min(_WAIT_S, patience.deadline_s / 2), **more}
    while True:
        scored: ScoredGroup | None = await call_patiently(handle, "score", patience, group_prompt=prompt, **given)
        if scored is not None:
            return scored
