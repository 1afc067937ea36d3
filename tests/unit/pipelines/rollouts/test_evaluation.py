"""Held-out prompts are answered by whoever is there; a worker that is lost takes no answers with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fakes import completion, prompt, reward
from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.errors import ActorLostError, DataError, DeadlineError, EngineError
from trl_ray.pipelines.rollouts import evaluation
from trl_ray.pipelines.rollouts.evaluation import HeldOutAnswers, evaluate
from trl_ray.rewards.scoring import ScoredGroup

PROMPTS = [prompt(number) for number in range(31)]


@dataclass
class Worker:
    name: str
    fails: Sequence[Exception | None] = ()
    asked: list[int] = field(default_factory=list)

    async def call(self, method: str, share: Any, *, seed: int, deadline_s: float) -> list[EvaluatedPrompt]:
        assert method == "evaluate" and seed == 3
        self.asked.append(len(share))
        if len(self.asked) <= len(self.fails) and (error := self.fails[len(self.asked) - 1]):
            raise error
        scored = ScoredGroup(rewards=(reward(1.0),))
        return [EvaluatedPrompt(prompt=each, completions=(completion(),), scored=scored) for each in share]


def ask(workers: Callable[[], Sequence[Worker]], deadline_s: float = 60.0) -> HeldOutAnswers:
    given: Any = workers
    return asyncio.run(evaluate(given, PROMPTS, seed=3, deadline_s=deadline_s))


def answered(found: HeldOutAnswers) -> list[str]:
    return [each.prompt.prompt_id for each in found.answers]


def test_every_worker_answers_its_share() -> None:
    workers = [Worker("a"), Worker("b"), Worker("c")]
    found = ask(lambda: workers)
    assert [worker.asked for worker in workers] == [[11], [10], [10]] and not found.lost
    assert sorted(answered(found)) == sorted(each.prompt_id for each in PROMPTS)


@pytest.mark.parametrize("error", [ActorLostError("it died"), DeadlineError("it hung"), EngineError("it failed")])
def test_the_share_of_a_lost_worker_is_answered_by_another_and_the_order_stays(error: Exception) -> None:
    whole = answered(ask(lambda: [Worker("a"), Worker("b")]))
    workers = [Worker("a"), Worker("b", [error])]
    found = ask(lambda: workers)
    assert answered(found) == whole and found.lost == (str(error),)
    assert workers[0].asked == [16, 15] and workers[1].asked == [15]


def test_where_none_is_left_it_waits_for_the_one_that_comes_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PAUSE_S", 0.001)
    dead, fresh, looks = Worker("a", [ActorLostError("it died")] * 9), Worker("a-2"), 0

    def workers() -> list[Worker]:
        nonlocal looks
        looks += 1
        return [dead] if looks < 5 else [fresh]

    assert len(ask(workers).answers) == 31 and dead.asked == [31] and fresh.asked == [31]


def test_what_nobody_answers_in_time_is_missing_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PAUSE_S", 0.001)
    dead = Worker("a", [ActorLostError("it died")] * 9)
    assert ask(lambda: [dead], deadline_s=0.02) == HeldOutAnswers(answers=(), lost=("it died",))


def test_workers_that_are_lost_one_after_the_other_are_asked_three_times() -> None:
    found = ask(lambda: [Worker("a", [ActorLostError("it died")] * 9)])
    assert found == HeldOutAnswers(answers=(), lost=("it died",) * 3)


def test_an_error_of_the_rows_is_raised() -> None:
    with pytest.raises(DataError):
        ask(lambda: [Worker("a", [DataError("wrong")])])
