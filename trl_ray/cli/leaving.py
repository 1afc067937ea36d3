"""Ends the command's process with the exit code of its run, whatever Ray and other libraries do while Python ends.

run is over, all is written --> interrupted, or Ray is left behind: at once
                            --> else: Python's own end, and at once when that takes longer than _END_S
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

from trl_ray.runtime.ray_processes import kill_own_raylets
from trl_ray.runtime.ray_thread import ray_is_left_behind

_END_S = 15.0


def leave(code: int, *, at_once: bool) -> None:
    """Return to where Python ends the process in order, if that can be had; else end it.

    Args:
        code: for the shell.
        at_once: whoever interrupted the run waits, and may kill.
    """
    if at_once or ray_is_left_behind():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kill_own_raylets()
        os._exit(code)
    begun = threading.Event()

    def end() -> None:
        begun.wait()
        if not over.wait(_END_S):
            os._exit(code)

    over = threading.Event()
    threading.Thread(target=end, name="leave", daemon=True).start()
    atexit.register(begun.set)  # registered last, it is called first, once no thread of a user's is left
