"""The actors on a fake runtime: who is ended, told, started and refitted, and in which order."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeHandle, health, in_turn
from trl_ray.actors.rollout_worker import PullReport
from trl_ray.config.reward_model_options import RewardModelOptions
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import TeacherConfig, TeacherKind, TeacherOptions, TeacherSource, TeacherWeights
from trl_ray.errors import ActorLostError, DeadlineError, EngineError, LearnerLostError, RunError, WeightError
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.pipelines.rollouts.rollout_actors import ActorArguments, RolloutActors
from trl_ray.pipelines.rollouts.teacher_actors import TeacherArguments
from trl_ray.runtime.runtime import Role
from trl_ray.types import ActorReport, EventKind, WeightCheck, WeightVersion


def version(number):
    return WeightVersion(version=number, checksum=f"c{number}")


class FakeRuntime:
    """Hands out fake handles; `script` says how an actor of a name answers, `log` what happened in order."""

    def __init__(self):
        self.handles, self.log, self.script, self.given = {}, [], {}, {}
        self.published = 0

    async def spawn(self, role, name, cls, /, *, slot=0, **kwargs):
        self.log.append(f"spawn {name}")
        self.given[name] = {"role": role, "slot": slot, **kwargs}
        made = LoggedHandle(name=name, role=role, runtime=self)
        made.answers = {"health": health(pid=len(self.handles) + 1), "drain": ActorReport(), **self.defaults(role)}
        made.answers |= self.script.get(name, {})
        self.handles[name] = made
        return made

    def defaults(self, role):
        if role is Role.LEARNER:
            return {
                "publish": lambda: version(self.published),
                "identity": lambda: version(self.published),
                "weight_check": lambda ids, **further: WeightCheck(
                    token_ids=ids, logprobs=np.zeros(2, np.float32), version=self.published
                ),
            }
        if role is Role.ROLLOUT:
            return {"pull": lambda shared, check: report(shared, check)}
        return Weighing(pid=len(self.handles) + 1).answers if role is Role.TEACHER else {}

    async def kill(self, handle):
        self.log.append(f"kill {handle.name}")

    async def end(self, handle):
        self.log.append(f"end {handle.name}")

    def survives(self, role):
        return role in (Role.QUEUE, Role.REWARD, Role.REWARD_MODEL, Role.TEACHER)

    async def close(self):
        pass


class Weighing:
    """A teacher that knows which version it holds: none at first, 4 from a checkpoint, else what it pulled."""

    def __init__(self, *, pid):
        self.health = health(pid=pid)
        names = ("health", "pull", "restore", "save")
        self.answers = {name: getattr(self, f"_{name}") for name in names}

    def _health(self):
        return self.health

    def _pull(self, shared, check):
        self.health = replace(self.health, version=shared.version)
        return report(shared, None)

    def _restore(self, folder):
        self.health = replace(self.health, version=4)

    def _save(self, folder):
        return True


@dataclass(slots=True, kw_only=True, eq=False)
class LoggedHandle(FakeHandle):
    """Writes what matters for the order into the runtime's log."""

    runtime: FakeRuntime

    async def call(self, method, /, *args, deadline_s, **kwargs):
        if method in ("restore", "save"):
            self.runtime.log.append(f"{self.name} {method} {args[0]}")
        if method in ("pull", "start"):
            what = f" {args[0].version}" if method == "pull" else ""
            self.runtime.log.append(f"{self.name} {method}{what}")
        if method == "lose_worker":
            self.runtime.log.append(f"{self.name} lose_worker {kwargs['worker']}")
        return await FakeHandle.call(self, method, *args, deadline_s=deadline_s, **kwargs)


def report(shared, check):
    agrees = {"weight_check_mean": 0.0, "weight_check_max": 0.0} if check is not None else {}
    return PullReport(version=shared.version, checksum=shared.checksum, seconds=0.1, **agrees)


