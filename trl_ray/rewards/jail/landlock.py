"""Landlock: a process gives up files, TCP, and signals to processes outside, without being root (landlock(7)).

    Rules(readable=..., writable=...) --> restrict --> this process and all that it starts, for good

Whoever is restricted cannot trace processes outside, which is also what /proc/<pid>/environ, mem and fd ask for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from trl_ray.rewards.jail.system_calls import PR_SET_NO_NEW_PRIVS, prctl, syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_SOCK, _MAKE_FIFO, _MAKE_CHAR, _MAKE_BLOCK = 1 << 9, 1 << 10, 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ALL_TCP = 0b11
_SIGNALS, _ABSTRACT_SOCKETS = 0b10, 0b01
# Rights that each version of Landlock knows, the newest first.
_FILE_RIGHTS = ((5, (1 << 16) - 1), (3, (1 << 15) - 1), (2, (1 << 14) - 1), (1, (1 << 13) - 1))
_SCOPE_VERSION, _TCP_VERSION, _REFER_VERSION = 6, 4, 2


class _Attributes(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


def version() -> int:
    """Of Landlock in this kernel; 0 where it has none."""
    try:
        return syscall(_CREATE, "landlock", None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Files that stay in reach; all others, TCP, and signals to processes outside are given up."""

    readable: Sequence[str]
    """Files and folders, and what is below; absent ones are passed over."""
    writable: Sequence[str]

    def restrict(self) -> None:
        """Put them in force for this process and its children.

        Raises:
            OSError: the kernel has no Landlock.
        """
        known = version()
        rights = next((mask for since, mask in _FILE_RIGHTS if known >= since), 0)
        network = _ALL_TCP if known >= _TCP_VERSION else 0
        scoped = _SIGNALS | _ABSTRACT_SOCKETS if known >= _SCOPE_VERSION else 0
        made_nowhere = _MAKE_SOCK | _MAKE_FIFO | _MAKE_CHAR | _MAKE_BLOCK
        rules = [(path, rights & _READ) for path in self.readable]
        rules += [(path, rights & ~made_nowhere & ~_IOCTL) for path in self.writable]
        _restrict(_Attributes(rights, network, scoped), rules)


def restrict_reach() -> None:
    """Give up only signals to, and tracing of, processes outside, and making block devices and mounts.

    Raises:
        OSError: the kernel has no Landlock, or too old a one.
    """
    known = version()
    if known < _REFER_VERSION:
        raise OSError(f"landlock: version {_REFER_VERSION} is needed (Linux 5.19), this kernel has {known}")
    # Tracing is forbidden to whoever has rules about files; these take no file away.
    _restrict(_Attributes(_REFER | _MAKE_BLOCK, 0, _SIGNALS if known >= _SCOPE_VERSION else 0), [("/", _REFER)])


def _restrict(attributes: _Attributes, rules: Sequence[tuple[str, int]]) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = syscall(_CREATE, "landlock", ctypes.byref(attributes), size, ctypes.c_uint32(0))
    try:
        for path, rights in rules:
            with suppress(FileNotFoundError, PermissionError):
                _allow(ruleset, path, rights & attributes.files)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        syscall(_RESTRICT, "landlock", ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = rights if os.path.isdir(path) else rights & _OF_FILES
        rule = _PathBeneath(allowed, fd)
        syscall(
            *(_ADD, "landlock", ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule)),
            ctypes.c_uint32(0),
        )
    finally:
        os.close(fd)
