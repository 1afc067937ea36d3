"""The actors on a fake runtime: who is ended, told, started and refitted, and in which order."""

import asyncio

import pytest

from fakes import health, in_turn
from rollout_actor_stage import Stage, report, version
from trl_ray.actors.rollout_worker import PullReport
from trl_ray.config.reward_model_options import RewardModelOptions
from trl_ray.errors import (
    ActorLostError,
    DeadlineError,
    EngineError,
    LearnerLostError,
    RunError,
    StartError,
    WeightError,
)
from trl_ray.runtime.runtime import Role
from trl_ray.types import ActorReport, EventKind
from virtual_time import run_in_virtual_time


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
def test_a_learner_that_does_not_come_up_is_lost_and_so_may_restart(ranks, name, method):
    stage = Stage(ranks=ranks)
    stage.runtime.script = {name: {method: DeadlineError("silent")}}
    with pytest.raises(LearnerLostError, match="silent"):
        asyncio.run(stage.actors.start())


def test_a_learner_whose_constructor_raises_fails_the_start_for_good():
    stage = Stage()
    stage.runtime.script = {"learner": {"health": StartError("learner could not start: no such model")}}
    with pytest.raises(StartError, match="no such model"):
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
        "queue lose_worker rollout-0",
        "end rollout-0",
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
    run_in_virtual_time(run())
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
    run_in_virtual_time(run())
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
        await stage.pull()

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
