"""Runs reward functions in a child process that can be killed whenever it hangs, crashes or talks nonsense.

    score(group) -- request frame, fresh nonce --> child        stdout, stderr of the child --> bounded log
                 <-- frames with that nonce ------              deadline, end of file, bad frame --> kill, fail

The child leads a session of its own, gets an environment without secrets, and answers over a pipe that only it
knows; what a function prints is never read as an answer. One child serves many groups, so that functions may keep
models and caches; after any failure that is not the function's plain exception the next group gets a new child.
This guards a run against its own reward functions. It is no jail for hostile programs: files stay readable.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_ray.rewards import sandbox_messages as wire
from trl_ray.rewards.reward_registry import RewardSpec
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import RewardErrorKind, RewardFailure, ScoredGroup

LOG_BYTES = 64 * 1024
START_TIMEOUT_S = 120.0
# Of the log in a failure's detail: the interpreter's own report of a segmentation fault fits.
_TAIL_CHARACTERS = 4000
_MARK = "TRL_RAY_SANDBOX"
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


class _Died(Exception):
    """The child closed its end, or sent what no child of ours sends."""


class _Late(Exception):
    """The deadline passed."""


class _Child:
    """One process with its pipes."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        child_reads, self._request = os.pipe()
        self._reply, child_writes = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_ray.rewards.sandbox_child", str(child_reads), str(child_writes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pass_fds=(child_reads, child_writes),
            start_new_session=True,
            env=child_environment(os.environ, self.mark),
        )
        os.close(child_reads)
        os.close(child_writes)
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

    def send(self, frame: Mapping[str, Any], deadline: float) -> None:
        """Write a frame before `deadline` (monotonic seconds)."""
        data = memoryview(wire.encode(frame))
        while data:
            self._wait(self._request, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._request, data) :]
            except BrokenPipeError as error:
                raise _Died("closed its request pipe") from error

    def answers(self, nonce: str, deadline: float) -> Iterator[dict[str, Any]]:
        """Frames of one request until `deadline`.

        consumes: bytes of the reply pipe; produces: frames; waits for: the child; unblocked by: data, its death,
        or the deadline.
        """
        while True:
            size = int.from_bytes(self._read(wire.HEADER_BYTES, deadline), "big")
            if size > wire.MAX_FRAME_BYTES:
                raise _Died(f"announced a reply of {size} bytes; {wire.MAX_FRAME_BYTES} are allowed")
            try:
                frame = wire.decode(self._read(size, deadline))
            except ValueError as error:
                raise _Died(f"sent a reply that is not JSON: {error}") from error
            if not secrets.compare_digest(str(frame.get("nonce")).encode(), nonce.encode()):
                raise _Died("sent a reply without the nonce of the request: it was forged and is refused")
            yield frame

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._reply, select.POLLIN, deadline)
            piece = os.read(self._reply, min(size - len(data), 2**20))
            if not piece:
                raise _Died("closed its reply pipe")
            data += piece
        return bytes(data)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(fd, event)
        if self._death is not None:
            poller.register(self._death, select.POLLIN)
        ready = [found for found, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if not ready:
            raise _Late
        if fd not in ready:
            raise _Died("closed its pipes")

    def kill(self) -> int:
        """Kill the child, its group and whatever it left elsewhere; answer its exit code, negative for a signal."""
        with self._killing:
            if not self._killed:
                # Only once: after that the number may belong to somebody else's group.
                self._killed = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                _kill_marked(self.mark)
                self.drainer.join(timeout=1.0)
        return self.process.wait()

    def close(self) -> None:
        """Close the pipes of a killed child."""
        for fd in (self._request, self._reply, self._death):
            if fd is not None:
                os.close(fd)
        if self.process.stdout is not None and not self.drainer.is_alive():
            self.process.stdout.close()


def _kill_marked(mark: str) -> None:
    """Kill processes that left the child's group but still carry its mark in their environment."""
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


class Sandbox:
    """Scores groups one at a time in a child process that is started when needed::

        sandbox = Sandbox(functions=specs, weights=None, timeout_s=60.0)
        scored = sandbox.score(group, size=8)       # never raises for what a function does
        sandbox.close()

    `score` blocks and belongs to one thread; `close` and `pid` may be used from any.
    """

    def __init__(
        self,
        *,
        functions: Sequence[RewardSpec],
        weights: Sequence[float] | None,
        timeout_s: float,
        memory_bytes: int | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        may_abstain: bool = False,
    ) -> None:
        self._functions = tuple(functions)
        self._weights = None if weights is None else list(weights)
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._start_timeout_s = start_timeout_s
        self._may_abstain = may_abstain
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()
        """Guards `_child` and `_closed`."""
        self._turn = threading.RLock()
        """Held while a request is under way."""

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        child = self._child
        return None if child is None else child.process.pid

    @property
    def log(self) -> str:
        """The end of what the present child printed."""
        child = self._child
        return "" if child is None else child.log()

    def start(self) -> ScoredGroup | None:
        """Start the child unless it runs; answers why the functions cannot be loaded, else None."""
        with self._turn:
            if self._child is not None and self._child.process.poll() is None:
                return None
            self._discard()
            with self._lock:
                if self._closed:
                    return _failure("reward worker", RewardErrorKind.CRASH, "The sandbox must be open, it is closed.")
                child = self._child = _Child()
            frame = {
                "functions": [wire.spec_to_json(spec) for spec in self._functions],
                "weights": self._weights,
                "memory_bytes": self._memory_bytes,
                "may_abstain": self._may_abstain,
            }
            return self._exchange(child, frame, timeout_s=self._start_timeout_s, size=0)

    def score(self, group: GroupInput, *, size: int) -> ScoredGroup:
        """Rewards of one group of `size` completions, or the failure, within `timeout_s` once the child is up."""
        with self._turn:
            failed = self.start()
            if failed is not None:
                return failed
            assert self._child is not None
            scored = self._exchange(self._child, {"group": group.text}, timeout_s=self._timeout_s, size=size)
            assert scored is not None
            return scored

    def _exchange(self, child: _Child, frame: Mapping[str, Any], *, timeout_s: float, size: int) -> ScoredGroup | None:
        """Send one request and wait for its answer; None is the answer "ready"."""
        nonce = secrets.token_hex(16)
        deadline = time.monotonic() + timeout_s
        running = self._functions[0].name
        try:
            child.send({**frame, "nonce": nonce}, deadline)
            for answer in child.answers(nonce, deadline):
                if "running" in answer:
                    running = str(answer["running"])
                elif "ready" in answer:
                    return None
                else:
                    return self._accept(child, answer, size)
        except _Late:
            child.kill()
            detail = f"{running} must return within {timeout_s:g} s, it did not and was killed. {_advice(child)}"
            return self._end(_failure(running, RewardErrorKind.TIMEOUT, detail))
        except _Died as error:
            return self._crashed(child, running, str(error))
        except ValueError as error:
            return self._crashed(child, running, f"sent {error}")
        raise AssertionError("answers() ends only by raising")

    def _accept(self, child: _Child, answer: Mapping[str, Any], size: int) -> ScoredGroup:
        scored = wire.scored_from_json(answer.get("scored"), size)
        # Code that calls sys.exit may have left threads and half-done work: begin anew.
        if scored.failure is not None and scored.failure.kind is RewardErrorKind.CRASH:
            child.kill()
            return self._end(scored)
        return scored

    def _crashed(self, child: _Child, running: str, what: str) -> ScoredGroup:
        # The pipe closes a moment before the process can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(timeout=1.0 if "closed" in what else 0.0)
        code = child.kill()
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        detail = f"The process running {running} must live, it {what} ({ended}). {_advice(child)}"
        return self._end(_failure(running, RewardErrorKind.CRASH, detail))

    def _end(self, scored: ScoredGroup) -> ScoredGroup:
        self._discard()
        return scored

    def _discard(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.close()

    def close(self) -> None:
        """Kill the child; a `score` under way answers CRASH. May be called twice."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.kill()
        # A score under way meets the end of the pipe and gives up its turn.
        with self._turn:
            self._discard()


def _failure(function: str, kind: RewardErrorKind, detail: str) -> ScoredGroup:
    return ScoredGroup(failure=RewardFailure(function=function, kind=kind, detail=detail))


def _advice(child: _Child) -> str:
    tail = child.log()[-_TAIL_CHARACTERS:]
    return f"It last printed:\n{tail}" if tail else "It printed nothing."
