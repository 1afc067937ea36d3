"""A worker that is lost, late or short of room, and a run that goes on without it."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from fakes import health, in_turn, until
from rollout_actor_stage import Stage, report
from trl_ray.errors import ActorLostError, AnswerLostError, ConfigError, LearnerLostError, ResourceError, RunError
from trl_ray.runtime import waits
from trl_ray.types import ActorReport, EventKind
from virtual_time import run_in_virtual_time


@asynccontextmanager
async def watched(stage):
    """The task that watches over the actors, which are started, and what is told of waits among their events."""
    with waits.heard_by(stage.events.append):
        await stage.start()
        watch = asyncio.create_task(stage.actors.supervisor.run())
        try:
            yield watch
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


def working(stage):
    return sorted(handle.name for handle in stage.actors.working)


def waited_for(stage):
    return [detail["on"] for _, detail in stage.told(EventKind.WAITING)]


async def publish(stage, step):
    stage.runtime.published = step
    await stage.actors.publish(step=step)


def test_a_worker_lost_in_a_pull_holds_nobody_though_no_node_has_room_for_another_and_that_is_told():
    async def run():
        async with watched(stage):
            stage.runtime.full = {1}
            stage.runtime.handles["rollout-1"].answers["pull"] = ActorLostError("its node is gone")
            await publish(stage, 1)
            await stage.actors.pull()
            assert working(stage) == ["rollout-0"]
            await asyncio.sleep(300)
            assert waited_for(stage)[0] == "a node with room for rollout-1" and len(waited_for(stage)) > 3
            stage.runtime.full = set()
            await asyncio.sleep(1)
            assert working(stage) == ["rollout-0", "rollout-1+1"]

    stage = Stage(workers=2)
    run_in_virtual_time(run())
    assert [name for name, _ in stage.told(EventKind.ACTOR_LOST)] == ["rollout-1"]
    # Waiting for room costs nothing: the one restart was immediate.
    assert stage.actors._lost.budget("rollout-1").used == 1


def test_a_worker_whose_pull_takes_far_longer_than_anothers_is_set_aside_and_comes_back_by_itself():
    async def run():
        pulled = asyncio.Event()

        async def pulls_late(shared, check):
            await pulled.wait()
            return report(shared, check)

        async with watched(stage):
            loop = asyncio.get_running_loop()
            stage.runtime.handles["rollout-1"].answers["pull"] = pulls_late
            for step in (1, 2):
                await publish(stage, step)
                begin = loop.time()
                await stage.actors.pull()
                # Nobody waits for it a second time.
                assert round(loop.time() - begin) == (15 if step == 1 else 0)
                assert working(stage) == ["rollout-0"]
            pulled.set()
            await asyncio.sleep(1)
            assert working(stage) == ["rollout-0", "rollout-1"]

    stage = Stage(workers=2)
    run_in_virtual_time(run())
    assert stage.told(EventKind.ACTOR_LOST) == []
    assert waited_for(stage) == ["rollout-1.pull"]
    # What was published meanwhile, it pulled too.
    assert stage.runtime.log[-1] == "rollout-1 pull 2"


def test_the_only_worker_is_waited_for_however_long_it_pulls():
    async def run():
        async def pulls_late(shared, check):
            await asyncio.sleep(400)
            return report(shared, check)

        async with watched(stage):
            stage.runtime.handles["rollout-0"].answers["pull"] = pulls_late
            await publish(stage, 1)
            await stage.actors.pull()
            assert working(stage) == ["rollout-0"]

    stage = Stage()
    run_in_virtual_time(run())
    assert waited_for(stage) == ["rollout-0 to pull weights"] * 4  # after 30, 60, 120 and 240 s


def test_weights_that_went_with_the_learners_node_cost_no_worker():
    async def run():
        async with watched(stage):
            stage.runtime.handles["rollout-0"].answers["pull"] = AnswerLostError("the object is lost")
            await publish(stage, 1)
            with pytest.raises(LearnerLostError, match="rollout-0 was to pull are lost"):
                await stage.actors.pull()

    stage = Stage()
    run_in_virtual_time(run())
    assert stage.told(EventKind.ACTOR_LOST) == []


def test_where_others_work_a_worker_that_is_lost_too_often_waits_for_progress_and_ends_nothing():
    async def run():
        async with watched(stage):
            for name in ("rollout-1", "rollout-1+1"):
                stage.actors.supervisor.report(name, "it died")
                await asyncio.sleep(100)
            assert working(stage) == ["rollout-0"]
            await publish(stage, 5)
            await asyncio.sleep(100)
            assert working(stage) == ["rollout-0", "rollout-1+2"]

    stage = Stage(workers=2, max_restarts=1)
    run_in_virtual_time(run())
    assert "5 finished steps to restart rollout-1" in waited_for(stage)[0]


def test_a_worker_for_which_there_was_no_room_at_the_start_joins_when_there_is():
    async def run():
        stage.runtime.full = {1}
        async with watched(stage):
            assert working(stage) == ["rollout-0"]
            await publish(stage, 3)
            stage.runtime.full = set()
            await asyncio.sleep(5)
            assert working(stage) == ["rollout-0", "rollout-1"]
        assert stage.runtime.log[-3:] == ["spawn rollout-1", "rollout-1 pull 3", "rollout-1 start"]

    stage = Stage(workers=2)
    run_in_virtual_time(run())
    assert stage.told(EventKind.ACTOR_LOST) == []


def test_an_actor_that_was_only_slow_costs_no_restart():
    async def run():
        async with watched(stage):
            pid = stage.runtime.handles["reward-0"].answers["health"].pid
            stage.actors.supervisor.report("reward-0", "it was unavailable")
            await asyncio.sleep(1)
            return pid

    stage = Stage(max_restarts=0)
    pid = run_in_virtual_time(run())
    assert stage.runtime.log == []
    [(_, told)] = stage.told(EventKind.ACTOR_RESTARTED)
    assert (told["pid"], told["same_process"]) == (pid, True)
    assert "reward-0" in stage.watched()


def test_an_actor_that_hangs_is_killed_without_a_second_deadline():
    async def run():
        async with watched(stage):
            loop = asyncio.get_running_loop()
            hangs = stage.runtime.handles["reward-0"]
            [its] = [each for each in stage.actors.supervisor.watched if each.handle is hangs]
            its.is_silent = True
            begin = loop.time()
            hangs.answers["health"] = in_turn(health(pid=99))
            stage.actors.supervisor.report("reward-0", "silent")
            await until(lambda: bool(stage.told(EventKind.ACTOR_RESTARTED)))
            return loop.time() - begin

    stage = Stage()
    assert asyncio.run(run()) < 1
    assert stage.runtime.log == ["kill reward-0"]


def test_events_of_an_actor_that_hangs_hold_nobody_and_come_later():
    async def run():
        released = asyncio.Event()

        async def hangs():
            await released.wait()
            return ActorReport(events=["late"])

        async with watched(stage):
            loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
            stage.runtime.handles["rollout-0"].answers["drain"] = hangs
            stage.runtime.handles["queue"].answers["drain"] = ActorReport(events=["first"])
            drained = [await stage.actors.drain(), await stage.actors.drain()]
            assert round(loop.time() - begin) == 1
            released.set()
            await asyncio.sleep(0.1)
            return [*drained, await stage.actors.drain()]

    stage = Stage()
    assert [each.events for each in run_in_virtual_time(run())] == [["first"], ["first"], ["late", "first"]]


def test_a_worker_that_is_lost_too_often_waits_while_another_one_that_may_be_restarted_comes_back():
    async def run():
        stage.runtime.script["rollout-1+1"] = {"health": loads}
        async with watched(stage) as watch:

            async def lose(*names):
                for name in names:
                    stage.actors.supervisor.report(name, "it died")
                    await asyncio.sleep(10)

            await lose("rollout-0", "rollout-0+1", "rollout-0+2", "rollout-0+3", "rollout-1")
            assert (working(stage), watch.done()) == ([], False)  # the one waits for steps, the other one loads
            await asyncio.sleep(60)
            await lose("rollout-1+1", "rollout-1+2")  # the last restart begins with a pause
            assert (working(stage), watch.done()) == (["rollout-1+3"], False)
            await lose("rollout-1+3")
            with pytest.raises(RunError, match=r"rollout-\d may be restarted 3 times"):
                watch.result()

    async def loads():
        await asyncio.sleep(30)
        return health(pid=9)

    stage = Stage(workers=2, max_restarts=3)
    run_in_virtual_time(run())


def test_a_worker_that_is_set_aside_is_one_that_may_yet_make_progress():
    async def run():
        async def pulls_late(shared, check):
            await asyncio.sleep(100)
            return report(shared, check)

        async with watched(stage) as watch:
            stage.runtime.handles["rollout-1"].answers["pull"] = pulls_late
            await publish(stage, 1)
            await stage.actors.pull()
            assert working(stage) == ["rollout-0"]
            stage.actors.supervisor.report("rollout-0", "it died")
            await asyncio.sleep(10)
            assert (working(stage), watch.done()) == ([], False)
            await asyncio.sleep(100)
            assert (working(stage), watch.done()) == (["rollout-1"], False)

    stage = Stage(workers=2, max_restarts=0)
    run_in_virtual_time(run())


def test_a_worker_that_is_lost_too_often_where_no_other_one_works_ends_the_run():
    async def run():
        await stage.start()
        stage.runtime.script = {f"rollout-0+{number}": {"pull": ActorLostError("gone")} for number in range(1, 9)}
        await stage.lose("rollout-0")

    stage = Stage(max_restarts=2)
    with pytest.raises(RunError, match=r"rollout-0 may be restarted 2 times \(runtime.max_restarts\).*gone"):
        run_in_virtual_time(run())


HELD = ResourceError("Free memory on device (9.1/139.8 GiB) is less than desired GPU memory utilization")


def test_memory_that_a_lost_worker_still_holds_is_waited_for_with_the_waits_of_restarts():
    async def run():
        await stage.start()
        stage.runtime.script = {f"rollout-0+{number}": {"health": HELD} for number in (1, 2, 3)}
        begin = asyncio.get_running_loop().time()
        await stage.lose("rollout-0")
        return asyncio.get_running_loop().time() - begin

    stage = Stage()
    assert round(run_in_virtual_time(run())) == 0 + 1 + 2 + 4
    assert working(stage) == ["rollout-0+4"]
    lost = stage.told(EventKind.ACTOR_LOST)
    assert [name for name, _ in lost] == ["rollout-0", "rollout-0+1", "rollout-0+2", "rollout-0+3"]
    assert lost[1][1]["reason"] == str(HELD)
    assert [line for line in stage.runtime.log if line.startswith("end")][1:] == [
        f"end rollout-0+{n}" for n in (1, 2, 3)
    ]


def test_memory_that_is_never_free_ends_the_run_once_restarts_are_used_up():
    async def run():
        await stage.start()
        stage.runtime.script = {f"rollout-0+{number}": {"health": HELD} for number in range(1, 9)}
        await stage.lose("rollout-0")

    stage = Stage(max_restarts=2)
    with pytest.raises(RunError, match=r"rollout-0 may be restarted 2 times.*Free memory on device"):
        run_in_virtual_time(run())


@pytest.mark.parametrize("broken", [{1: HELD}, {1: ActorLostError("gone"), 2: HELD}])
def test_a_place_in_which_none_has_worked_yet_and_that_has_too_little_memory_ends_the_run(broken):
    async def run():
        stage.runtime.full = {1}
        await stage.start()
        names = {1: "rollout-1", 2: "rollout-1+1"}
        stage.runtime.script = {names[number]: {"health": error} for number, error in broken.items()}
        stage.runtime.full = set()
        await stage.actors._add_worker(1)

    stage = Stage(workers=2)
    with pytest.raises(ResourceError, match="Free memory on device"):
        run_in_virtual_time(run())


def test_options_that_no_worker_can_start_with_are_not_tried_again():
    async def run():
        await stage.start()
        stage.runtime.script = {"rollout-0+1": {"health": ConfigError("rollout.dtype must be another")}}
        await stage.lose("rollout-0")

    stage = Stage()
    with pytest.raises(ConfigError, match=r"rollout\.dtype"):
        run_in_virtual_time(run())
