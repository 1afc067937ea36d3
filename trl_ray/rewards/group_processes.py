"""Scores every group in a new process, forked from one that has loaded the functions and never sees an answer.

    worker --{"nonce", "group", "timeout_s"}--> this process --fork--> walls --> score_group --> a pipe of its own
    worker <--{"nonce", "running" or "scored" or "lost"}-- this process <-- checked; then the group's process is killed

Nothing that a group does, or that its answers do, is there when the next one is scored. See walls.py for what a group's
process may do meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_ray.rewards import sandbox_messages as wire
from trl_ray.rewards.functions import text_of
from trl_ray.rewards.jail.walls import Walls, kill_descendants
from trl_ray.rewards.lone_answers import scored_alone
from trl_ray.rewards.reward_registry import READ, RewardSpec, Scorer, plain_rule
from trl_ray.rewards.scoring import GroupInput, NamedFunction, score_group
from trl_ray.types import RewardErrorKind

MAX_REPLY_BYTES = 16 * 2**20
"""Of a group's answer: as JSON it may need twenty times as much to be read."""

_LAST_MOMENT_MS = 500

Preparation = Callable[[Mapping[str, Any]], None]
"""Loads, before the fork, what the columns of a group ask for; never sees a completion."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """A group's process; mutable."""

    nonce: str
    pid: int
    pidfd: int
    pipe: int
    folder: str
    deadline: float
    """Monotonic seconds."""
    received: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipes:
    """Descriptors that join this process to the worker; no group's process has them."""

    requests: int
    replies: int
    lifeline: int
    """Ends when the worker wants an end."""


