"""Scores that take longer than a call: asked for again, begun once, forgotten when nobody asks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fakes import FakeHandle, completion, prompt, reward
from trl_ray.actors.calling import Patience
from trl_ray.actors.pending_scores import PendingScores, ask_for_scores
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.types import ScoredGroup

DONE = ScoredGroup(rewards=(reward(1.0),))
PATIENCE = Patience(deadline_s=0.2, total_s=0.3)


class Work:
    """Counts how often it was begun and cancelled."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun, self.cancelled = seconds, 0, 0

    async def __call__(self) -> ScoredGroup:
        self.begun += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return DONE


def test_a_question_is_answered_with_nothing_in_time_and_the_work_goes_on() -> None:
    async def run() -> list[Any]:
        pending, work = PendingScores(), Work(0.1)
        answers = [await pending.get("a", work, wait_s=0.02)]
        answers += [await pending.get("a", work, wait_s=5.0), await pending.get("a", work, wait_s=5.0)]
        return [*answers, work.begun]

    assert asyncio.run(run()) == [None, DONE, DONE, 1]  # an answer that got lost is asked for again


def test_other_keys_are_other_work() -> None:
    async def run() -> int:
        pending, work = PendingScores(), Work(0.0)
        await asyncio.gather(*(pending.get(key, work, wait_s=1.0) for key in "aab"))
        return work.begun

    assert asyncio.run(run()) == 2


def test_what_nobody_asks_for_is_forgotten_and_cancelled() -> None:
    async def run() -> tuple[int, int]:
        pending, abandoned = PendingScores(forgotten_after_s=0.05), Work(3600.0)
        await pending.get("a", abandoned, wait_s=0.01)
        await asyncio.sleep(0.1)
        await pending.get("b", Work(0.0), wait_s=1.0)
        await asyncio.sleep(0)
        return abandoned.begun, abandoned.cancelled

    assert asyncio.run(run()) == (1, 1)


def asked(*answers: Any) -> tuple[FakeHandle, Any]:
    given = list(answers)
    handle = FakeHandle(name="reward-0", answers={"score": lambda **kwargs: given.pop(0)})

    async def run() -> ScoredGroup:
        return await ask_for_scores(handle, prompt(1), [completion("x")], key="k", patience=PATIENCE)

    return handle, run


def test_a_caller_comes_back_until_there_are_scores_whatever_happens_to_an_answer() -> None:
    handle, run = asked(None, None, DeadlineError("late"), None, DONE)
    assert asyncio.run(run()) is DONE
    calls = handle.asked("score")
    assert [call.kwargs["key"] for call in calls] == ["k"] * 5
    assert all(call.kwargs["wait_s"] < PATIENCE.deadline_s for call in calls)


@pytest.mark.parametrize("error", [DeadlineError, ActorLostError])
def test_an_actor_that_does_not_answer_at_all_is_told(error: type[Exception]) -> None:
    _, run = asked(None, *[error("gone")] * 9)
    with pytest.raises(error):
        asyncio.run(run())
