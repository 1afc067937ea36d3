"""What a run does and says once it is to end: in its events, to whoever started it, and with its actors.

signal --> Stop --> tell_of_stop: event        loop ends, or is cut --> what_is_left: message --> close_in_time
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from trl_ray.models.checkpoint import list_checkpoints
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.pipelines.run.recording import RunRecorder
from trl_ray.pipelines.run.signals import Stop, StopRequested, unless
from trl_ray.runtime.runtime import Runtime
from trl_ray.types import EventKind

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


async def tell_of_stop(stop: Stop, recorder: RunRecorder) -> None:
    """Write down that the run was asked to end, once it is."""
    await stop.wait()
    left = stop.left_s
    time_left = {} if left is None else {"seconds_left": round(left, 1)}
    recorder.say(EventKind.STOP_REQUESTED, "driver", by=stop.cause, **time_left)


def what_is_left(directory: RunDirectory) -> str:
    """What an interrupted run goes on from, and how."""
    checkpoints = list_checkpoints(directory.checkpoints)
    found = f"the checkpoint {checkpoints[-1].name} stands" if checkpoints else "there is no checkpoint yet"
    return f"{found}; go on with: trl-ray resume {directory.path}"


async def started(work: Coroutine[Any, Any, T], *, stop: Stop, run_dir: Path) -> T:
    """The result of what starts the actors, which is given up when the run is to end.

    Raises:
        InterruptedRun: it was.
    """
    try:
        return await unless(stop, work)
    except StopRequested:
        raise stop.error(f" while the actors started; go on with: trl-ray resume {run_dir}") from None


async def close_in_time(runtime: Runtime, stop: Stop) -> None:
    """End the actors; what is not through when the process is about to be killed ends with it."""
    try:
        async with asyncio.timeout(None if stop.left_s is None else stop.closing_left_s / 2):
            await runtime.close()
    except TimeoutError:
        _LOG.warning("the actors were not gone when the time was over that %s leaves; they end with Ray", stop.cause)
