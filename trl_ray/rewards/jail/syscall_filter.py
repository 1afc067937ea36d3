"""seccomp: a process gives up calls of the kernel for good, as a BPF program that the kernel asks before each call.

    Ban.JAIL    sockets, other processes' memory, namespaces, mounts, keys, shared memory that outlives a process, ...
    Ban.ANSWER  these, and starting or signalling processes at all: what only computes needs neither

A forbidden call fails with EPERM; `clone3`, whose flags cannot be seen, with ENOSYS, after which libc takes `clone`.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import platform
import struct

from trl_ray.rewards.jail.system_calls import PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, prctl

_FILTER_MODE = 2
_LOAD, _EQUALS, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _FAIL = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_NEW_NAMESPACES = 0x7E020000
_THREAD = 0x00010000
_X32 = 0x40000000

# Of each machine: its number in the kernel's audit, and its column below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
# Name, number on x86_64, number on aarch64.
_JAIL = """
    socket 41 198             io_uring_setup 425 425
    ptrace 101 117            process_vm_readv 310 270     process_vm_writev 311 271   process_madvise 440 440
    pidfd_open 434 434        pidfd_getfd 438 438          pidfd_send_signal 424 424   kcmp 312 272
    shmget 29 194             semget 64 190                msgget 68 186               mq_open 240 180
    unshare 272 97            setns 308 268                mount 165 40                umount2 166 39
    pivot_root 155 41         chroot 161 51                fsopen 430 430              fsconfig 431 431
    fsmount 432 432           move_mount 429 429           open_tree 428 428           mount_setattr 442 442
    bpf 321 280               perf_event_open 298 241      userfaultfd 323 282         fanotify_init 300 262
    keyctl 250 219            add_key 248 217              request_key 249 218         personality 135 92
    name_to_handle_at 303 264 open_by_handle_at 304 265    init_module 175 105         finit_module 313 273
    delete_module 176 106     kexec_load 246 104           kexec_file_load 320 294     reboot 169 142
    swapon 167 224            swapoff 168 225
"""
_ANSWER = """
    fork 57 -                 vfork 58 -                   execve 59 221               execveat 322 281
    kill 62 129               tkill 200 130                tgkill 234 131              rt_sigqueueinfo 129 138
    rt_tgsigqueueinfo 297 240 prlimit64 302 261
"""


class Ban(enum.Enum):
    """What is forbidden."""

    JAIL = "jail"
    ANSWER = "answer"


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid(ban: Ban) -> None:
    """Put the filter in force for this thread and what it starts; filters add up.

    Raises:
        OSError: the kernel has no seccomp, or the machine is none of x86_64 and aarch64.
    """
    instructions = _compile(ban)
    program = _Program(len(instructions) // 8, instructions)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(program))


@functools.cache
def _compile(ban: Ban) -> bytes:
    if platform.machine() not in _MACHINES:
        raise OSError(f"seccomp: no table of system calls for {platform.machine()}")
    audit, column = _MACHINES[platform.machine()]
    words = (_JAIL + (_ANSWER if ban is Ban.ANSWER else "")).split()
    forbidden = [int(number) for number in words[1 + column :: 3] if number != "-"]
    refuse = _line(_RETURN, _FAIL | errno.EPERM)
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_EQUALS, audit, then=1),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
    ]
    if column == 0:
        lines += [_line(_AT_LEAST, _X32, otherwise=1), refuse]
    lines += [_line(_EQUALS, _CLONE3[column], otherwise=1), _line(_RETURN, _FAIL | errno.ENOSYS)]
    for number in forbidden:
        lines += [_line(_EQUALS, number, otherwise=1), refuse]
    lines += [_line(_EQUALS, _CLONE[column], otherwise=4 if ban is Ban.JAIL else 6), _line(_LOAD, _FIRST_ARGUMENT)]
    lines += [_line(_ANY_BIT, _NEW_NAMESPACES, otherwise=1), refuse]
    if ban is Ban.ANSWER:
        lines += [_line(_ANY_BIT, _THREAD, then=1), refuse]
    return b"".join([*lines, _line(_RETURN, _ALLOW), _line(_RETURN, _ALLOW)])


def _line(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction: `then` and `otherwise` are how many to pass over."""
    return struct.pack("HBBI", code, then, otherwise, value)
