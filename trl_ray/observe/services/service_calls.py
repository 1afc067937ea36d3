"""Calls a tracking service in a thread of its own, so that one that does not answer costs a run seconds, not minutes.

sink -- call(work) --> the service's one thread --> answer | after _SAY_S a line that says who is waited for
                                                          | after within_s TimeoutError, and the thread is left
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
WITHIN_S = 20.0
_SAY_S = 5.0
_LOG = logging.getLogger(__name__)


class ServiceCalls:
    """The calls of one service, each after the other in one thread: some libraries keep a run for each thread.

    Args:
        service: its name, for the line.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._work: SimpleQueue[Callable[[], None]] | None = None
        self._is_silent = False

    def call(self, work: Callable[[], T], *, within_s: float = WITHIN_S) -> T:
        """The answer of a call.

        Raises:
            TimeoutError: there was none in time, to this call or an earlier one.
        """
        if self._is_silent:
            raise TimeoutError(f"{self._service} does not answer")
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:  # handed to the caller, whatever it is
                answer.set_exception(error)

        self._put(run)
        done = threading.Event()
        answer.add_done_callback(lambda _: done.set())
        if not done.wait(min(_SAY_S, within_s)) and within_s > _SAY_S:
            _LOG.warning("%s has not answered for %g s; it is waited for %g s at most", self._service, _SAY_S, within_s)
            done.wait(within_s - _SAY_S)
        if not answer.done():
            self._is_silent = True
            raise TimeoutError(f"{self._service} has not answered for {within_s:g} s")
        return answer.result()

    def _put(self, work: Callable[[], None]) -> None:
        if self._work is None:
            self._work = SimpleQueue()
            threading.Thread(target=_serve, args=(self._work,), name=self._service, daemon=True).start()
        self._work.put(work)


def _serve(queue: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        queue.get()()
