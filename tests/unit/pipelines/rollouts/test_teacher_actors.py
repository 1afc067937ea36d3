"""Teachers on a fake runtime: who is fed with what, who follows, and whose average goes into a checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeHandle, health, until
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import TeacherConfig, TeacherKind, TeacherSource, TeacherWeights
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.pipelines.rollouts.teacher_actors import TeacherActors, TeacherArguments
from trl_ray.runtime.runtime import Role
from trl_ray.runtime.weights import WeightTransport
from trl_ray.types import Event, PullReport, WeightVersion


class FakeTeacher:
    """What a teacher holds: nothing, or a version; `down` is what every call of it raises."""

    def __init__(self, *, kept: int) -> None:
        self.kept = kept
        self.version: int | None = None
        self.down: Exception | None = None
        self.log: list[str] = []
        answers = {name: getattr(self, f"_{name}") for name in ("health", "pull", "restore", "save")}
        self.handle = FakeHandle(name="teacher-ema-0", role=Role.TEACHER, answers=answers)

    def _health(self) -> Any:
        return self.down or replace(health(), version=self.version)

    def _pull(self, shared: WeightVersion, check: object) -> Any:
        self.log.append(f"pull {shared.version}")
        self.version = shared.version
        return self.down or PullReport(version=shared.version, checksum=shared.checksum, seconds=0.1)

    def _restore(self, folder: str) -> Any:
        self.log.append(f"restore {folder}")
        self.version = self.kept
        return self.down

    def _save(self, folder: str) -> Any:
        self.log.append(f"save {self.version}")
        return self.down or True


class FakeRuntime:
    def __init__(self, handle: FakeHandle) -> None:
        self._handle = handle

    async def spawn(self, *args: Any, **kwargs: Any) -> FakeHandle:
        return self._handle


class Stage:
    """One averaged teacher, behind a learner that has published up to version 7."""

    def __init__(self, *, kept: int = 4, checkpoint: str | None = "run/step-4", deadline_s: float = 60.0) -> None:
        self.teacher, self.events = FakeTeacher(kept=kept), list[Event]()
        ids = np.arange(2, dtype=np.int32)
        self.weights = WeightTransport(weight_check_ids=ids, weight_check_every=0, deadline_s=60)
        source = TeacherSource(
            name="ema", kind=TeacherKind.EMA, model=ModelConfig(), options=TeacherConfig(), weights=TeacherWeights()
        )
        self.actors = TeacherActors(
            runtime=FakeRuntime(self.teacher.handle),  # type: ignore[arg-type]
            arguments=[TeacherArguments(source=source, vocab_size=9)],
            weights=self.weights,
            emit=self.events.append,
            checkpoint=checkpoint,
            deadline_s=deadline_s,
        )

    async def publish(self, version: int) -> None:
        identity = WeightVersion(version=version, checksum=f"c{version}")
        learner = FakeHandle(name="learner", role=Role.LEARNER, answers={"publish": identity, "identity": identity})
        await self.weights.publish(learner, step=version)

    async def start(self) -> None:
        await self.actors.spawn()
        await self.publish(7)

    @property
    def warnings(self) -> list[str]:
        return [str(event.detail["detail"]) for event in self.events if event.kind == "warning"]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.mark.parametrize(("kept", "missed"), [(4, True), (5, True), (6, False), (7, False)])
def test_a_fresh_teacher_gets_its_average_then_the_newest_weights_and_tells_of_versions_between(
    kept: int, missed: bool
) -> None:
    async def scenario() -> None:
        stage = Stage(kept=kept)
        await stage.start()
        await stage.actors.feed_all()
        assert stage.teacher.log == [f"restore {Path('run/step-4/teacher')}", "pull 7"]
        assert stage.actors.following == (stage.teacher.handle,)
        says = [f"its average goes on from version {kept}; version 7 stands in for those between"]
        assert stage.warnings == (says if missed else [])

    run(scenario())


def test_a_teacher_that_was_only_slow_keeps_its_average() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.start()
        stage.teacher.version = 6
        await stage.actors.feed(stage.teacher.handle)
        assert stage.teacher.log == ["pull 7"]

    run(scenario())


def test_a_teacher_that_came_back_unnoticed_begins_no_average_of_its_own() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.start()
        await stage.actors.feed_all()
        stage.teacher.version = None
        stage.teacher.log.clear()
        await stage.publish(8)
        await stage.actors.follow(stage.teacher.handle)
        assert stage.teacher.log == []
        await stage.actors.feed(stage.teacher.handle)
        await stage.publish(9)
        await stage.actors.follow(stage.teacher.handle)
        assert stage.teacher.log == [f"restore {Path('run/step-4/teacher')}", "pull 8", "pull 9"]

    run(scenario())


def test_a_lost_teacher_follows_nothing_until_it_is_fed() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.start()
        await stage.actors.feed_all()
        stage.actors.lose(stage.teacher.handle)
        assert stage.actors.following == ()

    run(scenario())


def test_a_checkpoint_waits_for_a_teacher_that_is_being_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ray.pipelines.rollouts.teacher_actors._PAUSE_S", 0.001)

    async def scenario() -> None:
        stage = Stage()
        teacher = stage.teacher
        await stage.start()
        await stage.actors.feed_all()
        teacher.down = ActorLostError("it died")
        saving = asyncio.create_task(stage.actors.save(Path("draft")))
        await until(lambda: len(teacher.handle.asked("health")) > 5)
        # It is there again, at first without any weights, then with those of the checkpoint before.
        teacher.down, teacher.version = None, None
        asked = len(teacher.handle.asked("health"))
        await until(lambda: len(teacher.handle.asked("health")) > asked + 2)
        stage.actors.lose(teacher.handle)
        teacher.version = 4
        await asyncio.sleep(0.01)
        assert not saving.done()
        await stage.actors.feed(teacher.handle)
        assert await saving
        assert [entry for entry in teacher.log if entry.startswith("save")] == ["save 7"]

    run(scenario())


@pytest.mark.parametrize("down", [ActorLostError("it died"), None])
def test_a_checkpoint_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, down: Exception | None) -> None:
    monkeypatch.setattr("trl_ray.pipelines.rollouts.teacher_actors._PAUSE_S", 0.001)

    async def scenario() -> None:
        stage = Stage(deadline_s=0.05)
        await stage.start()
        await stage.actors.feed_all()
        stage.teacher.down, stage.teacher.version = down, None
        with pytest.raises((ActorLostError, DeadlineError), match=r"it died|must have its weights within 0\.05 s"):
            await stage.actors.save(Path("draft"))

    run(scenario())
