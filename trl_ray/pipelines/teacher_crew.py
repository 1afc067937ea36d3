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
from trl_ray.config.teachers import TeacherKind, TeacherSource
from trl_ray.models.checkpoint import checkpoint_step
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime, teacher_plan
from trl_ray.runtime.weights import Published, WeightTransport
from trl_ray.types import Event, EventKind

FOLDER = "teacher"
"""Of a teacher's state, below a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherArguments:
    """What the actors of one teacher are told, beside their names."""

    source: TeacherSource
    vocab_size: int
    """Entries of the vocabulary that student and teacher share."""


class TeacherCrew:
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

    async def feed(self, handle: ActorHandle) -> None:
        """Give a fresh teacher what it had at the last checkpoint, then the newest weights.

        Raises:
            WeightError, CheckpointError: they do not fit.
            ActorLostError, DeadlineError: of the teacher.
        """
        source = self._sources[handle.name]
        if not source.follows_policy:
            return
        self._fed.discard(handle.name)
        if source.kind is TeacherKind.EMA:
            await self._restore(handle)
        pulled: Published | None = None
        while pulled is not self._weights.newest:
            pulled = self._weights.newest
            await self.pull(handle)
        self._fed.add(handle.name)

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
        """Have the averages written into a folder.

        Returns:
            Whether there is anything in it.

        Raises:
            CheckpointError: it cannot be written.
        """
        saved = False
        for source in self._sources.values():
            if source.kind is TeacherKind.EMA and not saved:
                first = self.by_teacher[source.name][0]
                saved = await first.call("save", str(folder), deadline_s=self._deadline_s)
        return saved

    async def _restore(self, handle: ActorHandle) -> None:
        if self.checkpoint is None:
            return
        folder = Path(self.checkpoint) / FOLDER
        await handle.call("restore", str(folder), deadline_s=self._deadline_s)
        step, newest = checkpoint_step(folder.parent), self._weights.newest
        if newest is not None and newest.identity.version > step:
            self._say(
                EventKind.WARNING,
                handle.name,
                detail=f"its average goes on from step {step}; version {newest.identity.version} stands in for those "
                "between",
            )

    def _say(self, kind: EventKind, actor: str, /, **detail: object) -> None:
        self._emit(Event(kind=kind, actor=actor, time=time.time(), detail=detail))
