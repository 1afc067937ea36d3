import asyncio
from contextlib import suppress

import pytest

from fakes import FakeHandle, health, in_turn, until
from trl_ray.errors import ActorLostError, DeadlineError, RunError
from trl_ray.runtime.supervision import Supervisor


class Log:
    """Callbacks that write down what they hear."""

    def __init__(self):
        self.lost, self.reborn = [], []

    async def on_lost(self, watched, reason):
        self.lost.append((watched.handle.name, reason))

    async def on_reborn(self, watched, found):
        self.reborn.append((watched.handle.name, found.pid))

    def supervisor(self, **changes):
        options = {"interval_s": 0.005, "deadline_s": 1, "on_lost": self.on_lost, "on_reborn": self.on_reborn}
        return Supervisor(**{**options, **changes})


async def watch_until(supervisor, condition):
    """Run a supervisor until something has happened."""
    running = asyncio.create_task(supervisor.run())
    try:
        await until(condition)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ActorLostError("it died"), "it died"),
        (DeadlineError("it must answer within 1 s"), "it must answer within 1 s"),
        (health(problem="the engine hangs"), "the engine hangs"),
    ],
    ids=["death", "silence", "own-problem"],
)
def test_an_actor_is_lost_by_death_by_silence_and_by_its_own_word(answer, reason):
    log = Log()

    async def run():
        supervisor = log.supervisor()
        supervisor.watch(FakeHandle(name="rollout-0", answers={"health": answer}))
        await watch_until(supervisor, lambda: bool(log.lost))

    asyncio.run(run())
    assert log.lost[0] == ("rollout-0", reason)
    assert log.reborn == []


def test_an_actor_that_answers_from_another_process_was_reborn_and_is_told_of_once():
    log, made = Log(), FakeHandle(name="queue", answers={"health": in_turn(health(pid=7), health(pid=8))})

    async def run():
        supervisor = log.supervisor()
        supervisor.watch(made, health=health(pid=7))
        await watch_until(supervisor, lambda: len(made.calls) > 6)

    asyncio.run(run())
    assert (log.lost, log.reborn) == ([], [("queue", 8)])


def test_an_actor_replaced_while_its_probe_was_under_way_is_not_reported():
    log = Log()

    async def run(outcome):
        probed = asyncio.get_running_loop().create_future()
        old = FakeHandle(name="rollout-0", answers={"health": lambda: probed})
        supervisor = log.supervisor()
        supervisor.watch(old, health=health(pid=1))
        running = asyncio.create_task(supervisor.run())
        await until(lambda: bool(old.calls))
        new = FakeHandle(name="rollout-0", answers={"health": health(pid=2)})
        supervisor.watch(new, health=health(pid=2))
        if isinstance(outcome, Exception):
            probed.set_exception(outcome)
        else:
            probed.set_result(outcome)
        await until(lambda: len(new.calls) > 2)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(run(ActorLostError("it died")))
    asyncio.run(run(health(pid=1, problem="the engine hangs")))
    asyncio.run(run(health(pid=3)))
    assert (log.lost, log.reborn) == ([], [])


def test_a_forgotten_actor_is_probed_no_more():
    log, made = Log(), FakeHandle(name="rollout-0", answers={"health": ActorLostError("it died")})

    async def run():
        supervisor = log.supervisor()

        async def forget(watched, reason):
            supervisor.forget(watched.handle.name)
            await log.on_lost(watched, reason)

        supervisor._on_lost = forget
        other = FakeHandle(name="queue", answers={"health": health()})
        supervisor.watch(made)
        supervisor.watch(other)
        await watch_until(supervisor, lambda: len(other.calls) > 5)
        assert [watched.handle for watched in supervisor.watched] == [other]

    asyncio.run(run())
    assert (len(made.calls), len(log.lost)) == (1, 1)


def test_an_error_of_a_callback_ends_the_watch():
    async def give_up(watched, reason):
        raise RunError(f"{watched.handle.name} was lost too often")

    async def run():
        supervisor = Log().supervisor(on_lost=give_up)
        supervisor.watch(FakeHandle(name="rollout-0", answers={"health": ActorLostError("it died")}))
        async with asyncio.timeout(20):
            await supervisor.run()

    with pytest.raises(RunError, match="rollout-0 was lost too often"):
        asyncio.run(run())


def test_one_slow_recovery_does_not_delay_the_probe_of_another_actor():
    log = Log()

    async def run():
        async def recover(watched, reason):
            await log.on_lost(watched, reason)
            if watched.handle.name == "slow":
                await asyncio.sleep(3600)

        supervisor = log.supervisor(on_lost=recover)
        supervisor.watch(FakeHandle(name="slow", answers={"health": ActorLostError("it died")}))
        supervisor.watch(FakeHandle(name="other", answers={"health": in_turn(health(), health(problem="ill"))}))
        await watch_until(supervisor, lambda: ("other", "ill") in log.lost)

    asyncio.run(run())
    assert [name for name, _ in log.lost].count("slow") == 1