class Stage:
    """Rollout actors, their runtime and its events."""

    def __init__(self, *, workers=1, max_restarts=10, canary_every=1, models=(), teachers=(), checkpoint=None, ranks=1):
        self.runtime, self.events = FakeRuntime(), []
        config = GRPOConfig(
            rollout={"num_workers": workers, "canary_every": canary_every},
            runtime={"max_restarts": max_restarts, "num_learners": ranks},
        )
        arguments = ActorArguments(
            learner={} if checkpoint is None else {"checkpoint": checkpoint},
            queue={},
            rollout={},
            reward={} if not teachers else None,
            reward_models=tuple(models),
            teachers=tuple(TeacherArguments(source=source, vocab_size=9) for source in teachers),
        )
        self.actors = RolloutActors(
            runtime=self.runtime,
            config=config,
            arguments=arguments,
            weight_check_ids=np.arange(3, dtype=np.int32),
            emit=self.events.append,
        )

    async def start(self):
        await self.actors.start()
        self.runtime.log.clear()
        self.events.clear()

    async def lose(self, name, reason="it died"):
        """What the supervisor does when a probe fails."""
        [watched] = [each for each in self.actors.supervisor.watched if each.handle.name == name]
        await self.actors._on_lost(watched, reason)

    def told(self, kind):
        return [(event.actor, dict(event.detail)) for event in self.events if event.kind is kind]

    def watched(self):
        return sorted(each.handle.name for each in self.actors.supervisor.watched)


def test_workers_begin_only_after_they_have_pulled_what_the_learner_published():
    stage = Stage(workers=2)
    asyncio.run(stage.actors.start())
    assert stage.runtime.log == [
        *(f"spawn {name}" for name in ("queue", "learner", "reward-0", "rollout-0", "rollout-1")),
        "rollout-0 pull 0",
        "rollout-0 start",
        "rollout-1 pull 0",
        "rollout-1 start",
    ]
    assert stage.watched() == ["learner", "queue", "reward-0", "rollout-0", "rollout-1"]
    assert [handle.name for handle in stage.actors.working] == ["rollout-0", "rollout-1"]


def test_ranks_of_a_learner_meet_before_others_are_greeted_and_are_told_of_before_the_learner_as_a_whole():
    stage = Stage(ranks=2)
    stage.runtime.script = {f"learner-{rank}": {"address": "here"} for rank in (0, 1)}
    asyncio.run(stage.actors.start())
    started = [(actor, detail["pid"]) for actor, detail in stage.told(EventKind.ACTOR_STARTED)]
    assert started[:2] == [("learner-0", 2), ("learner-1", 3)]
    assert sorted(started[2:]) == [("learner", 2), ("queue", 1), ("reward-0", 4), ("rollout-0", 5)]
    assert stage.watched() == ["learner", "queue", "reward-0", "rollout-0"]
    assert [len(stage.runtime.handles[f"learner-{rank}"].asked("join")) for rank in (0, 1)] == [1, 1]


@pytest.mark.parametrize(("ranks", "name", "method"), [(1, "learner", "health"), (2, "learner-1", "join")])
def test_a_learner_that_does_not_come_up_fails_the_start_as_any_actor_does(ranks, name, method):
    stage = Stage(ranks=ranks)
    stage.runtime.script = {name: {method: DeadlineError("silent")}}
    with pytest.raises(DeadlineError, match="silent"):
        asyncio.run(stage.actors.start())


def test_what_actors_tell_is_gathered_from_the_queue_the_learner_those_who_score_and_the_workers_in_this_order():
    async def run():
        await stage.start()
        for name, handle in stage.runtime.handles.items():
            handle.answers["drain"] = ActorReport(events=[name])
        return await stage.actors.drain()

    stage = Stage(models=[JUDGE])
    assert asyncio.run(run()).events == ["queue", "learner", *COPIES, "reward-0", "rollout-0"]


