"""A process beside which reward functions run, with the pipes to it: all is killed when one hangs, crashes, or lies.

    send(frame) --> child --> receive()         stdout, stderr of the child --> bounded log

The child leads a session of its own, gets an environment without secrets, and answers over a pipe that only it and
those it forks know; what a function prints is never read as an answer. It adopts what they leave (sandbox_child.py) and
kills all of it once the lifeline is closed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from trl_ray.rewards import sandbox_messages as wire

LOG_BYTES = 64 * 1024
# Of the log in a failure's detail: the interpreter's own report of a segmentation fault fits.
_TAIL_CHARACTERS = 4000
_MARK = "TRL_RAY_SANDBOX"
_GRACE_S = 2.0
"""In which the child kills what it has started."""
_LOADING_GRACE_S = 0.3
"""The same while functions are loaded, when it may not listen."""
_ENVIRONMENT = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    }
)


def child_environment(parent: Mapping[str, str], mark: str) -> dict[str, str]:
    """What the child may know of the parent's environment: an allow-list, hence no tokens and no keys."""
    kept = {key: value for key, value in parent.items() if key in _ENVIRONMENT or key.startswith("LC_")}
    # The child must find the modules that the parent finds, however the parent came to its path.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**kept, "PYTHONPATH": path, _MARK: mark}


class Died(Exception):
    """The child closed its end, or sent what no child of ours sends."""


class Late(Exception):
    """The deadline passed."""


class SandboxProcess:
    """One process with its pipes."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        self.pid: int | None = None
        """Of the process that calls functions, once it is ready."""
        self.folder = tempfile.mkdtemp(prefix="trl-ray-reward-")
        """For the files of groups, which may have a user of their own: theirs lie in it, and others cannot list it."""
        os.chmod(self.folder, 0o711)
        child_reads, self._request = os.pipe()
        self._reply, child_writes = os.pipe()
        child_watches, self._lifeline = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "trl_ray.rewards.sandbox_child",
                *map(str, (child_reads, child_writes, child_watches, self.folder)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pass_fds=(child_reads, child_writes, child_watches),
            start_new_session=True,
            env=child_environment(os.environ, self.mark),
        )
        os.close(child_reads)
        os.close(child_writes)
        os.close(child_watches)
        os.set_blocking(self._request, False)
        # Tells of the child's death even where a process it forked still holds the reply pipe open.
        self._death = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None
        self._killing = threading.Lock()
        self._killed = False
        self._log = bytearray()
        self.drainer = threading.Thread(target=self._drain, name="reward-log", daemon=True)
        self.drainer.start()

    def _drain(self) -> None:
        """Keep the newest `LOG_BYTES` of what the child prints, so that it never blocks on a full pipe.

        consumes: output; produces: the log; waits for: output; unblocked by: output, or the child's end.
        """
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while data := os.read(fd, 2**20):
            self._log += data
            del self._log[:-LOG_BYTES]

    def log(self) -> str:
        """The end of what the child printed."""
        return bytes(self._log).decode(errors="replace").rstrip()

    @property
    def advice(self) -> str:
        """What it printed last, for messages."""
        tail = self.log()[-_TAIL_CHARACTERS:]
        return f"It last printed:\n{tail}" if tail else "It printed nothing."

    def send(self, frame: Mapping[str, Any], deadline: float) -> None:
        """Write a frame before `deadline` (monotonic seconds)."""
        data = memoryview(wire.encode(frame))
        while data:
            self._wait(self._request, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._request, data) :]
            except BrokenPipeError as error:
                raise Died("closed its request pipe") from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next frame, before `deadline`."""
        size = int.from_bytes(self._read(wire.HEADER_BYTES, deadline), "big")
        if size > wire.MAX_FRAME_BYTES:
            raise Died(f"announced a reply of {size} bytes; {wire.MAX_FRAME_BYTES} are allowed")
        try:
            return wire.decode(self._read(size, deadline))
        except ValueError as error:
            raise Died(f"sent a reply that is not JSON: {error}") from error

    def has_frame(self, deadline: float, *, wake: int) -> bool:
        """Wait for the beginning of a frame; False where `wake` became readable first.

        consumes: nothing; waits for: the child; unblocked by: data, its death, `wake`, or the deadline.
        """
        return self._wait(self._reply, select.POLLIN, deadline, wake=wake)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._reply, select.POLLIN, deadline)
            piece = os.read(self._reply, min(size - len(data), 2**20))
            if not piece:
                raise Died("closed its reply pipe")
            data += piece
        return bytes(data)

    def _wait(self, fd: int, event: int, deadline: float, *, wake: int | None = None) -> bool:
        poller = select.poll()
        poller.register(fd, event)
        for other in (self._death, wake):
            if other is not None:
                poller.register(other, select.POLLIN)
        ready = [found for found, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if not ready:
            raise Late
        if fd not in ready and self._death in ready:
            raise Died("closed its pipes")
        return fd in ready

    def kill(self) -> int:
        """Kill the child and all that was started there; answer its exit code, negative for a signal."""
        with self._killing:
            if not self._killed:
                # Only once: after that the number may belong to somebody else's group.
                self._killed = True
                os.close(self._lifeline)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=_GRACE_S if self.pid is not None else _LOADING_GRACE_S)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                _kill_marked(self.mark)
                self.drainer.join(timeout=1.0)
                with contextlib.suppress(RecursionError):
                    shutil.rmtree(self.folder, ignore_errors=True)
        return self.process.wait()

    def close(self) -> None:
        """Close the pipes of a killed child."""
        for fd in (self._request, self._reply, self._death):
            if fd is not None:
                os.close(fd)
        if self.process.stdout is not None and not self.drainer.is_alive():
            self.process.stdout.close()


def _kill_marked(mark: str) -> None:
    """Kill what carries the mark in its environment, should the child itself have been killed before it could."""
    needle = f"{_MARK}={mark}".encode()
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not entry.isdigit():
            continue
        # Processes come and go while we look, and those of other users are not ours to read.
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/environ", "rb") as file:
                marked = needle in file.read()
            if marked:
                os.kill(int(entry), signal.SIGKILL)
