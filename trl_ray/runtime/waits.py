"""The one way to wait: who waits, for whom, how long at most, and what is told of a wait that lasts.

owner -- answer(work, on="rollout-1.pull", deadline_s=600) --> its answer, or DeadlineError
                  lasts 30 s, 60 s, 120 s, ... --> Listener --> Event WAITING {on, seconds, deadline_s}

The owner is the task that waits, by its name. A wait ends with its task: what it waits for is cancelled along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from trl_ray.errors import DeadlineError
from trl_ray.types import Event, EventKind

T = TypeVar("T")
QUIET_S = 30.0
"""A wait that takes no longer is not told of."""


class Listener:
    """Takes what is told of waits, and remembers how long each kind usually takes: that is not told again.

    Args:
        emit: takes events.
        quiet_s: seconds before the first event; each further one comes after twice as long.
    """

    def __init__(self, emit: Callable[[Event], None], *, quiet_s: float = QUIET_S) -> None:
        self._emit, self._quiet_s = emit, quiet_s
        self._usual: dict[str, float] = {}

    def quiet_s(self, on: str) -> float:
        """Seconds before a wait of this kind is told of."""
        return max(self._quiet_s, 2 * self._usual.get(on, 0.0))

    def took(self, on: str, seconds: float) -> None:
        """A wait has had its answer."""
        if seconds > self._quiet_s:
            self._usual[on] = max(seconds, self._usual.get(on, 0.0))

    def tell(self, owner: str, on: str, seconds: float, deadline_s: float | None) -> None:
        """A wait lasts."""
        detail = {"owner": owner, "on": on, "seconds": round(seconds, 1), "deadline_s": deadline_s}
        self._emit(Event.now(EventKind.WAITING, "driver", **detail))


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(emit: Callable[[Event], None]) -> Iterator[None]:
    """Tell of all waits below, those of tasks that are begun there included."""
    token = _LISTENER.set(Listener(emit))
    try:
        yield
    finally:
        _LISTENER.reset(token)


async def answer(work: Awaitable[T], *, on: str, deadline_s: float) -> T:
    """What is waited for.

    Args:
        work: a coroutine, or a future, which is looked at once more when the deadline has passed: its answer may have
            come while the loop was held.
        on: who is waited for, as events and errors give it.
        deadline_s: seconds it may take.

    Raises:
        DeadlineError: it took longer; `work` is cancelled.
    """
    with told(on, deadline_s):
        if isinstance(work, asyncio.Future):
            return await _future(work, on, deadline_s)
        # asyncio.wait_for would swallow a cancellation that arrives together with the answer.
        try:
            async with asyncio.timeout(deadline_s) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
        raise _missed(on, deadline_s)


async def _future(work: asyncio.Future[T], on: str, deadline_s: float) -> T:
    try:
        await asyncio.wait([work], timeout=deadline_s)
        if work.done():
            return work.result()
    finally:
        work.cancel()
    raise _missed(on, deadline_s)


def _missed(on: str, deadline_s: float) -> DeadlineError:
    return DeadlineError(f"{on} must answer within {deadline_s:g} s, but did not.")


async def first(
    tasks: Collection[asyncio.Future[Any]],
    *,
    on: str,
    deadline_s: float | None = None,
    return_when: str = asyncio.FIRST_COMPLETED,
) -> tuple[set[asyncio.Future[Any]], set[asyncio.Future[Any]]]:
    """Those that are done and those that are not, once `return_when` holds or the deadline has passed.

    Nothing is cancelled; None waits for as long as it takes, which is for those who watch over others.
    """
    if not tasks:
        return set(), set()
    with told(on, deadline_s, tells=deadline_s is not None):
        return await asyncio.wait(tasks, timeout=deadline_s, return_when=return_when)


async def pause(seconds: float) -> None:
    """A breath between two looks at the same thing."""
    await asyncio.sleep(seconds)


async def until(
    look: Callable[[], Awaitable[bool]],
    *,
    on: str,
    every_s: float,
    deadline_s: float | None = None,
    told_at_once: bool = False,
) -> None:
    """Look again and again until it holds.

    Args:
        look: whether it holds.
        on: what is waited for.
        every_s: seconds between looks.
        deadline_s: for all of them; None: for as long as it takes.
        told_at_once: tell of the wait at its beginning too.

    Raises:
        DeadlineError: it never held.
    """
    if await look():
        return
    loop = asyncio.get_running_loop()
    begin = loop.time()
    with told(on, deadline_s, at_once=told_at_once):
        while not await look():
            if deadline_s is not None and loop.time() - begin >= deadline_s:
                raise _missed(on, deadline_s)
            await asyncio.sleep(every_s)


@contextmanager
def told(on: str, deadline_s: float | None = None, *, tells: bool = True, at_once: bool = False) -> Iterator[None]:
    """Tell the listener of the waits inside when together they last."""
    listener = _LISTENER.get()
    if listener is None or not tells:
        yield
        return
    loop, owner = asyncio.get_running_loop(), _owner()
    begin, timers = loop.time(), list[asyncio.TimerHandle]()

    def tell(next_s: float) -> None:
        listener.tell(owner, on, loop.time() - begin, deadline_s)
        timers[:] = [loop.call_later(next_s, tell, 2 * next_s)]

    quiet_s = listener.quiet_s(on)
    timers.append(loop.call_later(quiet_s, tell, quiet_s))
    if at_once:
        listener.tell(owner, on, 0.0, deadline_s)
    try:
        yield
        listener.took(on, loop.time() - begin)
    finally:
        timers[0].cancel()


def _owner() -> str:
    """The name of the task that waits; `driver` where nobody gave it one."""
    task = asyncio.current_task()
    name = "driver" if task is None else task.get_name()
    return "driver" if name.startswith("Task-") else name
