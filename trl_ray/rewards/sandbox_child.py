"""The process beside a reward worker: ``python -m trl_ray.rewards.sandbox_child REQUEST_FD REPLY_FD LIFELINE_FD``.

    lifetime=run          forks one process that loads and calls the functions for all groups
    lifetime=run_walled   loads the functions and forks one process, behind walls, that calls them for all groups
    lifetime=group        loads the functions and forks a process, behind walls, for each group (group_processes.py)

It adopts what its children start and leave, so that nothing outlives it: when the worker closes the lifeline, or dies,
all are killed. It never calls a function, and ends as the process ended that it watches over.
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
from collections.abc import Callable, Sequence

from trl_ray.rewards import sandbox_messages as wire
from trl_ray.rewards.function_process import load_functions, run_functions, serve_groups
from trl_ray.rewards.group_processes import GroupProcesses, Pipes
from trl_ray.rewards.jail import system_calls as linux
from trl_ray.rewards.jail.namespaces import end_as, forked
from trl_ray.rewards.jail.walls import Walls, kill_descendants
from trl_ray.rewards.reward_registry import PREPARATIONS


def main(request_fd: int, reply_fd: int, lifeline_fd: int) -> None:
    """Do as the first frame says.

    consumes: frames of the request pipe; produces: answers; waits for: the next frame; unblocked by: the worker sending
    it, or closing the pipe or the lifeline.
    """
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
        return
    lifetime = wire.Lifetime(first["lifetime"])
    if not hasattr(os, "pidfd_open"):  # all that follows is Linux's
        run_functions(first, request_fd, reply_fd)
        return
    if lifetime is wire.Lifetime.RUN:
        with contextlib.suppress(OSError, AttributeError):
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        _watch_over(
            first["folder"], lambda: run_functions(first, request_fd, reply_fd), (request_fd, reply_fd), lifeline_fd
        )
        return
    walls = Walls(memory_bytes=first["memory_bytes"])
    walls.build()
    specs = [wire.spec_from_json(value) for value in first["functions"]]
    functions = load_functions(specs, first, lambda frame: wire.write_frame(reply_fd, frame))
    walls.look(first["folder"])
    ready = {"nonce": first["nonce"], "ready": True, "missing": walls.missing}
    if lifetime is wire.Lifetime.RUN_WALLED:

        def serve() -> None:
            walls.enter(first["folder"], cpu_s=None)
            serve_groups(functions, request_fd, reply_fd, may_abstain=bool(first["may_abstain"]))

        def on_fork(pid: int) -> None:
            wire.write_frame(reply_fd, {**ready, "pid": pid})

        _watch_over(first["folder"], serve, (request_fd, reply_fd), lifeline_fd, walls=walls, on_fork=on_fork)
        return
    wire.write_frame(reply_fd, {**ready, "pid": os.getpid()})
    groups = GroupProcesses(
        functions=functions,
        specs=specs,
        preparations=[PREPARATIONS[name] for spec in specs if (name := spec.reference or "") in PREPARATIONS],
        walls=walls,
        folder=first["folder"],
        may_abstain=bool(first["may_abstain"]),
        pipes=Pipes(requests=request_fd, replies=reply_fd, lifeline=lifeline_fd),
    )
    try:
        groups.serve()
    finally:
        groups.end()


def _watch_over(
    folder: str,
    work: Callable[[], None],
    fds: Sequence[int],
    lifeline_fd: int,
    *,
    walls: Walls | None = None,
    on_fork: Callable[[int], None] = lambda pid: None,
) -> None:
    """Fork a process that does `work`, with the descriptors `fds`; end with all that it started when it ends.

    consumes: nothing; waits for: the end of that process or of the lifeline; unblocked by: either.
    """

    def work_alone() -> None:
        os.close(lifeline_fd)
        work()

    pid = walls.start(work_alone) if walls else forked(work_alone)
    on_fork(pid)
    for fd in fds:
        os.close(fd)
    with contextlib.suppress(OSError, AttributeError):
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
    poller = select.poll()
    poller.register(lifeline_fd, select.POLLIN)
    pidfd = os.pidfd_open(pid)
    poller.register(pidfd, select.POLLIN)
    poller.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    end_as(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