class GroupProcesses:
    """Forks, listens to, and kills the processes of groups."""

    def __init__(
        self,
        *,
        functions: Sequence[NamedFunction],
        specs: Sequence[RewardSpec],
        preparations: Sequence[Preparation],
        walls: Walls,
        folder: str,
        may_abstain: bool,
        pipes: Pipes,
    ) -> None:
        self._functions = functions
        self._reads = {
            spec.name: READ.get(spec.reference or "", text_of) for spec in specs if spec.scorer is Scorer.EVALUATOR
        }
        self._preparations = preparations
        self._walls = walls
        self._folder = folder
        self._may_abstain = may_abstain
        self._pipes = pipes
        self._groups: dict[int, _Group] = {}
        """By the descriptor of their pipe."""
        # Pages that hold objects are not written to, hence not copied, by a collection in a fork.
        gc.collect()
        gc.freeze()

    def serve(self) -> None:
        """consumes: requests, groups' replies; produces: replies; waits for: either; unblocked by: data, or an end."""
        requests, lifeline = self._pipes.requests, self._pipes.lifeline
        while True:
            poller = select.poll()
            poller.register(requests, select.POLLIN)
            poller.register(lifeline, select.POLLIN)
            for group in self._groups.values():
                poller.register(group.pipe, select.POLLIN)
                poller.register(group.pidfd, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(self._patience_ms())}
            if lifeline in ready:
                return
            for group in list(self._groups.values()):
                if ready & {group.pipe, group.pidfd}:
                    self._listen(group)
                elif time.monotonic() >= group.deadline:
                    self._lose(group, RewardErrorKind.TIMEOUT, "")
            if requests in ready:
                frame = wire.read_frame(requests)
                if frame is None:
                    return
                self._begin(frame)

    def end(self) -> None:
        """Kill what is under way."""
        for group in list(self._groups.values()):
            self._end(group)
        kill_descendants()

    def _send(self, frame: Mapping[str, Any]) -> None:
        wire.write_frame(self._pipes.replies, frame)

    def _patience_ms(self) -> float | None:
        if not self._groups:
            return None
        first = min(group.deadline for group in self._groups.values())
        return max(0.0, first - time.monotonic()) * 1000 + 1

    # ---- the beginning of a group --------------------------------------------------------------------------

    def _begin(self, frame: Mapping[str, Any]) -> None:
        text, timeout_s = str(frame["group"]), float(frame["timeout_s"])
        self._prepare(text)
        folder = tempfile.mkdtemp(dir=self._folder)
        pipe, writes = os.pipe()
        pidfds = [group.pidfd for group in self._groups.values()]
        others = (*asdict(self._pipes).values(), pipe, *self._groups, *pidfds)

        def work() -> None:
            for fd in others:
                os.close(fd)
            self._run(text, _Answers(writes, str(frame["nonce"])), folder, timeout_s)

        pid = self._walls.start(work)
        os.close(writes)
        os.set_blocking(pipe, False)
        self._groups[pipe] = _Group(
            nonce=str(frame["nonce"]),
            pid=pid,
            pidfd=os.pidfd_open(pid),
            pipe=pipe,
            folder=folder,
            deadline=time.monotonic() + timeout_s,
        )

    def _prepare(self, text: str) -> None:
        if not self._preparations:
            return
        columns = json.loads(text)["columns"]
        for prepare in self._preparations:
            # What is wrong with a row is told where it is scored.
            with contextlib.suppress(Exception):
                prepare(columns)

    def _run(self, text: str, answers: _Answers, folder: str, timeout_s: float) -> None:
        """In the group's process."""
        self._walls.enter(folder, cpu_s=timeout_s)
        functions = [self._wrapped(named, timeout_s) for named in self._functions]
        asyncio.run(_score(functions, GroupInput(text), answers, may_abstain=self._may_abstain))

    def _wrapped(self, named: NamedFunction, timeout_s: float) -> NamedFunction:
        if named.name not in self._reads:
            return named
        function = scored_alone(
            named.function,
            name=named.name,
            reads=self._reads[named.name],
            walls=self._walls,
            timeout_s=timeout_s,
            plain=plain_rule(named.function),
        )
        return NamedFunction(name=named.name, function=function, weight=named.weight)

    # ---- its answers, and its end ----------------------------------------------------------------------------

    def _listen(self, group: _Group) -> None:
        try:
            piece = os.read(group.pipe, 2**20)
        except BlockingIOError:  # its process has ended, and one that it started holds the pipe
            piece = b""
        group.received += piece
        while len(group.received) >= wire.HEADER_BYTES:
            size = int.from_bytes(group.received[: wire.HEADER_BYTES], "big")
            if size > MAX_REPLY_BYTES:
                self._lose(group, RewardErrorKind.CRASH, f"announced a reply of {size} bytes")
                return
            if len(group.received) < wire.HEADER_BYTES + size:
                break
            body = bytes(group.received[wire.HEADER_BYTES : wire.HEADER_BYTES + size])
            del group.received[: wire.HEADER_BYTES + size]
            if not self._pass_on(group, body):
                return
        if not piece:
            # Its pipe closes a moment before it can be waited for.
            poller = select.poll()
            poller.register(group.pidfd, select.POLLIN)
            poller.poll(_LAST_MOMENT_MS)
            self._lose(group, RewardErrorKind.CRASH, "closed its reply pipe")

    def _pass_on(self, group: _Group, body: bytes) -> bool:
        """Hand a frame to the worker; False when it was the last one."""
        try:
            frame = wire.decode(body)
        except ValueError as error:
            self._lose(group, RewardErrorKind.CRASH, f"sent a reply that is not JSON: {error}")
            return False
        if frame.get("nonce") != group.nonce:
            what = "sent a reply without the nonce of the request: it was forged and is refused"
            self._lose(group, RewardErrorKind.CRASH, what)
            return False
        is_last = "scored" in frame
        if is_last:
            self._end(group)
        known: dict[str, Any] = {key: frame[key] for key in ("running", "waiting", "scored") if key in frame}
        self._send({"nonce": group.nonce, **known})
        return not is_last

    def _lose(self, group: _Group, kind: RewardErrorKind, what: str) -> None:
        code = self._end(group)
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._send({"nonce": group.nonce, "lost": kind.value, "what": what, "ended": ended})

    def _end(self, group: _Group) -> int:
        """Kill a group's process with all that it has started; answer its exit code."""
        del self._groups[group.pipe]
        code = _exit_code(group)
        if code is None:
            os.kill(group.pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(group.pid, 0)[1])
        if not self._walls.kills_all:
            kill_descendants(keep=[other.pid for other in self._groups.values()])
        os.close(group.pipe)
        os.close(group.pidfd)
        with contextlib.suppress(RecursionError):
            shutil.rmtree(group.folder, ignore_errors=True)
        return code


def _exit_code(group: _Group) -> int | None:
    """Of a group's process that has ended; None of one that lives."""
    pid, status = os.waitpid(group.pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


class _Answers:
    """The writing end of a group's pipe."""

    def __init__(self, fd: int, nonce: str) -> None:
        self._fd = fd
        self._nonce = nonce
        self._pid = os.getpid()

    def send(self, **values: object) -> None:
        """Write one frame."""
        if os.getpid() != self._pid:  # a function that forks comes back twice
            os._exit(0)
        wire.write_frame(self._fd, {"nonce": self._nonce, **values})


async def _score(
    functions: Sequence[NamedFunction], group: GroupInput, answers: _Answers, *, may_abstain: bool
) -> None:
    scored = await score_group(
        functions,
        group,
        on_call=lambda name: answers.send(running=name),
        on_wait=lambda: answers.send(waiting=True),
        may_abstain=may_abstain,
    )
    answers.send(scored=wire.scored_to_json(scored))