def test_a_lost_worker_is_ended_its_leases_are_returned_and_another_pulls_before_it_starts():
    async def run():
        await stage.start()
        stage.runtime.published = 4
        await stage.actors.publish(step=4)
        await stage.lose("rollout-0")

    stage = Stage()
    asyncio.run(run())
    assert stage.runtime.log == [
        "end rollout-0",
        "queue lose_worker rollout-0",
        "spawn rollout-0+1",
        "rollout-0+1 pull 4",
        "rollout-0+1 start",
    ]
    assert stage.told(EventKind.ACTOR_LOST)[0][1]["reason"] == "it died"
    assert stage.told(EventKind.ACTOR_RESTARTED)[0][1]["replaces"] == "rollout-0"
    assert [handle.name for handle in stage.actors.working] == ["rollout-0+1"]
    assert stage.watched() == ["learner", "queue", "reward-0", "rollout-0+1"]


def test_names_count_up_from_the_first_so_that_none_is_used_twice():
    async def run():
        await stage.start()
        await stage.lose("rollout-0")
        await stage.lose("rollout-0+1")

    stage = Stage()
    asyncio.run(run())
    assert [line for line in stage.runtime.log if "spawn" in line] == ["spawn rollout-0+1", "spawn rollout-0+2"]


def test_weights_published_during_a_refit_are_pulled_before_the_start():
    async def run():
        await stage.start()

        async def publishes_meanwhile(shared, check):
            if shared.version == 0:
                stage.runtime.published = 1
                await stage.actors.publish(step=1)
            return report(shared, check)

        stage.runtime.script["rollout-0+1"] = {"pull": publishes_meanwhile}
        await stage.lose("rollout-0")

    stage = Stage()
    asyncio.run(run())
    assert stage.runtime.log[-3:] == ["rollout-0+1 pull 0", "rollout-0+1 pull 1", "rollout-0+1 start"]


def test_weights_published_while_a_worker_is_being_started_reach_it_too():
    async def run():
        await stage.start()

        async def publishes_meanwhile():
            stage.runtime.published = 1
            await stage.actors.publish(step=1)
            await stage.actors.pull()

        stage.runtime.script["rollout-0+1"] = {"start": publishes_meanwhile}
        await stage.lose("rollout-0")

    stage = Stage()
    asyncio.run(run())
    assert stage.runtime.log[-1] == "rollout-0+1 pull 1"


@pytest.mark.parametrize("error", [ActorLostError("gone"), DeadlineError("silent"), EngineError("half loaded")])
def test_a_worker_lost_while_it_is_refitted_is_tried_again_up_to_its_restarts(error):
    async def run():
        await stage.start()
        stage.runtime.script = {f"rollout-0+{number}": {"pull": error} for number in (1, 2)}
        await stage.lose("rollout-0")
        assert [handle.name for handle in stage.actors.working] == ["rollout-0+3"]
        with pytest.raises(RunError, match=r"3 times \(runtime.max_restarts\).*it died"):
            await stage.lose("rollout-0+3")

    stage = Stage(max_restarts=3)
    asyncio.run(run())
    assert [line for line in stage.runtime.log if "lose_worker" in line] == [
        f"queue lose_worker {name}" for name in ("rollout-0", "rollout-0+1", "rollout-0+2", "rollout-0+3")
    ]
    assert [name for name, _ in stage.told(EventKind.ACTOR_LOST)] == [
        f"rollout-0{suffix}" for suffix in ("", "+1", "+2", "+3")
    ]


def test_a_fresh_worker_that_disagrees_with_the_learner_ends_the_run():
    async def run():
        await stage.start()
        stage.runtime.script = {"rollout-0+1": {"pull": WeightError("weight check")}}
        with pytest.raises(WeightError, match="weight check"):
            await stage.lose("rollout-0")

    stage = Stage()
    asyncio.run(run())


def test_a_lost_learner_is_not_replaced_here():
    async def run():
        await stage.start()
        with pytest.raises(LearnerLostError, match="it died"):
            await stage.lose("learner")

    stage = Stage()
    asyncio.run(run())
    assert stage.runtime.log == [] and stage.events == []
    assert "learner" not in stage.watched()


