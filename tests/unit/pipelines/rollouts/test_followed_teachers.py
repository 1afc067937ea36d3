"""Teachers among the actors on a fake runtime: who is fed, who follows, and when."""

import asyncio
from pathlib import Path

import pytest

from fakes import health
from rollout_actor_stage import Stage, Weighing
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import TeacherConfig, TeacherKind, TeacherOptions, TeacherSource, TeacherWeights
from trl_ray.errors import ActorLostError, DeadlineError, WeightError
from trl_ray.runtime.runtime import Role
from trl_ray.types import ActorReport, EventKind


def teacher(kind, *, copies=1):
    """One teacher, as those who start actors are told of it."""
    external = kind is TeacherKind.EXTERNAL
    options = TeacherOptions(model_name_or_path="models/far", num_workers=copies) if external else None
    return TeacherSource(
        name=kind.value,
        kind=kind,
        model=ModelConfig(),
        options=options or TeacherConfig(num_workers=copies),
        weights=None if external else TeacherWeights(teacher_model_kind=kind),
    )


def test_teachers_are_started_before_the_workers_that_hold_their_handles_and_fed_before_these_begin():
    stage = Stage(teachers=[teacher(TeacherKind.EMA, copies=2)])
    asyncio.run(stage.actors.start())
    copies = ["teacher-ema-0", "teacher-ema-1"]
    assert stage.runtime.log == [
        *(f"spawn {name}" for name in ("queue", "learner", *copies, "rollout-0")),
        *(f"{name} pull 0" for name in (*copies, "rollout-0")),
        "rollout-0 start",
    ]
    assert stage.watched() == ["learner", "queue", "rollout-0", *copies]
    given = stage.runtime.given["teacher-ema-1"]
    assert (given["role"], given["slot"], given["plan"], given["vocab_size"]) == (Role.TEACHER, 1, "teacher ema", 9)
    handles = tuple(stage.runtime.handles[name] for name in copies)
    assert stage.runtime.given["rollout-0"]["teachers"] == {"ema": handles}


@pytest.mark.parametrize(
    ("kind", "follows"),
    [(TeacherKind.EMA, True), (TeacherKind.LIVE, True), (TeacherKind.BASE, False), (TeacherKind.EXTERNAL, False)],
)
def test_only_averaged_and_live_teachers_pull_what_is_published(kind, follows):
    async def run():
        await stage.actors.start()
        for step in (1, 2):
            stage.runtime.published = step
            await stage.actors.publish(step=step)
            await stage.actors.pull()

    stage = Stage(teachers=[teacher(kind, copies=2)])
    asyncio.run(run())
    for name in (f"teacher-{kind.value}-0", f"teacher-{kind.value}-1"):
        pulled = [call.args[0].version for call in stage.runtime.handles[name].asked("pull")]
        assert pulled == ([0, 1, 2] if follows else [])


def test_a_run_that_goes_on_gives_averages_back_and_nothing_to_others():
    sources = [teacher(kind) for kind in (TeacherKind.EMA, TeacherKind.LIVE, TeacherKind.BASE)]
    stage = Stage(teachers=sources, checkpoint="run/step-4")
    stage.runtime.published = 4
    asyncio.run(stage.actors.start())
    told = [line for line in stage.runtime.log if line.startswith("teacher")]
    assert sorted(told) == [
        "teacher-ema-0 pull 4",
        f"teacher-ema-0 restore {Path('run/step-4/teacher')}",
        "teacher-live-0 pull 4",
    ]
    assert told.index(f"teacher-ema-0 restore {Path('run/step-4/teacher')}") < told.index("teacher-ema-0 pull 4")


def test_one_copy_saves_the_average_of_all():
    async def run(kind):
        stage = Stage(teachers=[teacher(kind, copies=2)])
        await stage.start()
        saved = await stage.actors.teachers.save(Path("draft"))
        return saved, stage.runtime.log

    assert asyncio.run(run(TeacherKind.EMA)) == (True, ["teacher-ema-0 save draft"])
    assert asyncio.run(run(TeacherKind.LIVE)) == (False, [])
    assert asyncio.run(run(TeacherKind.EXTERNAL)) == (False, [])


