import asyncio

import pytest

from fakes import FakeHandle, in_turn, until
from trl_ray.actors import calling
from trl_ray.actors.calling import Outbox, Patience, call_patiently
from trl_ray.errors import ActorLostError, DataError, DeadlineError

LONG = Patience(deadline_s=1, total_s=60)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(calling, "_PAUSE_S", 0.001)


def test_a_call_is_repeated_with_the_same_arguments_while_its_actor_is_away():
    answers = in_turn(ActorLostError("it died"), DeadlineError("it is silent"), "here")
    made = FakeHandle(answers={"take": answers})
    assert asyncio.run(call_patiently(made, "take", LONG, n=8, step=1)) == "here"
    assert [dict(call.kwargs) for call in made.calls] == [{"n": 8, "step": 1}] * 3


def test_an_error_of_the_method_itself_is_not_repeated():
    made = FakeHandle(answers={"commit": DataError("the group contradicts itself")})
    with pytest.raises(DataError):
        asyncio.run(call_patiently(made, "commit", LONG))
    assert len(made.calls) == 1


@pytest.mark.parametrize("error", [ActorLostError("it died"), DeadlineError("it is silent")], ids=["lost", "silent"])
def test_patience_runs_out_with_the_last_error(error):
    made = FakeHandle(answers={"take": error})
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(call_patiently(made, "take", Patience(deadline_s=1, total_s=0.02)))
    assert len(made.calls) > 1


@pytest.mark.parametrize(
    ("pause_s", "tries"), [(0.001, 2), (3600.0, 1)], ids=["while it is asked", "between two tries"]
)
def test_a_caller_that_is_cancelled_does_not_ask_again(pause_s, tries, monkeypatch):
    monkeypatch.setattr(calling, "_PAUSE_S", pause_s)
    made = FakeHandle()

    async def lost_then_silent():
        if len(made.calls) == 1:
            raise ActorLostError("it died")
        await asyncio.sleep(3600)

    made.answers["take"] = lost_then_silent

    async def scenario():
        task = asyncio.create_task(call_patiently(made, "take", LONG))
        await until(lambda: len(made.calls) == tries)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert len(made.calls) == tries


def test_without_time_for_more_there_is_one_try():
    made = FakeHandle(answers={"take": ActorLostError("it died")})
    with pytest.raises(ActorLostError):
        asyncio.run(call_patiently(made, "take", Patience(deadline_s=1, total_s=0)))
    assert len(made.calls) == 1


def outbox(send):
    """With every task that it launches."""
    tasks = []
    return Outbox(send, lambda work: tasks.append(asyncio.create_task(work))), tasks


def test_an_outbox_sends_at_once_and_then_what_came_up_during_the_call():
    sent = []

    async def run():
        may_answer = asyncio.Event()

        async def send(items):
            sent.append(list(items))
            await may_answer.wait()
            return [f"{item}!" for item in items]

        box, _ = outbox(send)
        first = box.put("a")
        await asyncio.sleep(0)
        others = [box.put("b"), box.put("c")]
        assert not first.done()
        may_answer.set()
        assert [await each for each in (first, *others)] == ["a!", "b!", "c!"]
        assert await box.put("d") == "d!"

    asyncio.run(run())
    assert sent == [["a"], ["b", "c"], ["d"]]


def test_a_call_that_fails_fails_what_it_carried_and_nothing_else():
    async def run():
        answers = [ActorLostError("it died"), None]

        async def send(items):
            error = answers.pop(0)
            if error is not None:
                raise error
            return list(items)

        box, _ = outbox(send)
        lost, unheard = box.put("a"), box.put("b")
        with pytest.raises(ActorLostError, match="it died"):
            await lost
        assert await box.put("c") == "c"
        del unheard

    asyncio.run(run())


def test_whatever_nobody_foresaw_ends_the_sender_and_everybody_who_waits():
    async def run():
        async def send(items):
            await asyncio.sleep(0)
            raise ValueError("what no one thought of")

        box, tasks = outbox(send)
        waiting = [box.put("a")]
        await asyncio.sleep(0)
        waiting.append(box.put("b"))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in results] == [asyncio.CancelledError] * 2
        with pytest.raises(ValueError, match="no one thought of"):
            await tasks[0]

    asyncio.run(run())


def test_a_cancelled_outbox_leaves_nobody_waiting():
    async def run():
        async def send(items):
            await asyncio.sleep(3600)

        box, tasks = outbox(send)
        waiting = box.put("a")
        await asyncio.sleep(0)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
