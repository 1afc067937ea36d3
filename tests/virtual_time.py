"""A clock that jumps: an event loop whose waits take no time, so that hours of back-off are tested in a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class JumpingLoop(asyncio.SelectorEventLoop):
    """Whenever there is nothing to do before the next timer, it is time for that timer."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self._ahead_s

    def _run_once(self) -> None:
        live = [timer for timer in self._scheduled if not timer._cancelled]  # type: ignore[attr-defined]
        if live and not self._ready:  # type: ignore[attr-defined]
            self._ahead_s += max(0.0, min(timer._when for timer in live) - self.time())
        super()._run_once()  # type: ignore[misc]


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`; threads and sockets are not waited for."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)
