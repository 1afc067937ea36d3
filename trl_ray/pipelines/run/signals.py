"""Runs a pipeline's coroutine to its end, and turns Ctrl-C and SIGTERM into an orderly stop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function that heeds a stop event; in a notebook, whose loop already runs, in a thread of its own.

    Raises:
        CancelledError: a second signal came before the coroutine had heeded the first.
    """

    async def guarded() -> T:
        stop, task = asyncio.Event(), asyncio.current_task()
        assert task is not None
        with _signals(stop, task):
            return await main(stop)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(guarded())
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="trl_ray") as executor:
        return executor.submit(asyncio.run, guarded()).result()


async def heed_signals() -> None:
    """Let a signal set the stop event now, if it came while the caller held the loop.

    A learner in this process holds it for whole steps.
    """
    for _ in range(3):  # it is noticed, read, handled: a turn of the loop each
        await asyncio.sleep(0)


@contextmanager
def _signals(stop: asyncio.Event, task: asyncio.Task[Any]) -> Iterator[None]:
    """First signal: finish the step, write a checkpoint, end. Second: end at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
