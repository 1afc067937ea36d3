"""Two processes that stand for two ranks, started together."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from warm_processes import warm_python


def run_two_ranks(target: Callable[..., None], arguments: Callable[[], tuple[Any, ...]]) -> None:
    """Run a function in two processes, which get their rank first; once more if one of them was aborted.

    Threads of gloo can outlive their group by a moment, and end a process that opens and leaves dozens of groups one
    after the other on a busy machine. A learner has one group for its whole life.

    Args:
        target: what they run.
        arguments: makes its further arguments, anew for each try: meeting places are used once.
    """
    plain = spawn.get_executable()
    spawn.set_executable(warm_python())
    try:
        mp.spawn(target, arguments(), nprocs=2)  # type: ignore[no-untyped-call]
    except mp.ProcessExitedException as error:
        if error.signal_name != signal.SIGABRT.name:
            raise
        mp.spawn(target, arguments(), nprocs=2)  # type: ignore[no-untyped-call]
    finally:
        spawn.set_executable(plain)


def meeting_place(directory: Path) -> str:
    """Where two ranks on this machine meet; unlike a port, nobody else can take it before they do."""
    return f"file://{directory}/meeting-{uuid.uuid4().hex}"
