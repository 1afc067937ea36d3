import asyncio
import threading

import pytest

from trl_ray.errors import ActorLostError, DataError, DeadlineError
from trl_ray.runtime.local import LocalHandle, LocalRuntime
from trl_ray.runtime.runtime import Role


class Worker:
    """Has one method of each kind."""

    def __init__(self, *, name="w", closed=None):
        self.name, self.closed = name, [] if closed is None else closed
        self.release = asyncio.Event()

    def add(self, first, *, second):
        return first + second, threading.get_ident()

    async def add_later(self, first, *, second):
        await asyncio.sleep(0)
        return first + second

    async def wait(self):
        await self.release.wait()
        return "answer"

    async def cancel_and_answer(self):
        self.caller.cancel()
        return "answer"

    async def own_deadline(self):
        raise DeadlineError("the engine must answer within 1 s, but did not.")

    async def refuse(self):
        raise DataError("row 3 is empty")

    def close(self):
        self.closed.append(self.name)


def handle(instance=None):
    return LocalHandle("rollout-0", Role.ROLLOUT, instance or Worker())


def test_methods_of_both_kinds_are_awaited_alike_and_plain_ones_run_on_the_callers_thread():
    made = handle()
    answer = asyncio.run(made.call("add", 1, second=2, deadline_s=1))
    assert answer == (3, threading.get_ident())
    assert asyncio.run(made.call("add_later", 1, second=2, deadline_s=1)) == 3
    assert asyncio.run(made.call_shared("add_later", 1, second=2, deadline_s=1)) == 3


def test_a_missed_deadline_names_actor_and_method():
    with pytest.raises(DeadlineError, match=r"rollout-0\.wait must answer within 0\.01 s"):
        asyncio.run(handle().call("wait", deadline_s=0.01))


def test_errors_of_the_method_arrive_unchanged_even_one_about_a_deadline():
    with pytest.raises(DeadlineError, match=r"^the engine must answer within 1 s"):
        asyncio.run(handle().call("own_deadline", deadline_s=1))
    with pytest.raises(DataError, match="row 3"):
        asyncio.run(handle().call("refuse", deadline_s=1))


def test_an_ended_actor_is_lost_and_was_closed_once():
    instance = Worker()
    made = handle(instance)
    made.end()
    made.end()
    assert instance.closed == ["w"]
    with pytest.raises(ActorLostError, match="rollout-0"):
        asyncio.run(made.call("add", 1, second=2, deadline_s=1))


def test_a_cancellation_that_arrives_together_with_the_answer_is_not_swallowed():
    async def run():
        instance = Worker()

        async def caller():
            await handle(instance).call("cancel_and_answer", deadline_s=60)
            await asyncio.sleep(0)

        instance.caller = asyncio.create_task(caller())
        await asyncio.wait([instance.caller])
        return instance.caller.cancelled()

    assert asyncio.run(run())


def test_a_runtime_ends_its_actors_youngest_first_and_nothing_comes_back():
    async def run():
        runtime, closed = LocalRuntime(), []
        handles = [
            await runtime.spawn(Role.REWARD, name, Worker, slot=7, name=name, closed=closed) for name in ("a", "b", "c")
        ]
        await runtime.kill(handles[1])
        await runtime.close()
        await runtime.close()
        return closed, {runtime.survives(role) for role in Role}

    assert asyncio.run(run()) == (["b", "c", "a"], {False})
