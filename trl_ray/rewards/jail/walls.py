"""What stands between a model's answer and the machine: tried once, told in words, put up around each group's process.

    walls.build()   once, before functions are loaded      user namespace where one is needed
    walls.look()    once, after                            network namespace; what holds here is found out in copies
    walls.start(work)   a process per group
        walls.enter(folder)   at the beginning of work     folder, limits, Landlock, user, capabilities, seccomp
            walls.enter_answer()   in a fork of that       no process may be started any more

Each wall is there or named in `missing`; one that held in the trial and fails later raises, it is never passed over.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from trl_ray.rewards.jail import landlock, namespaces
from trl_ray.rewards.jail import system_calls as linux
from trl_ray.rewards.jail.syscall_filter import Ban, forbid

MEMORY_BYTES = 2 * 2**30
"""That a group's process may have beside what its functions hold when they are loaded."""
FOLDER_BYTES = 64 * 2**20
SHARED_BYTES = 16 * 2**20
"""Of a group's own /dev/shm, which holds the semaphores of queues and pools of processes."""
MAX_PROCESSES = 304
"""No pid namespace takes a lower limit."""
MAX_FILES = 256
_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"),
    *("/etc/alternatives", "/etc/localtime", "/etc/timezone", "/etc/mime.types", "/etc/nsswitch.conf", "/etc/passwd"),
    *("/etc/group", "/etc/fonts", "/dev/zero", "/dev/random", "/dev/urandom"),
)
_DEVICES = ("/dev/null",)
_SHARED = "/dev/shm"
_PACKAGE = str(Path(__file__).parents[2])
_ENVIRONMENT = (
    *("PATH", "LANG", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)


class Walls:
    """The walls that this machine allows, from the point of view of the process that forks those inside."""

    def __init__(self, *, memory_bytes: int | None = None) -> None:
        self.missing: dict[str, str] = {}
        """What could not be put up here, by what it guards, and why."""
        self._memory_bytes = memory_bytes
        self._readable: tuple[str, ...] = ()
        self._user: int | None = None
        self._start: Callable[[Callable[[], object]], int] = namespaces.forked
        self._proc = self._pids = self._shared = self._landlock = self._seccomp = False

    def build(self) -> None:
        """Prepare; to be called while this process has one thread."""
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        if namespaces.possible(lambda: linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNS)) is None:
            self._start = namespaces.forked_as_first
            return
        reason = namespaces.possible(namespaces.enter_user_namespace)
        if reason is None:
            namespaces.enter_user_namespace()
            self._start = namespaces.forked_with_first
            reason = namespaces.possible(lambda: None, start=self._start)
        if reason is not None:
            self._start = namespaces.forked
            self.missing["processes of others out of sight (pid namespace)"] = reason

    def look(self, folder: str) -> None:
        """Find out what holds, once the functions are loaded; `folder` is an empty one for the trial."""
        self._readable = readable_paths()
        if self._start is not namespaces.forked:
            # The network is also forbidden by seccomp: this is the wall behind.
            with suppress(OSError):
                linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
            self._proc = self._holds("processes of others in /proc", namespaces.mount_own_proc)
        self._landlock = self._holds("files", self._rules(folder).restrict)
        self._seccomp = self._holds("network, and calls of the kernel (seccomp)", lambda: forbid(Ban.JAIL))
        needed = [os.__file__, f"{_PACKAGE}/__init__.py", sys.prefix]
        self._user = namespaces.own_user(needed, folder=folder)
        # Not a wall: without it, functions have no queues of processes.
        self._shared = self._proc and self._trial(self._mount_shared) is None
        self._pids = self._proc and self._trial(self._limit_pids) is None
        if not (self._pids or self._counts_processes):
            self.missing["number of processes"] = "it takes Linux 6.14, a user namespace, or a user of its own"
        linux.prctl(linux.PR_SET_DUMPABLE, 0)

    def _holds(self, name: str, step: Callable[[], object]) -> bool:
        reason = self._trial(step)
        if reason is not None:
            self.missing[name] = reason
        return reason is None

    def _trial(self, step: Callable[[], object]) -> str | None:
        return namespaces.possible(step, start=self._start)

    def _mount_shared(self) -> None:
        namespaces.mount_own_proc()
        namespaces.mount_folder(_SHARED, size_bytes=SHARED_BYTES, user=os.getuid())

    def _limit_pids(self) -> None:
        namespaces.mount_own_proc()
        namespaces.limit_pids(MAX_PROCESSES)

    @property
    def _counts_processes(self) -> bool:
        """Whether the limit of processes counts only those of the jail: root is never counted."""
        return self._user is not None or (self._start is namespaces.forked_with_first and os.geteuid() != 0)

    def start(self, work: Callable[[], object]) -> int:
        """The pid of a new process that does `work`; where it can be, with a pid namespace that ends with it."""
        return self._start(work)

    @property
    def kills_all(self) -> bool:
        """Whether the end of such a process is the end of all that it has started."""
        return self._start is namespaces.forked_as_first

    def enter(self, folder: str, *, cpu_s: float | None) -> None:
        """Put them up around this process, just forked; `folder` is the only one that it may write to.

        `cpu_s` limits the time that it may compute.

        Raises:
            OSError: one that held when it was tried.
        """
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        user = os.getuid() if self._user is None else self._user
        if self._proc:
            namespaces.mount_own_proc()
            namespaces.mount_folder(folder, size_bytes=FOLDER_BYTES, user=user)
            if self._shared:
                namespaces.mount_folder(_SHARED, size_bytes=SHARED_BYTES, user=user)
            if self._pids:
                namespaces.limit_pids(MAX_PROCESSES)
        elif self._user is not None:
            os.chown(folder, user, user)
        os.chdir(folder)
        self._limit_resources(cpu_s)
        if self._landlock:
            self._rules(folder).restrict()
        if self._user is not None:
            namespaces.become_user(self._user)
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # lost with the change of user
        linux.drop_capabilities()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        if self._seccomp:
            forbid(Ban.JAIL)
        kept = {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None}
        os.environ.clear()
        os.environ.update(kept, HOME=folder, TMPDIR=folder)

    def enter_answer(self, *, cpu_s: float) -> None:
        """Around a copy of such a process, which only computes: it can start, signal and outlive nothing."""
        _limit(resource.RLIMIT_CPU, int(cpu_s) + 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        if self._seccomp:
            forbid(Ban.ANSWER)

    def _limit_resources(self, cpu_s: float | None) -> None:
        _limit(resource.RLIMIT_CORE, 0)
        if cpu_s is not None:
            _limit(resource.RLIMIT_CPU, int(cpu_s) + 2)
        _limit(resource.RLIMIT_FSIZE, FOLDER_BYTES)
        _limit(resource.RLIMIT_NOFILE, MAX_FILES)
        _limit(resource.RLIMIT_AS, self._memory_bytes or _address_space() + MEMORY_BYTES)
        if self._counts_processes:
            _limit(resource.RLIMIT_NPROC, MAX_PROCESSES)

    def _rules(self, folder: str) -> landlock.Rules:
        proc = ("/proc",) if self._proc else ()
        shared = (_SHARED,) if self._shared else ()
        return landlock.Rules(readable=(*self._readable, *proc), writable=(folder, *_DEVICES, *shared))


def readable_paths() -> tuple[str, ...]:
    """Python, its packages, and the folders of packages and files of modules that are loaded: no data, no home."""
    roots = {*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, _PACKAGE}
    roots |= {entry for entry in sys.path if os.path.basename(entry) in {"site-packages", "dist-packages"}}
    roots -= {"/"}
    within = tuple(f"{root}/" for root in roots)
    modules = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or file.startswith(within):
            continue
        folders = getattr(module, "__path__", None)
        modules |= {file} if folders is None else {str(folder) for folder in folders} if "." not in name else set()
    return tuple(sorted({*roots, *modules}))


def kill_descendants(keep: Sequence[int] = ()) -> None:
    """Kill the children that this process has, and those that it inherits meanwhile, but those of `keep`."""
    while found := [pid for pid in _children() if pid not in keep]:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        # They come and go while we look.
        with suppress(OSError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[1].decode() == own:
                found.append(int(entry))
    return found


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (allowed, allowed))