def test_weights_published_while_a_teacher_is_fed_are_pulled_before_it_follows():
    async def run():
        await stage.start()
        fed = stage.runtime.handles["teacher-live-0"]
        plain = fed.answers["pull"]

        async def publishes_meanwhile(shared, check):
            if shared.version == 0:
                stage.runtime.published = 1
                await stage.actors.publish(step=1)
                await stage.actors.pull()
            return plain(shared, check)

        fed.answers["pull"] = publishes_meanwhile
        await stage.lose("teacher-live-0")

    stage = Stage(teachers=[teacher(TeacherKind.LIVE)])
    asyncio.run(run())
    # The own pull of the actors finds no teacher that follows; the one being fed pulls again by itself.
    assert [line for line in stage.runtime.log if "teacher" in line] == [
        "teacher-live-0 pull 0",
        "teacher-live-0 pull 1",
    ]
    assert [handle.name for handle in stage.actors.teachers.following] == ["teacher-live-0"]


def test_a_teacher_that_was_born_again_is_fed_from_the_newest_checkpoint():
    async def run():
        await stage.start()
        stage.actors.teachers.checkpoint = "run/step-4"
        lost = stage.runtime.handles["teacher-ema-0"]
        lost.answers |= Weighing(pid=99).answers
        await stage.lose("teacher-ema-0")

    stage = Stage(teachers=[teacher(TeacherKind.EMA)])
    asyncio.run(run())
    assert [line for line in stage.runtime.log if "teacher" in line] == [
        f"teacher-ema-0 restore {Path('run/step-4/teacher')}",
        "teacher-ema-0 pull 0",
    ]
    assert stage.told(EventKind.ACTOR_RESTARTED)[0][1]["pid"] == 99
    assert "teacher-ema-0" in stage.watched()


def test_a_teacher_that_came_back_between_two_probes_is_fed_again():
    async def run():
        await stage.start()
        stage.runtime.handles["teacher-live-0"].answers |= Weighing(pid=98).answers
        [watched] = [each for each in stage.actors.supervisor.watched if each.handle.name == "teacher-live-0"]
        await stage.actors._on_reborn(watched, health(pid=98))

    stage = Stage(teachers=[teacher(TeacherKind.LIVE)])
    asyncio.run(run())
    assert stage.runtime.log == ["teacher-live-0 pull 0"]


@pytest.mark.parametrize("error", [ActorLostError("gone"), DeadlineError("silent"), WeightError("another manifest")])
def test_a_teacher_that_cannot_pull_is_replaced_and_the_others_go_on(error):
    async def run():
        await stage.start()
        first = stage.runtime.handles["teacher-live-0"]
        plain = first.answers["pull"]
        calls = []

        def fails_once(shared, check):
            calls.append(shared.version)
            return error if len(calls) == 1 else plain(shared, check)

        first.answers["pull"] = fails_once
        stage.runtime.published = 1
        await stage.actors.publish(step=1)
        await stage.pull()

    stage = Stage(teachers=[teacher(TeacherKind.LIVE, copies=2)])
    asyncio.run(run())
    assert [name for name, _ in stage.told(EventKind.ACTOR_LOST)] == ["teacher-live-0"]
    assert [handle.name for handle in stage.actors.teachers.following] == ["teacher-live-0", "teacher-live-1"]
    pulled = [call.args[0].version for call in stage.runtime.handles["teacher-live-1"].asked("pull")]
    assert pulled == [0, 1]


def test_a_teacher_is_drained_and_dismissed_like_the_others():
    async def run():
        await stage.start()
        stage.runtime.handles["teacher-base-0"].answers["drain"] = ActorReport(spans=["span"])
        drained = await stage.actors.drain()
        await stage.actors.dismiss()
        return drained

    stage = Stage(teachers=[teacher(TeacherKind.BASE)])
    assert asyncio.run(run()).spans == ["span"]
    assert "end teacher-base-0" in stage.runtime.log and stage.watched() == []
