"""One writer for a run directory: the lock file, who holds it, and whether its holder is dead.

hold ─► run.lock {host, pid, ...} ◄─ touched every few seconds          release ─► gone
  ├─ its holder lives: refused
  └─ its process is dead, or its node gives no sign of life any more: taken, and told

Locks of the kernel (flock) decide only who writes the file first: on shared file systems they may not reach other
nodes. There a holder is alive while the file is touched; its age is read from the file server's clock alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from trl_ray.errors import ConfigError, RunError
from trl_ray.observe.private_files import file_mode, make_folder, usable_path

LOCK = "run.lock"
_LOG = logging.getLogger(__name__)
_SETTLE_S = 0.3
"""Two nodes that take the same lock at once both see, after so long, whose name stands in it."""
_HELD: set[str] = set()
"""Tokens of the locks that this process holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockTimes:
    """How often a holder gives a sign of life, and when it counts as dead; in seconds."""

    beat: float = 5.0
    dead_after: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that a lock file names."""

    host: str
    pid: int
    boot: str
    """Of the kernel, with its space of process ids: where both are the same, the pid says whether it lives."""
    born: int
    """When the process started, in the kernel's ticks: pids are used again."""
    token: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} (since {self.since})"

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, and of this space of process ids."""
        return bool(self.boot) and self.boot == _boot()

    @property
    def has_died(self) -> bool:
        """Of a process of this machine: whether it is there no more."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        state, born = _state_of(self.pid)
        return state in ("Z", "X") or (born != 0 and born != self.born)


def _boot() -> str:
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state_of(pid: int) -> tuple[str, int]:
    """State and time of birth of a process, ("", 0) where they cannot be read."""
    try:
        # Its name stands in brackets and may hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_boot(),
        born=_state_of(os.getpid())[1],
        token=secrets.token_hex(8),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


_UNREADABLE = (OSError, ValueError, TypeError)


def _named(file: int | Path) -> Holder:
    """Who a lock file names; raises one of `_UNREADABLE` where there is no file, or nothing readable in it."""
    content = file.read_bytes() if isinstance(file, Path) else os.pread(file, 4096, 0)
    return Holder(**json.loads(content))


def _read(file: int | Path) -> Holder | None:
    """Who a lock file names; None where there is no file, or nothing readable in it."""
    with contextlib.suppress(*_UNREADABLE):
        return _named(file)
    return None


def living_holder(folder: Path, *, other: bool = False) -> Holder | None:
    """The process of this machine that holds a run directory now; None where none is known to.

    Args:
        folder: of the run.
        other: whether one that this process holds itself counts as free.
    """
    holder = _read(folder / LOCK)
    if holder is None or not holder.is_here or holder.has_died or (other and holder.token in _HELD):
        return None
    return holder


def is_free(folder: Path, *, other: bool = False) -> bool:
    """Whether it is certain that no process, or none but this one with `other`, writes a run directory now."""
    holder = _read(folder / LOCK)
    return holder is None or (holder.is_here and holder.has_died) or (other and holder.token in _HELD)


def in_use(folder: Path, holder: Holder | None) -> ConfigError:
    """What a second writer is told."""
    return ConfigError(
        f"the run directory {folder} must be written by one process at a time, and {holder or 'another one'} is "
        "writing it now. Wait for its end, stop it, or choose another output_dir. Nothing was changed."
    )


