"""Runs reward functions beside a child process that is replaced whenever it hangs, crashes or talks nonsense.

    submit(group) --> waiting --> one thread: request frame, fresh nonce --> child --> frames with that nonce --> future
                                  deadline, end of file, bad frame --> kill; the culprit fails, the others begin anew

With `Lifetime.RUN` one process serves many groups, so that functions may keep models and caches; after any failure that
is not the function's plain exception the next group gets a new one. With `Lifetime.GROUP` each group gets a new process
behind walls (jail/walls.py). Functions are called one group after the other, each group within `timeout_s` from its
turn; while async functions of some groups are awaited, others begin, and the time in which another group's functions
hold the child is not counted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from trl_ray.rewards import sandbox_messages as wire
from trl_ray.rewards.reward_registry import RewardSpec
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.sandbox_process import Died, Late, SandboxProcess
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import RewardErrorKind, RewardFailure, ScoredGroup

START_TIMEOUT_S = 120.0
GROUPS_AT_ONCE = 32
"""Groups whose async functions are awaited together."""
_GRACE_S = 5.0
_CLOSED = "The sandbox must be open, it is closed."


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """One group on its way; mutable, of the serving thread alone."""

    group: GroupInput | None
    """None only starts the child."""
    size: int
    on_start: Callable[[], None]
    future: Future[ScoredGroup | None] = field(default_factory=Future)
    nonce: str = ""
    running: str = ""
    """The function that was called last."""
    began: float = 0.0
    deadline: float = 0.0
    """Monotonic seconds."""
    is_calling: bool = False
    """Its functions hold the child; else they are awaited."""
    is_suspect: bool = False
    """It was among several when a child died, and is run alone."""

    def finish(self, answer: ScoredGroup | None) -> None:
        with contextlib.suppress(InvalidStateError):  # whoever waited may have gone
            self.future.set_result(answer)


class Sandbox:
    """Scores groups in a child process that is started when needed::

        sandbox = Sandbox(functions=specs, weights=None, timeout_s=60.0)
        scored = sandbox.score(group, size=8)       # never raises for what a function does
        sandbox.close()

    All methods may be called from any thread.
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
        lifetime: Lifetime = Lifetime.RUN,
        on_ready: Callable[[Mapping[str, str]], None] = lambda missing: None,
    ) -> None:
        """Say how groups are scored; nothing is started yet.

        Args:
            functions: what is called, in this order.
            weights: of their parts; None weighs all 1.
            timeout_s: for each group.
            memory_bytes: address space of the process that calls them; None limits only groups' own processes.
            start_timeout_s: for loading the functions.
            may_abstain: let all functions abstain on all completions.
            lifetime: of the process that calls them.
            on_ready: told, in another thread, which walls this machine does not allow, and why.
        """
        self._lifetime, self._on_ready = lifetime, on_ready
        self._functions = tuple(functions)
        self._weights = None if weights is None else list(weights)
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._start_timeout_s = start_timeout_s
        self._may_abstain = may_abstain
        self._child: SandboxProcess | None = None
        self._waiting: deque[_Job] = deque()
        self._under_way: dict[str, _Job] = {}
        """By nonce."""
        self._closed = False
        self._lock = threading.Lock()
        """Guards `_child`, `_waiting`, `_closed` and the wake pipe."""
        self._wakes, self._wake = os.pipe()
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process that calls functions, or forks those that do; None while there is none."""
        child = self._child
        return None if child is None else child.pid

    @property
    def log(self) -> str:
        """The end of what the present child printed."""
        child = self._child
        return "" if child is None else child.log()

    def begin(self) -> Future[ScoredGroup | None]:
        """Start the child unless it runs, without waiting; the answer is why the functions cannot be loaded."""
        return self._enqueue(_Job(group=None, size=0, on_start=lambda: None))

    def start(self) -> ScoredGroup | None:
        """The same, waited for."""
        return self.begin().result()

    def submit(
        self, group: GroupInput, *, size: int, on_start: Callable[[], None] = lambda: None
    ) -> Future[ScoredGroup]:
        """Rewards of one group of `size` completions, or the failure, within `timeout_s` from when its turn comes.

        `on_start` is called then, from another thread. A future that is cancelled before is forgotten.
        """
        future: Any = self._enqueue(_Job(group=group, size=size, on_start=on_start))
        return future  # type: ignore[no-any-return]

    def score(self, group: GroupInput, *, size: int) -> ScoredGroup:
        """The same, waited for."""
        return self.submit(group, size=size).result()

    def close(self) -> None:
        """Kill the child; what is under way or waits answers CRASH. May be called twice."""
        with self._lock:
            closed, self._closed = self._closed, True
            child, thread = self._child, self._thread
            if not closed:
                os.write(self._wake, b"x")
        if child is not None:
            child.kill()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            if self._wakes >= 0:
                os.close(self._wakes)
                os.close(self._wake)
                self._wakes = self._wake = -1

    # ---- the serving thread ------------------------------------------------------------------------------

    def _enqueue(self, job: _Job) -> Future[ScoredGroup | None]:
        with self._lock:
            if self._closed:
                job.finish(_failure("reward worker", RewardErrorKind.CRASH, _CLOSED))
                return job.future
            self._waiting.append(job)
            os.write(self._wake, b"x")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="reward-sandbox", daemon=True)
                self._thread.start()
        return job.future

    def _serve(self) -> None:
        """consumes: jobs, frames; produces: answers; waits for: either; unblocked by: submit, the child, close."""
        while not self._closed:
            job = self._next()
            if job is not None:
                self._begin(job)
            elif self._under_way:
                self._listen()
            else:
                os.read(self._wakes, 4096)
        self._discard()
        with self._lock:
            left = [*self._under_way.values(), *self._waiting]
            self._waiting.clear()
        for job in left:
            job.finish(_failure(job.running or "reward worker", RewardErrorKind.CRASH, _CLOSED))

    def _next(self) -> _Job | None:
        """The next job that may begin now."""
        at_work = list(self._under_way.values())
        if len(at_work) >= GROUPS_AT_ONCE or any(job.is_calling or job.is_suspect for job in at_work):
            return None
        with self._lock:
            if not self._waiting or (self._waiting[0].is_suspect and at_work):
                return None
            return self._waiting.popleft()

    def _begin(self, job: _Job) -> None:
        if not job.future.running() and not job.future.set_running_or_notify_cancel():
            return
        failed = self._open()
        child = self._child
        if failed is not None or child is None or job.group is None:
            job.finish(failed)
            return
        job.nonce, job.running, job.is_calling = secrets.token_hex(16), self._functions[0].name, True
        job.began = time.monotonic()
        # With a process per group the child itself watches the time; this is for when it does not.
        job.deadline = job.began + self._timeout_s + (_GRACE_S if self._lifetime is Lifetime.GROUP else 0.0)
        self._under_way[job.nonce] = job
        job.on_start()
        with self._blaming(child):
            child.send({"group": job.group.text, "nonce": job.nonce, "timeout_s": self._timeout_s}, job.deadline)

    def _listen(self) -> None:
        """Take one frame of the child, or see who is late."""
        child = self._child
        assert child is not None, "jobs are under way"
        with self._blaming(child):
            # While functions of one group hold the child, nobody else's time runs.
            calling = [job for job in self._under_way.values() if job.is_calling]
            deadline = min(job.deadline for job in calling or self._under_way.values())
            if child.has_frame(deadline, wake=self._wakes):
                self._take(child, child.receive(deadline))
            elif not self._closed:
                os.read(self._wakes, 4096)

    def _take(self, child: SandboxProcess, frame: Mapping[str, Any]) -> None:
        job = self._under_way.get(str(frame.get("nonce")))
        if job is None:
            raise Died("sent a reply without the nonce of the request: it was forged and is refused")
        if "running" in frame:
            job.running = str(frame["running"])
        elif "waiting" in frame:
            self._let_go(job)
        elif "lost" in frame:
            self._let_go(job)
            del self._under_way[job.nonce]
            job.finish(self._lost(child, job, frame))
        else:
            self._let_go(job)
            self._accept(child, job, frame)

    def _let_go(self, job: _Job) -> None:
        """Its functions do not hold the child any more: the time that they took is given back to the others."""
        if not job.is_calling:
            return
        job.is_calling = False
        taken = time.monotonic() - job.began
        for other in self._under_way.values():
            if other is not job:
                other.deadline += taken

    def _lost(self, child: SandboxProcess, job: _Job, frame: Mapping[str, Any]) -> ScoredGroup:
        """Its own process is lost, the child lives."""
        kind = RewardErrorKind(frame["lost"])
        if kind is RewardErrorKind.TIMEOUT:
            detail = self._late(job)
        else:
            detail = f"The process running {job.running} must live, it {frame['what']} ({frame['ended']})."
        return _failure(job.running, kind, f"{detail} {child.advice}")

    def _late(self, job: _Job) -> str:
        return f"{job.running} must return within {self._timeout_s:g} s, it did not and was killed."

    def _accept(self, child: SandboxProcess, job: _Job, frame: Mapping[str, Any]) -> None:
        try:
            scored = wire.scored_from_json(frame.get("scored"), job.size, parts=[spec.name for spec in self._functions])
        except ValueError as error:
            self._lose(child, [job], f"sent {error}")
            return
        del self._under_way[job.nonce]
        job.finish(scored)
        # Code that calls sys.exit may have left threads and half-done work: begin anew.
        if (
            self._lifetime is Lifetime.RUN
            and scored.failure is not None
            and scored.failure.kind is RewardErrorKind.CRASH
        ):
            self._begin_anew()

    @contextlib.contextmanager
    def _blaming(self, child: SandboxProcess) -> Iterator[None]:
        """Have whoever is to blame for a late or lost child fail, and the others begin anew."""
        at_work = list(self._under_way.values())
        suspects = [job for job in at_work if job.is_calling] or at_work
        try:
            yield
        except Late:
            late = min(suspects, key=lambda job: job.deadline)
            child.kill()
            del self._under_way[late.nonce]
            late.finish(_failure(late.running, RewardErrorKind.TIMEOUT, f"{self._late(late)} {child.advice}"))
            self._begin_anew()
        except Died as error:
            self._lose(child, suspects, str(error))

    def _lose(self, child: SandboxProcess, suspects: Sequence[_Job], what: str) -> None:
        """The child is of no use any more: fail the one who did it; where it may have been several, try each alone."""
        # The pipe closes a moment before the process can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(timeout=1.0 if "closed" in what else 0.0)
        code = child.kill()
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if len(suspects) == 1:
            (job,) = suspects
            del self._under_way[job.nonce]
            detail = f"The process running {job.running} must live, it {what} ({ended}). {child.advice}"
            job.finish(_failure(job.running, RewardErrorKind.CRASH, detail))
        else:
            for job in suspects:
                job.is_suspect = True
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Discard the child; what was under way waits for the next one."""
        self._discard()
        again = sorted(self._under_way.values(), key=lambda job: job.began)
        self._under_way.clear()
        with self._lock:
            self._waiting.extendleft(reversed(again))

    # ---- the child ---------------------------------------------------------------------------------------

    def _open(self) -> ScoredGroup | None:
        """Start the child unless it runs."""
        if self._child is not None and self._child.process.poll() is None:
            return None
        self._begin_anew()
        with self._lock:
            if self._closed:
                return _failure("reward worker", RewardErrorKind.CRASH, _CLOSED)
            child = self._child = SandboxProcess()
        nonce, running = secrets.token_hex(16), self._functions[0].name
        frame = {
            "nonce": nonce,
            "lifetime": self._lifetime.value,
            "functions": [wire.spec_to_json(spec) for spec in self._functions],
            "weights": self._weights,
            "memory_bytes": self._memory_bytes,
            "may_abstain": self._may_abstain,
        }
        deadline = time.monotonic() + self._start_timeout_s
        try:
            child.send(frame, deadline)
            while "ready" not in (answer := child.receive(deadline)):
                if "scored" in answer:
                    self._discard()
                    return wire.scored_from_json(answer["scored"], 0, parts=())
                running = str(answer.get("running", running))
            child.pid = int(answer["pid"])
            self._on_ready(answer["missing"])
        except Late:
            child.kill()
            detail = f"{running} must load within {self._start_timeout_s:g} s, it did not. {child.advice}"
            self._discard()
            return _failure(running, RewardErrorKind.TIMEOUT, detail)
        except (Died, ValueError) as error:
            child.kill()
            detail = f"The process loading {running} must live, it {error}. {child.advice}"
            self._discard()
            return _failure(running, RewardErrorKind.CRASH, detail)
        return None

    def _discard(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.close()


def _failure(function: str, kind: RewardErrorKind, detail: str) -> ScoredGroup:
    return ScoredGroup(failure=RewardFailure(function=function, kind=kind, detail=detail))
