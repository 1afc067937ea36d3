"""Namespaces and users: what is tried in a forked copy first, because a half-entered namespace cannot be left.

possible(step) --> forked copy tries it --> None, or why not
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

from trl_ray.rewards.jail import system_calls as linux

_PID_MAX_IN_NAMESPACES = (6, 14)
"""The Linux since which kernel.pid_max belongs to a namespace; before, it is the machine's."""
_FIRST_OWN_USER = 0x70000000


def forked(work: Callable[[], object]) -> int:
    """The pid of a new process that does `work` and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:  # a copy must never go on as if it were its parent
            os._exit(code)
    return pid


def possible(step: Callable[[], object], *, start: Callable[[Callable[[], object]], int] = forked) -> str | None:
    """Why `step` cannot be done here, found out in a process that `start` makes; None where it can."""
    reads, writes = os.pipe()

    def tell() -> None:
        text = ""
        try:
            step()
        except OSError as error:
            text = error.strerror or str(error)
        os.write(writes, text.encode()[:500])
        os._exit(bool(text))

    pid = start(tell)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return None if status == 0 else text or "it ended the process"


def end_as(code: int) -> None:
    """End this process with that exit code, or by that signal."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        with suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def enter_user_namespace() -> None:
    """Become the same user in a user namespace of one's own, where one may make other namespaces.

    Raises:
        OSError: it is not allowed here, or this process has several threads.
    """
    user, group = os.getuid(), os.getgid()
    linux.unshare(linux.CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as map_file:
            map_file.write(text)


def forked_as_first(work: Callable[[], object]) -> int:
    """The same as `forked`, first of a new pid namespace: when it ends, all in there are killed.

    Only root of the namespace that this process itself is in may do so again and again.
    """
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWPID)
        try:
            return forked(work)
        finally:
            linux.setns(own, linux.CLONE_NEWPID)
    finally:
        os.close(own)


def forked_with_first(work: Callable[[], object]) -> int:
    """The pid of a new process that has another do `work`, the first of a new pid namespace, and ends as that ends."""

    def go_between() -> None:
        linux.unshare(linux.CLONE_NEWPID)

        def first() -> None:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            work()

        pid = forked(first)
        os.closerange(3, 4096)  # pipes must end when the other process does
        end_as(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    return forked(go_between)


def mount_own_proc() -> None:
    """See only this pid namespace's processes in /proc."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)


def mount_folder(folder: str, *, size_bytes: int, user: int) -> None:
    """Files under `folder` live in memory, at most `size_bytes` of them, and are gone with the mount namespace."""
    options = f"size={size_bytes},nr_inodes=4096,mode=700,uid={user},gid={user}"
    linux.mount("tmpfs", folder, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)


def limit_pids(most: int) -> None:
    """Have this pid namespace, whose /proc is mounted, hold `most` processes and threads.

    Raises:
        OSError: the kernel has that limit for the whole machine only.
    """
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < _PID_MAX_IN_NAMESPACES:
        raise OSError(f"Linux {os.uname().release} limits processes of the whole machine only")
    with open("/proc/sys/kernel/pid_max", "w") as file:
        file.write(str(most))


def own_user(needed: Sequence[str], *, folder: str) -> int | None:
    """A user id of which nothing else on this machine runs and which may read `needed` and reach what is in `folder`.

    None where there is none.
    """
    if os.geteuid() != 0:
        return None
    for user in (_FIRST_OWN_USER + os.getpid(), 65534):

        def become(user: int = user) -> None:
            become_user(user)
            for path in needed:
                if not os.access(path, os.R_OK):
                    raise PermissionError(f"{path} is not readable")
            if not os.access(folder, os.X_OK):
                raise PermissionError(f"{folder} is out of reach")

        if possible(become) is None:
            return user
    return None


def become_user(user: int) -> None:
    """Change to a user and group of that number for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
