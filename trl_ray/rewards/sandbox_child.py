"""The process beside a reward worker: ``python -m trl_ray.rewards.sandbox_child FDS FOLDER``.

    lifetime=run          forks one process that loads and calls the functions for all groups
    lifetime=run_walled   loads the functions and forks one process, behind walls, that calls them for all groups
    lifetime=group        loads the functions and forks a process, behind walls, for each group (group_processes.py)

It adopts what its children start and leave, so that nothing outlives it: when the worker closes the lifeline, or dies,
all are killed, and the folder of their files is removed. It never calls a function, and ends as the process ended that
it watches over.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable

from trl_ray.rewards import sandbox_messages as wire
from trl_ray.rewards.function_process import load_functions, run_functions, serve_groups
from trl_ray.rewards.group_processes import GroupProcesses, Pipes
from trl_ray.rewards.jail import system_calls as linux
from trl_ray.rewards.jail.namespaces import end_as, forked
from trl_ray.rewards.jail.walls import Walls, kill_descendants
from trl_ray.rewards.reward_registry import PREPARATIONS

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def main(request_fd: int, reply_fd: int, lifeline_fd: int, folder: str) -> None:
    """Do as the first frame says; remove `folder` at the end, however early that comes.

    consumes: frames of the request pipe; produces: answers; waits for: the next frame; unblocked by: the worker sending
    it, or closing the pipe or the lifeline.
    """
    try:
        code = _serve(Pipes(requests=request_fd, replies=reply_fd, lifeline=lifeline_fd), folder)
    finally:
        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
    if code is not None:
        end_as(code)


def _serve(pipes: Pipes, folder: str) -> int | None:
    """The exit code of the process that was watched over; None where there was none."""
    request_fd, reply_fd, lifeline_fd = pipes.requests, pipes.replies, pipes.lifeline
    for fd in (request_fd, reply_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    faulthandler.enable()
    # Whole lines reach the log even when the process is killed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    poller = select.poll()
    poller.register(request_fd, select.POLLIN)
    poller.register(lifeline_fd, select.POLLIN)
    found = [fd for fd, _ in poller.poll()]
    first = None if lifeline_fd in found else wire.read_frame(request_fd)
    if first is None:
        return None
    lifetime = wire.Lifetime(first["lifetime"])
    if not hasattr(os, "pidfd_open"):  # all that follows is Linux's
        run_functions(first, request_fd, reply_fd)
        return None
    if lifetime is wire.Lifetime.RUN:
        with contextlib.suppress(OSError, AttributeError):
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        return _watch_over(lambda: run_functions(first, request_fd, reply_fd), pipes)
    walls = Walls(memory_bytes=first["memory_bytes"])
    walls.build()
    # Read when a library is loaded. Threads of OpenMP's that computed before a fork are waited for in vain after it.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    specs = [wire.spec_from_json(value) for value in first["functions"]]
    functions = load_functions(specs, first, lambda frame: wire.write_frame(reply_fd, frame))
    walls.look(folder)
    ready = {"nonce": first["nonce"], "ready": True, "missing": walls.missing}
    if lifetime is wire.Lifetime.RUN_WALLED:

        def serve() -> None:
            walls.enter(folder, cpu_s=None)
            serve_groups(functions, request_fd, reply_fd, may_abstain=bool(first["may_abstain"]))

        def on_fork(pid: int) -> None:
            wire.write_frame(reply_fd, {**ready, "pid": pid})

        return _watch_over(serve, pipes, walls=walls, on_fork=on_fork)
    wire.write_frame(reply_fd, {**ready, "pid": os.getpid()})
    groups = GroupProcesses(
        functions=functions,
        specs=specs,
        preparations=[PREPARATIONS[name] for spec in specs if (name := spec.reference or "") in PREPARATIONS],
        walls=walls,
        folder=folder,
        may_abstain=bool(first["may_abstain"]),
        pipes=pipes,
    )
    try:
        groups.serve()
    finally:
        groups.end()
    return None


def _watch_over(
    work: Callable[[], None],
    pipes: Pipes,
    *,
    walls: Walls | None = None,
    on_fork: Callable[[int], None] = lambda pid: None,
) -> int:
    """Fork a process that does `work` and alone answers; end all that it started when it ends; give its exit code.

    consumes: nothing; waits for: the end of that process or of the lifeline; unblocked by: either.
    """

    def work_alone() -> None:
        os.close(pipes.lifeline)
        work()

    pid = walls.start(work_alone) if walls else forked(work_alone)
    on_fork(pid)
    os.close(pipes.requests)
    os.close(pipes.replies)
    with contextlib.suppress(OSError, AttributeError):
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
    poller = select.poll()
    poller.register(pipes.lifeline, select.POLLIN)
    pidfd = os.pidfd_open(pid)
    poller.register(pidfd, select.POLLIN)
    poller.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    kill_descendants()
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
