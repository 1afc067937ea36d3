"""Ends the processes of a Ray that was started here and can no longer be asked to end them itself.

this process --children--> raylet --children--> workers, agents: an agent without a control store outlives its raylet
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """The processes that a process started and that are still there; none where the system does not tell."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, listed.read_text().split())
    return found


def kill_own_raylets() -> None:
    """Kill each raylet among this process's children, with all that it started."""
    for pid in children_of(os.getpid()):
        if _name_of(pid) == "raylet":
            _kill_tree(pid)


def _kill_tree(pid: int) -> None:
    below = children_of(pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        _kill_tree(child)


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
