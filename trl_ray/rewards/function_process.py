"""The process that calls the user's functions for all groups, forked by sandbox_child.py.

    reader thread: request pipe --> inbox      (end of file: the worker is gone --> this process ends)
    main thread:   inbox --> a task per group: score_group --> reply pipe

The main thread runs the functions because only there does SIGALRM work, with which some libraries cut themselves
short. What functions print goes to the worker's bounded log; only frames with the request's nonce are answers.
"""

from __future__ import annotations

import asyncio
import os
import queue
import resource
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trl_ray.errors import ConfigError
from trl_ray.rewards import sandbox_messages as wire
from trl_ray.rewards.jail import landlock
from trl_ray.rewards.jail import system_calls as linux
from trl_ray.rewards.reward_registry import RewardSpec, load_function, warm_up
from trl_ray.rewards.scoring import GroupInput, NamedFunction, score_group, weighted
from trl_ray.types import RewardErrorKind, RewardFailure, ScoredGroup


def run_functions(first: dict[str, Any], request_fd: int, reply_fd: int) -> None:
    """Load the functions that the first frame names, then score the group of every further frame.

    Functions are called one group after the other; while those of one are awaited, the next group begins.
    """
    missing = _hold_in(wire.Lifetime(first["lifetime"]))
    reply, specs = _Reply(reply_fd), [wire.spec_from_json(value) for value in first["functions"]]
    if first["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (first["memory_bytes"], first["memory_bytes"]))
    functions = load_functions(specs, first, reply.send)
    reply.send({"nonce": first["nonce"], "ready": True, "pid": os.getpid(), "missing": missing})
    serve_groups(functions, request_fd, reply_fd, may_abstain=bool(first["may_abstain"]))


def serve_groups(functions: tuple[NamedFunction, ...], request_fd: int, reply_fd: int, *, may_abstain: bool) -> None:
    """Score the group of every frame.

    consumes: frames of the request pipe; produces: one answer per frame; waits for: the next frame;
    unblocked by: the worker sending it, or closing the pipe, which ends the process.
    """
    inbox, reply = _Inbox(), _Reply(reply_fd)
    threading.Thread(target=_read_frames, args=(request_fd, inbox), name="requests", daemon=True).start()
    # One event loop for all groups: clients that async functions keep are bound to theirs.
    with asyncio.Runner() as runner:
        runner.run(_serve(functions, inbox, reply, may_abstain=may_abstain))


def _hold_in(lifetime: wire.Lifetime) -> dict[str, str]:
    """Take from the user's functions signals to processes outside, and the sight of their environment and memory.

    The answer is which walls should stand by `lifetime` and do not. Those of the user's own functions that asked for
    none are not among them: where the kernel cannot hold such functions in, they are as trusted as the program.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not hasattr(os, "pidfd_open"):
        return {} if lifetime is wire.Lifetime.RUN else {"all walls": "they are Linux's"}
    with suppress(OSError):
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):
        landlock.restrict_reach()
        linux.drop_capabilities(linux.CAPABILITIES_TO_LOOK)
    return {}


async def _serve(functions: tuple[NamedFunction, ...], inbox: _Inbox, reply: _Reply, *, may_abstain: bool) -> None:
    """consumes: frames; produces: a task for each; waits for: the next frame; unblocked by: the reader."""
    tasks: set[asyncio.Task[None]] = set()
    while True:
        frame = await inbox.next()
        task = asyncio.create_task(_score(functions, frame, reply, may_abstain=may_abstain))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _score(
    functions: tuple[NamedFunction, ...], frame: dict[str, Any], reply: _Reply, *, may_abstain: bool
) -> None:
    nonce = frame["nonce"]
    scored = await score_group(
        functions,
        GroupInput(frame["group"]),
        on_call=lambda name: reply.send({"nonce": nonce, "running": name}),
        on_wait=lambda: reply.send({"nonce": nonce, "waiting": True}),
        may_abstain=may_abstain,
    )
    reply.send({"nonce": nonce, "scored": wire.scored_to_json(scored)})


class _Inbox:
    """Frames on their way from the reader's thread to the event loop."""

    def __init__(self) -> None:
        self._frames: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()

    def put(self, frame: dict[str, Any]) -> None:
        """Of the reader's thread."""
        self._frames.put(frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def next(self) -> dict[str, Any]:
        """The next frame, in the event loop's thread."""
        self._loop = asyncio.get_running_loop()
        # Cleared before looking, so that a frame that comes after the look is seen.
        self._arrived.clear()
        while self._frames.empty():
            await self._arrived.wait()
            self._arrived.clear()
        return self._frames.get_nowait()


def load_functions(
    specs: list[RewardSpec], first: dict[str, Any], send: Callable[[dict[str, Any]], None]
) -> tuple[NamedFunction, ...]:
    """The functions; a name that does not load here is reported as a failure of that function."""
    loaded = []
    for spec in specs:
        send({"nonce": first["nonce"], "running": spec.name})
        try:
            loaded.append(load_function(spec))
            warm_up(loaded[-1])
        except Exception as error:  # loading imports the user's modules, which may raise anything
            text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            failure = RewardFailure(
                function=spec.name,
                kind=RewardErrorKind.EXCEPTION,
                detail=f"{spec.name} must load in the reward worker's process, but: {text}",
                is_final=True,
            )
            send({"nonce": first["nonce"], "scored": wire.scored_to_json(ScoredGroup(failure=failure))})
            raise SystemExit(1) from error
    return weighted([spec.name for spec in specs], loaded, first["weights"])


class _Reply:
    """The writing end of the reply pipe, for this process alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()

    def send(self, frame: dict[str, Any]) -> None:
        """Write one frame."""
        # A function that forks comes back twice; the copy must not answer a second time.
        if os.getpid() != self._pid:
            os._exit(0)
        wire.write_frame(self._fd, frame)


def _read_frames(fd: int, inbox: _Inbox) -> None:
    """consumes: bytes of the request pipe; produces: frames; waits for: the worker; unblocked by: data or its end."""
    while (frame := wire.read_frame(fd)) is not None:
        inbox.put(frame)
    os._exit(0)
