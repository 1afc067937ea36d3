"""The few calls of Linux that Python does not offer, by ctypes; each raises OSError with its own name.

prctl, unshare, setns, mount            libc
landlock_*                              by number: the same on every architecture
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_SECCOMP: Final = 22
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000

_CAPABILITY_VERSION = 0x20080522
ALL_CAPABILITIES: Final = range(64)
CAPABILITIES_TO_LOOK: Final = (19, 21, 38)
"""CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON: with each, root reads the memory of other processes all the same."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def prctl(option: int, *values: int) -> int:
    """See prctl(2)."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(ctypes.c_int(option), *padded), "prctl")


def unshare(flags: int) -> None:
    """See unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """See setns(2)."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """See mount(2)."""
    texts = [text.encode() for text in (source, target, kind, options)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3] or None)
    _check(result, f"mount {kind} on {target}")


def syscall(number: int, call: str, *values: object) -> int:
    """A call by its number; `values` are ctypes objects or None."""
    return _check(_libc.syscall(ctypes.c_long(number), *values), call)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_capabilities(numbers: Collection[int] = ALL_CAPABILITIES) -> None:
    """Give up capabilities of root's, for this process and what it starts, for good."""
    for number in numbers:
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError:  # not root, or no such capability in this kernel
            break
    header, sets = _CapabilityHeader(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capget(ctypes.byref(header), sets), "capget")
    for number in numbers:
        for kind in range(3):  # effective, permitted, inheritable: of the lower 32 and then of the others
            sets[3 * (number // 32) + kind] &= ~(1 << number % 32)
    _check(_libc.capset(ctypes.byref(header), sets), "capset")
