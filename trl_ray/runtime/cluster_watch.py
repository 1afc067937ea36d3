"""Notices that Ray itself is gone: the head's global control store, or the raylet of the driver's node.

    every second -- TCP connect --> GCS, raylet --refused or silent, for longer than the patience--> ClusterLostError
                    in a thread: a loop that is held (by a step, by pickling, by SIGSTOP) is no sign of Ray's end

Without the GCS Ray ends a driver after 60 s, without the raylet after 15 s: with a line in C++, and no word of the run.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from trl_ray.errors import ClusterLostError

_INTERVAL_S = 1.0
_CONNECT_S = 2.0
_RAYS_PATIENCE_S = 60.0
"""Until Ray ends the process, unless its variable says otherwise; three quarters of it are waited for."""
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process of Ray's that a run cannot be without."""

    what: str
    address: tuple[str, int]
    patience_s: float
    """How long it may be gone: a control store that others keep alive comes back, a raylet never does."""


def parts_of_cluster(
    *, gcs: str, raylet: tuple[str, int], is_ours: bool, environ: Mapping[str, str] = os.environ
) -> tuple[Part, ...]:
    """What must answer.

    Args:
        gcs: ``host:port`` of the head.
        raylet: of the driver's node.
        is_ours: Ray was started by the run, so that nobody starts its head again.
        environ: of this process.
    """
    host, _, port = gcs.rpartition(":")
    patience = 2.0 if is_ours else 0.75 * float(environ.get(_RECONNECT, _RAYS_PATIENCE_S))
    return (
        Part(what="the head of the Ray cluster (GCS)", address=(host.strip("[]"), int(port)), patience_s=patience),
        Part(what="Ray on the driver's node (raylet)", address=raylet, patience_s=2.0),
    )


async def watch_cluster(parts: tuple[Part, ...], *, say: Callable[[str], None]) -> None:
    """Probe for ever.

    consumes: answers to connections. produces: a line when a part is missed, and when it is back.
    waits for: the interval. unblocked by: cancellation.

    Raises:
        ClusterLostError: a part was gone for longer than it may be.
    """
    loop, since = asyncio.get_running_loop(), dict[str, float]()
    # Its own: other threads may be held by files or services that hang.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trl_ray-watch")
    try:
        while True:
            for part in parts:
                problem, now = await loop.run_in_executor(thread, _problem, part.address)
                _judge(part, problem, now, since, say)
            await asyncio.sleep(_INTERVAL_S if not since else _INTERVAL_S / 2)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _judge(part: Part, problem: str | None, now: float, since: dict[str, float], say: Callable[[str], None]) -> None:
    """Remember since when a part is missed; raises ClusterLostError where that is too long."""
    begun = since.get(part.what)
    if problem is None:
        if begun is not None:
            say(f"{part.what} answers again, after {now - begun:.1f} s")
        since.pop(part.what, None)
    elif begun is None:
        since[part.what] = now
        say(f"{part.what} does not answer ({problem}); the run ends if it has not in {part.patience_s:g} s")
    elif now - begun >= part.patience_s:
        host, port = part.address
        raise ClusterLostError(
            f"{part.what} must answer at {host}:{port} for a run to go on, but has not for "
            f"{now - begun:.1f} s ({problem}). Have Ray running again, then resume."
        )


def _problem(address: tuple[str, int]) -> tuple[str | None, float]:
    """Why nobody takes connections there, None where somebody does; and when that was found, by `time.monotonic`."""
    problem: str | None = None
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except TimeoutError:
        problem = "no answer"
    except OSError as error:
        problem = error.strerror or str(error)
    return problem, time.monotonic()
