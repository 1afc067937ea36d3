"""Namespaces and users: what is tried in a forked copy first, because a half-entered namespace cannot be left.

possible(step) --> forked copy tries it --> None, or why not
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from trl_ray.rewards.jail import system_calls as linux

_PID_MAX_IN_NAMESPACES = (6, 14)
"""The Linux since which kernel.pid_max belongs to a namespace; before, it is the machine's."""
_FIRST_OWN_USER = 0x70000000


def possible(step: Callable[[], object]) -> str | None:
    """Why `step` cannot be done here, found out in a copy of this process; None where it can."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            step()
        except OSError as error:
            text = error.strerror or str(error)
        except BaseException as error:  # a copy must never go on as if it were its parent
            text = repr(error)
        os.write(writes, text.encode()[:500])
        os._exit(bool(text))
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return None if status == 0 else text or "it ended the process"


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


@contextmanager
def children_in_new_pid_namespace() -> Iterator[None]:
    """The next process that is forked is the first of a pid namespace: when it ends, all in there are killed."""
    this, own = os.getpid(), os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWPID)
        yield
    finally:
        if os.getpid() == this:
            linux.setns(own, linux.CLONE_NEWPID)
        os.close(own)


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


def own_user(needed: Sequence[str]) -> int | None:
    """A user id of which nothing else on this machine runs and which may read `needed`; None where there is none."""
    if os.geteuid() != 0:
        return None
    for user in (_FIRST_OWN_USER + os.getpid(), 65534):

        def become(user: int = user) -> None:
            become_user(user)
            for path in needed:
                if not os.access(path, os.R_OK):
                    raise PermissionError(f"{path} is not readable")

        if possible(become) is None:
            return user
    return None


def become_user(user: int) -> None:
    """Change to a user and group of that number for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
