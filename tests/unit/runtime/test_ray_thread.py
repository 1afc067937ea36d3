"""Calls to Ray that block, beside the event loop; one thread for all, which never ends."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trl_ray.runtime.ray_processes import children_of
from trl_ray.runtime.ray_thread import in_ray_thread, ray_is_left_behind


def test_calls_are_made_in_one_thread_and_answer_or_raise() -> None:
    async def main() -> tuple[int, int]:
        with pytest.raises(KeyError, match="no such"):
            await in_ray_thread(lambda: {}["no such"])
        return await in_ray_thread(threading.get_ident), await in_ray_thread(threading.get_ident)

    first, second = asyncio.run(main())
    assert first == second != threading.get_ident()
    assert not ray_is_left_behind()


def test_a_call_that_is_given_up_frees_its_caller_and_is_undone_once_it_is_through() -> None:
    go, undone = threading.Event(), threading.Event()

    async def main() -> None:
        waiting = asyncio.create_task(in_ray_thread(lambda: go.wait(30), undo=lambda result: undone.set()))
        await asyncio.sleep(0.02)
        assert ray_is_left_behind()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    assert not undone.is_set()
    go.set()
    assert undone.wait(5)
    end = time.monotonic() + 5
    while ray_is_left_behind() and time.monotonic() < end:
        time.sleep(0.01)
    assert not ray_is_left_behind()


def test_the_processes_that_a_process_started_are_found() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert child.pid in children_of(os.getpid())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.pid not in children_of(os.getpid())
