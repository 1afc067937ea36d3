"""Runs a pipeline's coroutine to its end, and turns signals into an orderly stop, within what time they leave.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 --> Stop.set --> what only waits ends; a step and a checkpoint may finish
    SIGTERM, and all in a Ray job             --> Stop.in_haste: until grace - _RESERVE_S, then the run is cancelled
    SIGINT or SIGTERM after one of them       --> cancelled at once

Whoever holds the event loop when the run is to be cancelled (a learner in this process, for whole steps) gets a
KeyboardInterrupt. A process that is the command's own is left when the grace is over, whatever still runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from trl_ray.errors import ActorLostError, ClusterLostError, DeadlineError, InterruptedRun
from trl_ray.pipelines.run.ray_job import grace_s, in_ray_job
from trl_ray.runtime.ray_processes import kill_own_raylets

T = TypeVar("T")

_DEMANDS = (signal.SIGINT, signal.SIGTERM)
_NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send some time before they end a job (Slurm's --signal), and a terminal that closes."""
_RESERVE_S = 1.0
"""Of the grace, for the last event, the report and the end of the actors; at most a third of it."""
_ECHO_S = 0.25
"""Some send a signal to a process and then to its group (timeout, srun): that is one wish."""
_HELD_S = 0.4
"""A loop that does not answer for so long is held by a call."""
_AT_ONCE_S = 3.0
"""For the files of a run that is ended at once to be closed."""
_INTERRUPTED = 130
_LOSSES = (ActorLostError, ClusterLostError, DeadlineError)


class StopRequested(Exception):
    """What was waited for was given up because the run is to end; never leaves the package."""


class Stop(asyncio.Event):
    """The wish that a run end: set by the first signal.

    Args:
        grace: seconds until the process is killed, where a signal leaves so long and no longer.
    """

    def __init__(self, grace: float | None = None) -> None:
        super().__init__()
        self.grace_s = grace_s(None, {}) if grace is None else grace
        self.in_haste = asyncio.Event()
        """Set where there is an end to the time that is left."""
        self.is_requested = False
        """As `is_set`, which a loop that is held learns later."""
        self.cause = ""
        """The signal's name."""
        self.at_once = False
        """The run is cancelled as it stands."""
        self.settled = False
        """It has ended in order."""
        self._kill_at: float | None = None
        self.hold: Callable[[], None] = lambda: None
        """Put the handlers back that another library took away."""

    def request(self, cause: str, *, in_haste: bool) -> None:
        """Take a signal; the caller lets the loop `tell`."""
        self.is_requested, self.cause = True, cause
        if in_haste:
            self._kill_at = time.monotonic() + self.grace_s

    def tell(self) -> None:
        """Wake who waits for the wish."""
        if self._kill_at is not None:
            self.in_haste.set()
        self.set()

    @property
    def left_s(self) -> float | None:
        """Seconds for steps and checkpoints; None: as long as it takes."""
        return None if self._kill_at is None else self.closing_left_s - min(_RESERVE_S, self.grace_s / 3)

    @property
    def closing_left_s(self) -> float:
        """Seconds until the process is killed."""
        return float("inf") if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())

    @contextmanager
    def ends_in_order(self, what_is_left: Callable[[], str]) -> Iterator[None]:
        """Within, a loss of actors after the wish, and the end of the grace, are an interruption.

        Some schedulers signal every process: actors may be gone before the driver has saved anything.

        Raises:
            InterruptedRun: with `what_is_left` to go on from.
        """
        try:
            yield
        except (*_LOSSES, asyncio.CancelledError, KeyboardInterrupt) as error:
            if not self.is_requested or self.at_once:
                raise
            lost = str(error) or "no time was left to end the step"
            raise self.error(f"; {lost}; {what_is_left()}") from None

    def error(self, rest: str) -> InterruptedRun:
        """What ends the run; `rest` says where it was and what is left."""
        return InterruptedRun(f"{self.cause}: interrupted{rest}" if self.cause else f"interrupted{rest}")


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, T], *, patience_s: float = 0.0) -> T:
    """The result of `work`, which is given up once the event is set and `patience_s` have gone by.

    Raises:
        StopRequested: it was given up.
    """
    task = asyncio.create_task(work)
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and patience_s:
            await asyncio.wait([task], timeout=patience_s)
        if task.done():
            return task.result()
    finally:
        for each in (task, waiting):
            each.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
    raise StopRequested


async def heed_signals() -> None:
    """Let a signal set the stop event now, if it came while the caller held the loop.

    A learner in this process holds it for whole steps.
    """
    for _ in range(3):  # it is noticed, read, handled: a turn of the loop each
        await asyncio.sleep(0)