@pytest.mark.parametrize("method", ["publish", "identity", "weight_check"])
def test_a_learner_that_does_not_publish_is_lost(method):
    async def run():
        await stage.start()
        stage.runtime.handles["learner"].answers[method] = DeadlineError(f"learner.{method} must answer")
        with pytest.raises(LearnerLostError, match=method):
            await stage.actors.publish(step=1)

    stage = Stage()
    asyncio.run(run())


def test_publishing_tells_version_and_checksum_and_takes_a_weight_check_when_one_is_due():
    async def run():
        await stage.actors.start()
        learner = stage.runtime.handles["learner"]
        for step in range(1, 6):
            stage.runtime.published = step
            assert await stage.actors.publish(step=step) == version(step)
            await stage.actors.pull()
        return len(learner.asked("weight_check"))

    stage = Stage(canary_every=2)
    # At the first publication, and after steps 2 and 4.
    assert asyncio.run(run()) == 3
    published = [(detail["version"], detail["checksum"]) for _, detail in stage.told(EventKind.WEIGHTS_PUBLISHED)]
    assert published == [(step, f"c{step}") for step in range(6)]
    assert [detail["version"] for _, detail in stage.told(EventKind.WEIGHTS_PULLED)] == list(range(6))
    assert [detail["version"] for _, detail in stage.told(EventKind.WEIGHT_CHECK)] == [0, 2, 4]


def test_a_worker_that_reports_other_weights_than_were_published_is_replaced():
    async def run():
        await stage.start()
        wrong = PullReport(version=1, checksum="other", seconds=0.1)
        stage.runtime.handles["rollout-1"].answers["pull"] = wrong
        stage.runtime.published = 1
        await stage.actors.publish(step=1)
        await stage.actors.pull()

    stage = Stage(workers=2)
    asyncio.run(run())
    assert {handle.name for handle in stage.actors.working} == {"rollout-0", "rollout-1+1"}
    [(actor, detail)] = [told for told in stage.told(EventKind.WEIGHT_CHECK) if not told[1]["agrees"]]
    assert (actor, "other" in detail["detail"]) == ("rollout-1", True)


def test_a_reward_worker_is_waited_for_and_killed_first_when_it_hangs():
    async def run():
        await stage.start()
        hanging = stage.runtime.handles["reward-0"]
        hanging.answers["health"] = in_turn(DeadlineError("silent"), health(pid=99))
        await stage.lose("reward-0", "silent")

    stage = Stage()
    asyncio.run(run())
    assert stage.runtime.log == ["kill reward-0"]
    assert stage.told(EventKind.ACTOR_RESTARTED)[0][1]["pid"] == 99
    assert "reward-0" in stage.watched()


JUDGE = {
    "options": RewardModelOptions(model_name_or_path="models/judge", num_workers=2, weight=3.0),
    "join_groups": True,
}
COPIES = ["reward-model-judge-0", "reward-model-judge-1"]


def test_reward_models_are_started_before_the_reward_workers_that_hold_their_handles():
    stage = Stage(models=[JUDGE])
    asyncio.run(stage.actors.start())
    spawned = [line.removeprefix("spawn ") for line in stage.runtime.log if line.startswith("spawn ")]
    assert spawned == ["queue", "learner", *COPIES, "reward-0", "rollout-0"]
    assert stage.watched() == ["learner", "queue", "reward-0", *COPIES, "rollout-0"]
    [model] = stage.runtime.given["reward-0"]["models"]
    assert model.handles == tuple(stage.runtime.handles[name] for name in COPIES)
    # Nine tenths of a lease: it gives up before whoever waits for it does.
    assert (model.name, model.weight, model.deadline_s) == ("judge", 3.0, 270.0)
    second = stage.runtime.given[COPIES[1]]
    assert (second["role"], second["slot"], second["plan"]) == (Role.REWARD_MODEL, 1, "reward_model judge")
    assert second["join_groups"] is True


def test_a_reward_model_is_drained_and_dismissed_like_the_others():
    async def run():
        await stage.start()
        stage.runtime.handles[COPIES[1]].answers["drain"] = ActorReport(spans=["span"])
        drained = await stage.actors.drain()
        await stage.actors.dismiss()
        return drained

    stage = Stage(models=[JUDGE])
    assert asyncio.run(run()).spans == ["span"]
    assert {f"end {name}" for name in COPIES} <= set(stage.runtime.log) and stage.watched() == []


