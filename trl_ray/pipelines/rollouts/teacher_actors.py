"""The teachers of a run as actors: started, fed with the policy's weights, saved with checkpoints.

learner --publish--> object store --pull--> teachers that follow the policy (ema blends, live copies)
checkpoint step-N/teacher/ <--save-- ema --restore <-- after a restart, then the newest weights
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trl_ray.actors.teacher import Teacher
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.models.companions.teacher_rules import FOLDER
from trl_ray.runtime import waits
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime, teacher_plan
from trl_ray.runtime.weights import Published, WeightTransport
from trl_ray.types import Event, EventKind, Health

_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherArguments:
    """What the actors of one teacher are told, beside their names."""

    source: TeacherSource
    vocab_size: int
    """Entries of the vocabulary that student and teacher share."""


class TeacherActors:
    """Every copy of every teacher.

    NOTE: a teacher that follows the policy answers nobody before it was fed.

    Args:
        runtime: makes the actors.
        arguments: of each teacher.
        weights: hands out what the learner has published.
        emit: takes events.
        checkpoint: folder of the one that the run goes on from; None at its beginning.
        deadline_s: for one call.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        arguments: Sequence[TeacherArguments],
        weights: WeightTransport,
        emit: Callable[[Event], None],
        checkpoint: str | None,
        deadline_s: float,
    ) -> None:
        self._runtime, self._arguments, self._weights = runtime, tuple(arguments), weights
        self._emit, self._deadline_s = emit, deadline_s
        self._sources: dict[str, TeacherSource] = {}
        self._fed: set[str] = set()
        self.checkpoint = checkpoint
        """The newest whole one."""
        self.by_teacher: dict[str, tuple[ActorHandle, ...]] = {}
        """Handles of the copies, by teacher."""

    @property
    def handles(self) -> tuple[ActorHandle, ...]:
        """All actors."""
        return tuple(handle for copies in self.by_teacher.values() for handle in copies)

    @property
    def following(self) -> tuple[ActorHandle, ...]:
        """Those that hold current weights of the policy and pull the next ones."""
        return tuple(handle for handle in self.handles if handle.name in self._fed)

    async def spawn(self) -> None:
        """Start all actors; each has yet to read its weights."""
        for arguments in self._arguments:
            source = arguments.source
            copies = []
            for slot in range(source.options.num_workers):
                name = f"teacher-{source.name}-{slot}"
                copies.append(
                    await self._runtime.spawn(
                        Role.TEACHER,
                        name,
                        Teacher,
                        slot=slot,
                        plan=teacher_plan(source.name),
                        name=name,
                        source=source,
                        vocab_size=arguments.vocab_size,
                    )
                )
                self._sources[name] = source
            self.by_teacher[source.name] = tuple(copies)

    async def feed_all(self) -> None:
        """Give every fresh teacher that follows the policy its weights."""
        await asyncio.gather(*(self.feed(handle) for handle in self.handles))

    def lose(self, handle: ActorHandle) -> None:
        """A teacher is gone, or about to be replaced: it follows nothing until it is fed."""
        self._fed.discard(handle.name)

    async def feed(self, handle: ActorHandle) -> None:
        """Give a fresh teacher what it had at the last checkpoint, then the newest weights.

        One that was only slow to answer still has its weights, and keeps them.

        Raises:
            WeightError, CheckpointError: they do not fit.
            ActorLostError, DeadlineError: of the teacher.
        """
        source = self._sources[handle.name]
        if not source.follows_policy:
            return
        self.lose(handle)
        if source.keeps_average and await self._version(handle) is None:
            await self._restore(handle)
        pulled: Published | None = None
        while pulled is not self._weights.newest:
            pulled = self._weights.newest
            await self.pull(handle)
        self._fed.add(handle.name)

    async def follow(self, handle: ActorHandle) -> None:
        """Have one teacher pull the newest weights; see `pull`.

        NOTE: one that died and came back unnoticed has none, and an average must not begin anew here: it waits for
        `feed`.
        """
        if await self._version(handle) is not None:
            await self.pull(handle)

    async def pull(self, handle: ActorHandle) -> None:
        """Have one teacher pull the newest weights.

        Raises:
            WeightError: they do not fit, or it does not report them.
            ActorLostError, DeadlineError: of the teacher.
        """
        report = await self._weights.pull(handle)
        seconds = round(report.seconds, 4)
        self._say(
            EventKind.WEIGHTS_PULLED, handle.name, version=report.version, checksum=report.checksum, seconds=seconds
        )

    async def save(self, folder: Path) -> bool:
        """Have the averages written into a folder; a teacher that is being replaced is waited for.

        Returns:
            Whether there is anything in it.

        Raises:
            CheckpointError: it cannot be written.
            ActorLostError, DeadlineError: of the teacher, when it does not come back in time.
        """
        averaged = [name for name, source in self._sources.items() if source.keeps_average]
        if not averaged:
            return False
        [first, *_] = self.by_teacher[self._sources[averaged[0]].name]
        end = time.monotonic() + self._deadline_s
        while True:
            try:
                # One without weights, or with those of the last checkpoint only, has nothing that may be kept.
                if first.name in self._fed and await self._version(first) is not None:
                    saved: bool = await first.call("save", str(folder), deadline_s=self._deadline_s)
                    return saved
                missing: ActorLostError | DeadlineError = DeadlineError(
                    f"{first.name} must have its weights within {self._deadline_s:g} s (runtime.pull_deadline_s) for "
                    "a checkpoint, but has none."
                )
            except ActorLostError as error:
                missing = error
            if time.monotonic() >= end:
                raise missing
            await waits.pause(_PAUSE_S)

    async def _version(self, handle: ActorHandle) -> int | None:
        """Of the weights that a teacher holds; None without any."""
        health: Health = await handle.call("health", deadline_s=self._deadline_s)
        return health.version

    async def _restore(self, handle: ActorHandle) -> None:
        if self.checkpoint is None:
            return
        folder = Path(self.checkpoint) / FOLDER
        await handle.call("restore", str(folder), deadline_s=self._deadline_s)
        held, newest = await self._version(handle), self._weights.newest
        if held is not None and newest is not None and newest.identity.version > held + 1:
            self._say(
                EventKind.WARNING,
                handle.name,
                detail=f"its average goes on from version {held}; version {newest.identity.version} stands in for "
                "those between",
            )

    def _say(self, kind: EventKind, actor: str, /, **detail: object) -> None:
        self._emit(Event.now(kind, actor, **detail))
