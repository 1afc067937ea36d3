"""The thread in which Ray is started and stopped, because both block, and the event loop must go on hearing signals.

    event loop -- call(work) --> one thread for the life of the process -- result, or error --> event loop

The kernel ends the processes of a Ray that was started here together with the thread that started them, so this one
never ends by itself. A call that is given up goes on, and is undone once it is through.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_work: SimpleQueue[Callable[[], None]] | None = None
_unfinished = 0
_left_behind = False
_lock = threading.Lock()


async def in_ray_thread(work: Callable[[], T], *, undo: Callable[[T], Any] | None = None) -> T:
    """The result of a call that may block; cancelled, the caller is free at once.

    Args:
        work: is called in the thread, after all that was asked before.
        undo: takes a result that nobody waits for any more.
    """
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # handed to the caller, whatever it is
            answer.set_exception(error)

    def take_back() -> None:
        if undo is not None and answer.exception() is None:
            undo(answer.result())

    _put(run)
    try:
        return await asyncio.wrap_future(answer)
    except asyncio.CancelledError:
        _put(take_back)
        raise


def leave_ray_behind() -> None:
    """Ray is in no state to be asked anything more."""
    global _left_behind
    _left_behind = True


def ray_is_left_behind() -> bool:
    """Whether a call to Ray has not come back, or must not be made: an orderly end of Python would wait for it."""
    return _left_behind or _unfinished > 0


def _put(work: Callable[[], None]) -> None:
    global _unfinished, _work
    with _lock:
        _unfinished += 1
        if _work is None:
            _work = SimpleQueue()
            threading.Thread(target=_serve, args=(_work,), name="ray", daemon=True).start()
        _work.put(work)


def _serve(queue: SimpleQueue[Callable[[], None]]) -> None:
    global _unfinished
    while True:
        work = queue.get()
        work()
        with _lock:
            _unfinished -= 1