class RunLock:
    """The right to write a run directory, from `hold` to `release`.

    with RunLock.hold(folder) as lock:
        lock.check()
    """

    def __init__(self, folder: Path, times: LockTimes) -> None:
        self.folder, self._times = folder, times
        self.taken_from: str | None = None
        """Whose lock was taken, and why."""
        self._me = _this_process()
        self._seen = 0.0
        """When the file was last read and named this process, by the steady clock."""
        self._made: list[Path] = []
        self._file = -1
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)

    @classmethod
    def hold(cls, folder: str | os.PathLike[str], *, times: LockTimes | None = None) -> Self:
        """Take the lock of a run directory, which is made where there is none.

        Raises:
            ConfigError: another process holds it, or the folder cannot be written; nothing was changed.
        """
        lock = cls(usable_path(folder), times or LockTimes())
        try:
            lock._acquire()
        except OSError as error:
            lock._clean()
            raise ConfigError(
                f"output_dir must be a folder that can be written, got {str(lock.folder)!r}: "
                f"{error.strerror or error}. Choose another output_dir or fix the permissions."
            ) from error
        except BaseException:
            lock._clean()
            raise
        lock._seen = time.monotonic()
        _HELD.add(lock._me.token)
        lock._beats.start()
        return lock

    def check(self) -> None:
        """See that the lock is still this process's own, before something is written that another might write too.

        A file that cannot be read is no loss yet: its file server may be away for a while. It becomes one before this
        process could have given no sign of life for so long that another one takes the lock.

        Raises:
            RunError: it is not; another process writes the run directory. Or that could not be seen for too long.
        """
        try:
            holder: Holder | None = _named(self._path)
        except FileNotFoundError:
            holder = None
        except _UNREADABLE as error:
            self._bear(error)
            return
        if holder is None or holder.token != self._me.token:
            raise RunError(
                f"the lock {self._path} must stay this run's own, and {holder or 'nobody'} holds it now: this process "
                "gave no sign of life for too long, or the file was deleted. It stops, so that two do not write one "
                "run. See what became of the run directory before you resume."
            )
        self._seen = time.monotonic()

    def _bear(self, error: Exception) -> None:
        unseen = time.monotonic() - self._seen
        if unseen > self._times.dead_after / 2:
            raise RunError(
                f"the lock {self._path} must be readable, so that it is certain that no other process writes this run, "
                f"and has not been for {unseen:.0f} s: {error!r}. See that the file system can be reached, then resume."
            ) from error

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._beats.join()
        _HELD.discard(self._me.token)
        holder = _read(self._path)
        if holder is not None and holder.token == self._me.token:
            self._path.unlink(missing_ok=True)
        self._clean()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def _path(self) -> Path:
        return self.folder / LOCK

    def _acquire(self) -> None:
        self._made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        make_folder(self.folder)
        is_new = self._open()
        while not self._is_current():
            os.close(self._file)  # its holder has just given it up
            is_new = self._open()
        is_first = self._is_first()
        holder = _read(self._file)
        if holder is None and not is_new:
            time.sleep(_SETTLE_S)  # who has made it may be about to write its name
            holder = _read(self._file)
        if holder is None and not is_first:
            raise in_use(self.folder, None)
        if holder is not None:
            self.taken_from = self._dead(holder)
        self._sign(is_sure=is_new or (is_first and holder is not None and holder.is_here))

    def _open(self) -> bool:
        """Open the file, and say whether it was made: on every file system one process alone makes it."""
        while True:
            with contextlib.suppress(FileExistsError):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                self._file = os.open(self._path, flags, file_mode(self.folder))
                return True
            with contextlib.suppress(FileNotFoundError):
                self._file = os.open(self._path, os.O_RDWR)
                return False

    def _is_first(self) -> bool:
        """Whether no other process has the file locked, as far as its file system knows."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _is_current(self) -> bool:
        try:
            there, mine = os.stat(self._path), os.fstat(self._file)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _dead(self, holder: Holder) -> str:
        """Why a holder counts as dead.

        Raises:
            ConfigError: it is alive.
        """
        if holder.is_here:
            if not holder.has_died:
                raise in_use(self.folder, holder)
            return f"the lock of {holder} was taken: that process is dead"
        touched, begin = os.fstat(self._file).st_mtime_ns, time.monotonic()
        limit = self._times.dead_after
        if self._age(touched) < limit:
            _LOG.warning("%s: waiting for a sign of life of %s, at most %.0f s", self.folder, holder, limit)
        while self._age(touched) < limit and time.monotonic() - begin < limit:
            time.sleep(min(0.5, self._times.beat / 4))
            if os.fstat(self._file).st_mtime_ns != touched or not self._is_current() or _read(self._file) != holder:
                raise in_use(self.folder, holder)
        return f"the lock of {holder} was taken: no sign of life for {limit:.0f} s"

    def _age(self, touched: int) -> float:
        """Seconds since a file of the folder was touched, by the clock of its file server: those of nodes differ."""
        probe = self.folder / f".{LOCK}.{self._me.token}"
        file = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            return (os.fstat(file).st_mtime_ns - touched) / 1e9
        finally:
            os.close(file)
            probe.unlink(missing_ok=True)

    def _sign(self, *, is_sure: bool) -> None:
        content = json.dumps(asdict(self._me)).encode()
        try:
            os.pwrite(self._file, content, 0)
            os.ftruncate(self._file, len(content))
            os.fsync(self._file)
        except OSError:
            self._path.unlink()  # the disk is full: not even the name fits
            raise
        if not is_sure:
            time.sleep(_SETTLE_S)
        found = _read(self._path)
        if found != self._me:
            raise in_use(self.folder, found)

    def _beat(self) -> None:
        while not self._ended.wait(self._times.beat):
            holder = _read(self._path)
            if holder is not None and holder.token != self._me.token:
                return  # `check` tells it
            if holder is not None:
                self._seen = time.monotonic()
            with contextlib.suppress(OSError):  # a file server may be away for a while
                os.utime(self._file)

    def _clean(self) -> None:
        """Close the file, and remove folders that were made for nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break
