import asyncio
from contextlib import suppress

import pytest

from fakes import FakeHandle, health, in_turn, until
from trl_ray.errors import ActorLostError, DeadlineError, RunError
from trl_ray.runtime.supervision import Supervisor
from virtual_time import run_in_virtual_time


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


def test_silence_is_counted_from_the_last_answer_so_that_a_hang_is_noticed_within_one_deadline():
    log, noticed = Log(), []

    async def run():
        loop = asyncio.get_running_loop()
        begin = loop.time()

        class Stopping(FakeHandle):
            async def call(self, method, /, *args, deadline_s, **kwargs):
                if loop.time() - begin < 100:
                    return health()
                await asyncio.sleep(deadline_s)
                raise DeadlineError("silent")

        async def on_lost(watched, reason):
            noticed.append((loop.time() - begin, watched.is_silent))

        supervisor = log.supervisor(interval_s=10, deadline_s=15, on_lost=on_lost)
        supervisor.watch(Stopping(name="rollout-0"))
        running = asyncio.create_task(supervisor.run())
        await asyncio.sleep(200)
        running.cancel()
        await asyncio.wait([running])

    run_in_virtual_time(run())
    # The last answer came at 90 s, the probe of 100 s had half a deadline left at least.
    [(seconds, is_silent)] = noticed
    assert 105 <= round(seconds, 1) <= 107.5 and is_silent


def test_a_loss_that_somebody_else_met_is_dealt_with_once_and_beside_whoever_reports_it():
    log, back = Log(), asyncio.Event()

    async def run():
        async def recover(watched, reason):
            await log.on_lost(watched, reason)
            await back.wait()

        supervisor = log.supervisor(on_lost=recover)
        supervisor.watch(FakeHandle(name="rollout-0", answers={"health": ActorLostError("a probe met it too")}))
        supervisor.report("rollout-0", "its pull failed")
        supervisor.report("rollout-0", "its pull failed again")
        await watch_until(supervisor, lambda: bool(log.lost))

    asyncio.run(run())
    assert log.lost == [("rollout-0", "its pull failed")]


def test_a_loss_that_is_noticed_ends_every_call_of_the_actor_at_once():
    log = Log()

    async def run():
        supervisor = log.supervisor()
        hung = FakeHandle(name="rollout-0", answers={"health": health(), "evaluate": asyncio.Event().wait})
        supervisor.watch(hung)
        asking = asyncio.create_task(supervisor.while_alive("rollout-0", hung.call("evaluate", deadline_s=3600)))
        await asyncio.sleep(0)
        supervisor.report("rollout-0", "its node is gone")
        with pytest.raises(ActorLostError, match="its node is gone"):
            await asking

    asyncio.run(run())


def test_an_answer_of_a_watched_actor_arrives_and_so_does_its_error():
    async def run(answer):
        supervisor = Log().supervisor()
        made = FakeHandle(name="rollout-0", answers={"pull": answer})
        supervisor.watch(made)
        return await supervisor.while_alive("rollout-0", made.call("pull", deadline_s=1))

    assert asyncio.run(run("report")) == "report"
    with pytest.raises(RunError, match="damaged"):
        asyncio.run(run(RunError("damaged")))


def test_an_error_of_what_is_done_beside_ends_the_watch_too():
    async def fails():
        raise RunError("no room")

    async def run():
        supervisor = Log().supervisor()
        supervisor.also("start rollout-1", fails)
        async with asyncio.timeout(20):
            await supervisor.run()

    with pytest.raises(RunError, match="no room"):
        asyncio.run(run())
