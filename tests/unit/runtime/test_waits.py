"""The one way to wait: its deadline, its cancellation, and what is told of waits that last; hours in a moment."""

import asyncio

import pytest

from trl_ray.errors import DeadlineError
from trl_ray.runtime import waits
from trl_ray.types import EventKind
from virtual_time import run_in_virtual_time


class Ear:
    """What a listener was told."""

    def __init__(self):
        self.events = []

    def heard(self):
        return [(event.detail["on"], event.detail["seconds"]) for event in self.events]


async def later(seconds, value="answer"):
    await asyncio.sleep(seconds)
    return value


def test_a_wait_that_lasts_is_told_of_after_30_60_and_120_seconds_with_who_waits_and_until_when():
    ear = Ear()

    async def run():
        with waits.heard_by(ear.events.append):
            work = waits.answer(later(200), on="rollout-1.pull", deadline_s=600)
            return await asyncio.create_task(work, name="pull of step 3")

    assert run_in_virtual_time(run()) == "answer"
    assert ear.heard() == [("rollout-1.pull", 30.0), ("rollout-1.pull", 60.0), ("rollout-1.pull", 120.0)]
    first = ear.events[0]
    assert (first.kind, first.actor) == (EventKind.WAITING, "driver")
    assert (first.detail["owner"], first.detail["deadline_s"]) == ("pull of step 3", 600)


def test_what_has_always_taken_long_is_told_of_only_when_it_takes_twice_as_long():
    ear = Ear()

    async def run():
        with waits.heard_by(ear.events.append):
            for seconds in (40, 70, 170):
                await waits.answer(later(seconds), on="learner.step", deadline_s=3600)
            await waits.answer(later(40), on="learner.save", deadline_s=3600)

    run_in_virtual_time(run())
    # 40 s after the first 30; then nothing below 80 and 140.
    assert ear.heard() == [("learner.step", 30.0), ("learner.step", 140.0), ("learner.save", 30.0)]


def test_nobody_has_to_listen():
    assert run_in_virtual_time(waits.answer(later(100), on="queue.take", deadline_s=600)) == "answer"


@pytest.mark.parametrize("as_future", [False, True], ids=["coroutine", "future"])
def test_a_missed_deadline_names_who_was_waited_for_and_ends_the_work(as_future):
    async def run():
        work = later(100)
        given = asyncio.ensure_future(work) if as_future else work
        with pytest.raises(DeadlineError, match=r"queue.take must answer within 5 s"):
            await waits.answer(given, on="queue.take", deadline_s=5)
        await asyncio.sleep(0)
        return given.cancelled() if as_future else True

    assert run_in_virtual_time(run())


def test_an_error_about_time_that_is_the_works_own_is_no_missed_deadline():
    async def raises():
        raise TimeoutError("of the work")

    with pytest.raises(TimeoutError, match="of the work") as caught:
        run_in_virtual_time(waits.answer(raises(), on="queue.take", deadline_s=5))
    assert not isinstance(caught.value, DeadlineError)


def test_an_answer_that_came_while_the_loop_was_held_is_an_answer_though_its_deadline_has_passed():
    async def run():
        loop = asyncio.get_running_loop()
        given = loop.create_future()

        def hold():
            loop._ahead_s += 60  # the loop is busy for a minute, and meanwhile the answer arrives
            given.set_result("answer")

        loop.call_later(1, hold)
        return await waits.answer(given, on="queue.health", deadline_s=15)

    assert run_in_virtual_time(run()) == "answer"


def test_looking_again_and_again_is_told_of_at_once_where_that_is_asked_and_ends_at_its_deadline():
    ear, looks = Ear(), []

    async def never():
        looks.append(None)
        return False

    async def run():
        with waits.heard_by(ear.events.append), pytest.raises(DeadlineError, match="room must answer within 40 s"):
            await waits.until(never, on="room", every_s=10, deadline_s=40, told_at_once=True)

    run_in_virtual_time(run())
    assert ear.heard() == [("room", 0.0), ("room", 30.0)]
    assert len(looks) == 6


def test_a_wait_ends_with_the_task_that_waits_and_takes_what_it_waits_for_along():
    async def run():
        given = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(waits.answer(given, on="rollout-0.pull", deadline_s=600))
        await asyncio.sleep(1)
        waiting.cancel()
        await asyncio.wait([waiting])
        return waiting.cancelled(), given.cancelled()

    assert run_in_virtual_time(run()) == (True, True)
