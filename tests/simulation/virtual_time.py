"""An event loop whose clock jumps: waiting takes no time, and the same seed gives the same order of everything.

    nothing is ready --> the clock jumps to the next timer --> callbacks run --> ...
    threads: what would run on one runs at once, and its result arrives later

`time.time` and `time.monotonic` are the loop's while a simulation runs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_BEGIN = 1_000_000.0


class WedgedError(Exception):
    """Nothing can happen any more."""


class _Selector:
    """Waits by moving the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise WedgedError("every task waits for another one")
        if timeout > 0:
            self._loop.now += timeout
        return []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop on a clock of its own."""

    def __init__(self, seed: int) -> None:
        self.now = _BEGIN
        self.threads = random.Random(seed)
        super().__init__()
        self._selector.close()
        self._selector = _Selector(self)

    def time(self) -> float:
        return self.now

    def _write_to_self(self) -> None:
        """Nobody sleeps that would have to be woken."""

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run it now, and tell of it after a while."""
        done = self.create_future()
        try:
            result, error = func(*args), None
        except Exception as caught:
            result, error = None, caught

        def tell() -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)

        self.call_later(self.threads.choice([0.001, 0.02, 2.0]), tell)
        return done

    def close(self) -> None:
        self._ssock = self._csock = None if self._ssock is None else _close_both(self._ssock, self._csock)
        super().close()

    def _close_self_pipe(self) -> None:
        """Closed before."""


def _close_both(*sockets: Any) -> None:
    for each in sockets:
        each.close()


@contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """The clocks of the process are the loop's."""
    kept = time.time, time.monotonic, time.sleep

    def sleep(seconds: float) -> None:
        loop.now += seconds

    time.time = time.monotonic = loop.time
    time.sleep = sleep
    try:
        yield
    finally:
        time.time, time.monotonic, time.sleep = kept


def run_virtually(work: Callable[[], Coroutine[Any, Any, T]], *, seed: int) -> T:
    """Run to the end on a loop of its own; what is left over is cancelled."""
    loop = VirtualLoop(seed)
    asyncio.set_event_loop(loop)
    try:
        with virtual_time(loop):
            main = loop.create_task(work())
            try:
                return loop.run_until_complete(main)
            finally:
                left = asyncio.all_tasks(loop)
                for task in left:
                    task.cancel()
                if left:
                    loop.run_until_complete(asyncio.wait(left, timeout=60))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