def run_to_end(main: Callable[[Stop], Coroutine[Any, Any, T]], *, grace: float | None = None) -> T:
    """Run a coroutine function that heeds a stop event; in a notebook, whose loop already runs, in a thread of its own.

    Args:
        main: is given the event.
        grace: see `Stop`; in a Ray job it holds for every signal, elsewhere for SIGTERM.

    Raises:
        CancelledError: a second signal came before the coroutine had heeded the first.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(main, grace)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="trl_ray") as executor:
        return executor.submit(_run, main, grace).result()


def _run(main: Callable[[Stop], Coroutine[Any, Any, T]], grace: float | None) -> T:
    """As `asyncio.run`, but a KeyboardInterrupt cancels the run in order, and no thread is waited for without end."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        loop.set_default_executor(_Threads(thread_name_prefix="trl_ray"))

        async def guarded() -> T:
            stop, task = Stop(grace), asyncio.current_task()
            assert task is not None
            with _signals(stop, task):
                return await main(stop)

        task, interrupt = loop.create_task(guarded()), None
        while True:
            try:
                return loop.run_until_complete(task)
            except KeyboardInterrupt as error:
                if task.done():
                    raise
                interrupt = error
                task.cancel()
            except asyncio.CancelledError:
                if interrupt is None:
                    raise
                raise interrupt from None


class _Threads(ThreadPoolExecutor):
    """Calls that block; the run's end does not wait for one that was given up."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor`."""
        super().shutdown(wait=False, cancel_futures=True)


_owns_process = False


def own_process() -> None:
    """This process is the command's own: it may be left while a call that cannot be ended still holds it."""
    global _owns_process
    _owns_process = True


def interrupts_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for the time before a run, when nothing is lost with the process."""
    del number, frame
    raise KeyboardInterrupt


def interrupt_at_once() -> None:
    """From now on, every signal that would end the process is as Ctrl-C; until a run takes them."""
    for number in (signal.SIGTERM, *_NOTICES):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupts_at_once)


class _Handlers:
    """The handlers of one run, in the main thread; see the module."""

    def __init__(self, stop: Stop, task: asyncio.Task[Any]) -> None:
        self._stop, self._task, self._loop = stop, task, asyncio.get_running_loop()
        self._first: float | None = None
        """When the run was first demanded to end."""
        self._noticed = False
        self._interrupts = False
        self._cancelled = False
        self._ended = False
        self._lock = threading.Lock()
        self._before: dict[signal.Signals, Any] = {}
        self._main = threading.get_ident()

    def hold(self) -> None:
        """Be the handlers, whoever was in the meantime; what is ignored by intent stays ignored."""
        for number in (*_DEMANDS, *_NOTICES):
            found = signal.getsignal(number)
            if number in self._before or number in _DEMANDS or found in (signal.SIG_DFL, interrupts_at_once):
                self._before.setdefault(number, found)
                signal.signal(number, self._on_signal)

    def release(self) -> None:
        """Give the handlers back."""
        with self._lock:
            self._ended = True
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt
        signal.alarm(0)  # While Ray starts, its handler of fatal signals comes first, and would abort in three seconds.
        now, name = time.monotonic(), signal.Signals(number).name
        if number in _NOTICES:
            if self._first is None and not self._noticed:
                self._noticed = True
                self._tell(name, in_ray_job())
        elif self._first is None:
            self._first = now
            self._tell(name, number == signal.SIGTERM or in_ray_job())
        elif now - self._first > _ECHO_S and not self._stop.at_once:
            self._stop.at_once = True
            self._start(self._cancel, after_s=0.0)
            self._start(self._leave, after_s=_AT_ONCE_S)

    def _tell(self, name: str, in_haste: bool) -> None:
        stop = self._stop
        stop.request(name, in_haste=in_haste)
        self._loop.call_soon_threadsafe(stop.tell)
        if in_haste:
            reserve = min(_RESERVE_S, stop.grace_s / 3)
            self._start(self._cancel, after_s=stop.grace_s - reserve)
            self._start(self._leave, after_s=stop.grace_s - reserve / 4)

    def _start(self, what: Callable[[], None], *, after_s: float) -> None:
        timer = threading.Timer(after_s, what)
        timer.daemon = True
        timer.start()

    def _cancel(self) -> None:
        """Cancel the run, and interrupt whoever holds the loop instead."""
        heard = threading.Event()

        def cancel() -> None:
            heard.set()
            if self._stop.at_once or not self._stop.settled:
                self._task.cancel()

        if self._has_ended():
            return
        self._loop.call_soon_threadsafe(cancel)
        if heard.wait(_HELD_S):
            return
        with self._lock:
            if not self._ended and not self._stop.settled:
                self._interrupts = True
                signal.pthread_kill(self._main, signal.SIGTERM)

    def _leave(self) -> None:
        if _owns_process and not self._has_ended():
            kill_own_raylets()
            os._exit(_INTERRUPTED)

    def _has_ended(self) -> bool:
        with self._lock:
            return self._ended or self._loop.is_closed()


@contextmanager
def _signals(stop: Stop, task: asyncio.Task[Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = _Handlers(stop, task)
    stop.hold = handlers.hold
    handlers.hold()
    try:
        yield
    finally:
        handlers.release()
