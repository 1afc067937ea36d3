"""Signals end a run in order, within the time they leave; real ones, sent to this process."""

import asyncio
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from trl_ray.errors import ActorLostError, InterruptedRun, RunError
from trl_ray.pipelines.run import signals
from trl_ray.pipelines.run.signals import Stop, StopRequested, interrupt_at_once, run_to_end, unless


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def handler(number: int, given):
    before = signal.signal(number, given)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Whoever started the tests may ignore signals, as nohup and background jobs do; that is inherited."""
    with (
        handler(signal.SIGINT, signal.default_int_handler),
        handler(signal.SIGTERM, signal.SIG_DFL),
        handler(signal.SIGHUP, signal.SIG_DFL),
        handler(signal.SIGUSR1, signal.SIG_DFL),
    ):
        yield


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_first_signal_is_a_wish_that_the_run_hears(name: str) -> None:
    haste = name == "SIGTERM"
    before = signal.getsignal(getattr(signal, name))

    async def main(stop: Stop) -> tuple[str, bool, bool]:
        send(getattr(signal, name))
        await asyncio.wait_for(stop.wait(), 5)
        return stop.cause, stop.in_haste.is_set(), stop.left_s is not None

    assert run_to_end(main) == (name, haste, haste)
    assert signal.getsignal(getattr(signal, name)) is before


def test_in_a_ray_job_every_signal_leaves_only_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")

    async def main(stop: Stop) -> bool:
        send(signal.SIGINT)
        await asyncio.wait_for(stop.wait(), 5)
        return 1.0 < stop.left_s <= 2.0

    assert run_to_end(main, grace=3.0)


def test_a_handler_that_another_library_took_is_taken_back() -> None:
    async def main(stop: Stop) -> str:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
        stop.hold()
        send(signal.SIGTERM)
        await asyncio.wait_for(stop.wait(), 5)
        return stop.cause

    assert run_to_end(main) == "SIGTERM"


def test_what_nohup_ignores_stays_ignored() -> None:
    async def main(stop: Stop) -> bool:
        send(signal.SIGHUP)
        await asyncio.sleep(0.05)
        return stop.is_set()

    with handler(signal.SIGHUP, signal.SIG_IGN):
        assert run_to_end(main) is False


def endless(held: bool):
    async def main(stop: Stop) -> None:
        with stop.ends_in_order(lambda: "step-4 stands"):
            send(signal.SIGTERM)
            if held:
                for _ in range(600):
                    time.sleep(0.05)  # as a learner in this process holds the loop
            await asyncio.sleep(30)

    return main


@pytest.mark.parametrize("held", [False, True])
def test_a_run_that_does_not_end_within_the_grace_is_cut_short(held: bool) -> None:
    begin = time.monotonic()
    with pytest.raises(InterruptedRun, match="SIGTERM: interrupted; no time was left to end the step; step-4 stands"):
        run_to_end(endless(held), grace=0.3)
    assert 0.15 < time.monotonic() - begin < 5


@pytest.mark.parametrize("in_child", [False, True])
def test_a_second_signal_ends_at_once_whoever_holds_the_loop(in_child: bool) -> None:
    closed: list[bool] = []

    def twice() -> None:
        send(signal.SIGINT)
        time.sleep(0.4)
        send(signal.SIGINT)

    async def hold() -> None:
        for _ in range(600):
            time.sleep(0.05)

    async def main(stop: Stop) -> None:
        threading.Thread(target=twice).start()
        try:
            with stop.ends_in_order(lambda: "nothing"):
                await (asyncio.create_task(hold()) if in_child else asyncio.sleep(30))
        finally:
            await asyncio.sleep(0)
            closed.append(stop.at_once)

    begin = time.monotonic()
    with pytest.raises((asyncio.CancelledError, KeyboardInterrupt)):
        run_to_end(main)
    assert closed == [True] and time.monotonic() - begin < 5


def test_a_signal_that_comes_twice_in_a_moment_is_one_wish_and_a_notice_before_it_none() -> None:
    async def main(stop: Stop) -> tuple[bool, bool]:
        send(signal.SIGUSR1)  # Slurm's --signal
        await asyncio.wait_for(stop.wait(), 5)
        await asyncio.sleep(0.3)
        send(signal.SIGTERM)  # and its end, from `timeout`, which sends it to the process and to its group
        await asyncio.sleep(0.02)
        send(signal.SIGTERM)
        await asyncio.sleep(0.3)
        return stop.at_once, stop.in_haste.is_set()

    assert run_to_end(main, grace=60.0) == (False, True)


def test_actors_that_the_same_signal_ended_are_no_failure_but_without_one_they_are() -> None:
    def lost(asked: bool, error: Exception):
        async def main(stop: Stop) -> None:
            with stop.ends_in_order(lambda: "step-4 stands"):
                if asked:
                    send(signal.SIGTERM)
                    await asyncio.wait_for(stop.wait(), 5)
                raise error

        return main

    with pytest.raises(InterruptedRun, match="learner died; step-4 stands"):
        run_to_end(lost(True, ActorLostError("learner died")))
    with pytest.raises(ActorLostError):
        run_to_end(lost(False, ActorLostError("learner died")))
    with pytest.raises(RunError, match="of the run's own"):
        run_to_end(lost(True, RunError("of the run's own")))


def test_a_run_that_has_ended_in_order_is_not_cut_while_it_closes() -> None:
    async def main(stop: Stop) -> str:
        send(signal.SIGTERM)
        await asyncio.wait_for(stop.wait(), 5)
        stop.settled = True
        time.sleep(0.7)  # longer than a loop may be held
        return "closed"

    assert run_to_end(main, grace=0.15) == "closed"


def test_before_a_run_a_signal_is_as_ctrl_c_and_the_run_takes_it_over() -> None:
    async def main(stop: Stop) -> bool:
        send(signal.SIGUSR2)
        await asyncio.wait_for(stop.wait(), 5)
        return stop.is_set()

    with (
        handler(signal.SIGTERM, signal.SIG_DFL),
        handler(signal.SIGHUP, signal.SIG_IGN),
        handler(signal.SIGUSR1, signal.SIG_DFL),
        handler(signal.SIGUSR2, signal.SIG_DFL),
    ):
        interrupt_at_once()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with pytest.raises(KeyboardInterrupt):
                send(number)
                time.sleep(1)
        assert run_to_end(main)


def test_work_is_given_up_at_the_wish_after_some_patience() -> None:
    async def answer(after_s: float) -> str:
        await asyncio.sleep(after_s)
        return "answer"

    async def main() -> None:
        stop = asyncio.Event()
        assert await unless(stop, answer(0)) == "answer"
        asyncio.get_running_loop().call_later(0.02, stop.set)
        begin = time.monotonic()
        with pytest.raises(StopRequested):
            await unless(stop, answer(30))
        assert time.monotonic() - begin < 5
        assert await unless(stop, answer(0.05), patience_s=10) == "answer"
        with pytest.raises(StopRequested):
            await unless(stop, answer(30), patience_s=0.02)

    asyncio.run(main())


def test_a_thread_that_never_answers_does_not_keep_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    async def main(stop: Stop) -> str:
        waiting = asyncio.create_task(asyncio.to_thread(free.wait, 60))
        await asyncio.sleep(0.05)
        waiting.cancel()
        return "over"

    begin = time.monotonic()
    try:
        assert run_to_end(main) == "over"
        assert time.monotonic() - begin < 5
    finally:
        free.set()


def test_a_process_of_the_commands_own_is_left_when_the_grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    monkeypatch.setattr(signals, "_owns_process", True)
    monkeypatch.setattr(signals.os, "_exit", lambda code: left.set() if code == 130 else None)

    async def main(stop: Stop) -> bool:
        send(signal.SIGTERM)
        stop.settled = True
        time.sleep(0.5)  # a call that cannot be interrupted, at the very end
        return left.is_set()

    assert run_to_end(main, grace=0.3)