def test_an_actor_that_asks_to_be_replaced_is_killed_and_waited_for_until_it_is_sound():
    async def run():
        await stage.start()
        stuck = stage.runtime.handles[COPIES[0]]
        sick = health(pid=5, problem="a pass hangs")
        stuck.answers["health"] = in_turn(sick, sick, ActorLostError("gone"), health(pid=99))
        await stage.lose(COPIES[0], "a pass hangs")

    stage = Stage(models=[JUDGE])
    asyncio.run(run())
    assert stage.runtime.log == [f"kill {COPIES[0]}"]
    assert stage.told(EventKind.ACTOR_RESTARTED)[0][1]["pid"] == 99
    assert COPIES[0] in stage.watched()


def test_an_actor_that_keeps_coming_back_by_itself_may_do_so_only_as_often_as_others():
    async def run():
        await stage.start()
        [watched] = [each for each in stage.actors.supervisor.watched if each.handle.name == "reward-0"]
        await stage.actors._on_reborn(watched, health(pid=98))
        with pytest.raises(RunError, match="max_restarts"):
            await stage.actors._on_reborn(watched, health(pid=99))

    stage = Stage(max_restarts=1)
    asyncio.run(run())


def test_what_a_lost_actor_had_gathered_is_missed_and_the_rest_is_drained():
    async def run():
        await stage.start()
        gathered = ActorReport(events=["event"], spans=["span"])
        stage.runtime.handles["queue"].answers["drain"] = ActorLostError("gone")
        stage.runtime.handles["rollout-0"].answers["drain"] = gathered
        return await stage.actors.drain()

    stage = Stage()
    drained = asyncio.run(run())
    assert (drained.events, drained.spans) == (["event"], ["span"])


def test_dismissing_ends_every_actor_replaced_ones_once():
    async def run():
        await stage.start()
        await stage.lose("rollout-0")
        stage.runtime.log.clear()
        await stage.actors.dismiss()

    stage = Stage()
    asyncio.run(run())
    assert sorted(stage.runtime.log) == ["end learner", "end queue", "end reward-0", "end rollout-0+1"]
    assert stage.watched() == []


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
        await stage.actors.pull()

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


def test_an_engine_that_may_disagree_is_told_of_and_works_on_and_is_evidence():
    async def run():
        await stage.start()
        wrong = PullReport(
            version=1,
            checksum="c1",
            seconds=0.1,
            weight_check_mean=0.05,
            weight_check_max=0.5,
            own_files_mean=0.01,
            disagreement="experts stay as they were",
        )
        stage.runtime.handles["rollout-0"].answers["pull"] = wrong
        stage.runtime.published = 1
        await stage.actors.publish(step=1)
        await stage.actors.pull()

    stage = Stage()
    asyncio.run(run())
    [(_, told)] = stage.told(EventKind.WEIGHT_CHECK)
    assert (told["agrees"], told["mean"]) == (False, 0.05)
    assert [detail["detail"] for _, detail in stage.told(EventKind.WARNING)] == ["experts stay as they were"]
    assert stage.actors.evidence == Evidence(weights=0.05, own_files=0.01)


def test_what_was_seen_at_version_0_goes_into_checkpoints_and_along_with_later_checks():
    async def run():
        await stage.actors.start()
        state = stage.actors.weights.state_dict()
        again = Stage()
        again.actors.weights.load_state_dict(state)
        again.runtime.published = 5
        await again.actors.start()
        [pull] = again.runtime.handles["rollout-0"].asked("pull")
        return state, pull.args[1]

    stage = Stage()
    state, check = asyncio.run(run())
    assert state == {"initial_logprobs": [0.0, 0.0], "baseline": 0.0}
    assert (check.version, check.baseline, list(check.initial_logprobs)) == (5, 0.0, [0.0, 0.0])
