"""Joined passes on one thread, and engines and servers that are asked on several: who waits for whom, how it fails."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fakes import until
from trl_ray.actors.teacher_scoring import AskedScoring, JoinedScoring
from trl_ray.errors import ConfigError, DataError, DeadlineError, EngineError, TeacherError
from trl_ray.types import TeacherQuestion, TeacherRequest, TeacherScores

ONE, TWO = TeacherQuestion(vocab_size=50), TeacherQuestion(vocab_size=50, temperature=2.0)


def request(length: int, *, support: int = 0) -> TeacherRequest:
    """One token of context; the completion's first token is its length."""
    return TeacherRequest(
        prompt_ids=np.ones(1, np.int32),
        completion_ids=np.full(length, length, np.int32),
        support_ids=np.zeros((length, support), np.int32) if support else None,
    )


def scores(requests: Sequence[TeacherRequest], version: int | None = None) -> list[TeacherScores]:
    return [
        TeacherScores(teacher="wise", version=version, logprobs=-each.completion_ids.astype(np.float32))
        for each in requests
    ]


class FakeModel:
    """Passes of two, the longest first; writes down lengths, and waits or raises where it is told."""

    def __init__(self, *, go: threading.Event | None = None, fails: Exception | None = None) -> None:
        self.forwards: list[list[int]] = []
        self.begun, self.version = threading.Event(), 0
        self._go, self._fails = go, fails

    def check(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        if any(len(each.completion_ids) > 30 for each in requests):
            raise DataError("too long")

    def passes(self, requests: Sequence[TeacherRequest]) -> list[list[int]]:
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].completion_ids))
        return [order[start : start + 2] for start in range(0, len(order), 2)]

    def forward(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        self.forwards.append([len(each.completion_ids) for each in requests])
        self.begun.set()
        if self._go is not None:
            assert self._go.wait(20)
        if self._fails is not None:
            raise self._fails
        return scores(requests, self.version)


def joined(model: FakeModel, *, max_tokens: int = 100, timeout_s: float = 20.0) -> JoinedScoring:
    return JoinedScoring(model, actor="teacher-wise-0", teacher="wise", max_tokens=max_tokens, timeout_s=timeout_s)


def lengths(found: Sequence[TeacherScores]) -> list[int]:
    """What was said, and of whom: the first log-prob of each is minus its length."""
    assert all((each.logprobs == -len(each.logprobs)).all() for each in found)
    return [len(each.logprobs) for each in found]


def test_calls_that_wait_together_share_passes_and_get_their_own_answers_in_order() -> None:
    async def run() -> list[list[int]]:
        calls = [[request(3), request(9)], [request(5)], [request(4), request(2)]]
        return [lengths(each) for each in await asyncio.gather(*(made.score(call, ONE) for call in calls))]

    model = FakeModel()
    made = joined(model)
    assert asyncio.run(run()) == [[3, 9], [5], [4, 2]]
    assert model.forwards == [[9, 5], [4, 3], [2]]
    assert (made.progress, made.busy_since, len(made.spans()), made.spans()) == (3, None, 1, [])
    made.close()


def test_calls_that_come_while_a_pass_runs_wait_and_are_joined_then() -> None:
    async def run() -> list[list[int]]:
        first = asyncio.ensure_future(made.score([request(1)], ONE))
        await asyncio.to_thread(model.begun.wait, 20)
        others = [asyncio.ensure_future(made.score([request(length)], ONE)) for length in (2, 3)]
        await asyncio.sleep(0)
        assert made.busy_since is not None and made.progress == 0
        go.set()
        return [lengths(each) for each in await asyncio.gather(first, *others)]

    go = threading.Event()
    model = FakeModel(go=go)
    made = joined(model)
    assert asyncio.run(run()) == [[1], [2], [3]]
    assert model.forwards == [[1], [3, 2]]
    assert [(span.actor, span.name) for span in made.spans()] == [("teacher-wise-0", "score")] * 2
    made.close()


def test_only_calls_with_equal_questions_that_fit_together_are_joined() -> None:
    async def run(*calls: tuple[TeacherRequest, TeacherQuestion], max_tokens: int = 100) -> list[list[int]]:
        model = FakeModel()
        made = joined(model, max_tokens=max_tokens)
        await asyncio.gather(*(made.score([one], question) for one, question in calls))
        made.close()
        return model.forwards

    assert asyncio.run(run((request(1), ONE), (request(2), TWO), (request(3), ONE))) == [[3, 1], [2]]
    wide = (request(2, support=4), ONE)
    assert asyncio.run(run((request(1), ONE), wide, (request(3), ONE))) == [[3, 1], [2]]
    # With a token of context each: 2, 3 and 4 tokens, of which 6 are allowed together; the third goes along.
    tight = [(request(length), ONE) for length in (1, 4, 3)]
    assert asyncio.run(run(*tight, max_tokens=6)) == [[3, 1], [4]]


def test_weights_change_between_two_batches_and_never_within_one() -> None:
    async def run() -> list[set[int | None]]:
        first = asyncio.ensure_future(made.score([request(length) for length in (1, 2, 3)], ONE))
        await asyncio.to_thread(model.begun.wait, 20)
        change = asyncio.ensure_future(made.alone(lambda: setattr(model, "version", 1), name="pull"))
        second = asyncio.ensure_future(made.score([request(4)], ONE))
        await asyncio.sleep(0)
        go.set()
        await change
        return [{each.version for each in found} for found in (await first, await second)]

    go = threading.Event()
    model = FakeModel(go=go)
    made = joined(model)
    assert asyncio.run(run()) == [{0}, {1}]
    assert model.forwards == [[3, 2], [1], [4]]
    assert [span.name for span in made.spans()] == ["score", "pull", "score"]
    made.close()


def test_a_request_that_cannot_be_read_fails_its_call_alone() -> None:
    async def run() -> list[object]:
        return await asyncio.gather(
            made.score([request(31)], ONE), made.score([request(3)], ONE), return_exceptions=True
        )

    made = joined(FakeModel())
    bad, good = asyncio.run(run())
    assert isinstance(bad, DataError) and isinstance(good, list) and lengths(good) == [3]
    made.close()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory.*Lower max_tokens_per_batch"),
        (IndexError("index out of range in self"), "IndexError: index out of range"),
    ],
)
def test_a_model_that_raises_fails_the_calls_of_that_batch_by_its_name(error: Exception, says: str) -> None:
    made = joined(FakeModel(fails=error))
    with pytest.raises(TeacherError, match=f"(?s)teacher wise must score 1 completions of up to 4 tokens.*{says}"):
        asyncio.run(made.score([request(3)], ONE))
    assert made.problem is None and made.busy_since is None
    made.close()


def test_a_cuda_context_that_met_an_error_asks_to_be_replaced() -> None:
    made = joined(FakeModel(fails=torch.AcceleratorError("device-side assert")))
    with pytest.raises(TeacherError, match="device-side assert"):
        asyncio.run(made.score([request(3)], ONE))
    assert made.problem is not None and "device-side assert" in made.problem
    made.close()


def test_a_pass_that_hangs_fails_its_call_and_is_a_problem() -> None:
    async def run() -> None:
        first = asyncio.ensure_future(made.score([request(1)], ONE))
        await asyncio.to_thread(model.begun.wait, 20)
        second = asyncio.ensure_future(made.score([request(2)], TWO))
        change = asyncio.ensure_future(made.alone(lambda: None, name="pull"))
        with pytest.raises(TeacherError, match=re.escape("within 0.2 s (timeout_s)")):
            await first
        with pytest.raises(EngineError, match=r"must be replaced before it can pull.*within 0.2 s"):
            await change
        # The one behind it is not answered: its caller asks again once the actor is back.
        await asyncio.sleep(0)
        assert not second.done()
        second.cancel()
        go.set()

    go = threading.Event()
    model = FakeModel(go=go)
    made = joined(model, timeout_s=0.2)
    asyncio.run(run())
    assert made.problem is not None and "teacher wise must finish a forward pass" in made.problem
    made.close()


def test_what_a_caller_gave_up_on_is_not_computed() -> None:
    async def run() -> list[int]:
        first = asyncio.ensure_future(made.score([request(1)], ONE))
        await asyncio.to_thread(model.begun.wait, 20)
        second, third = (asyncio.ensure_future(made.score([request(length)], ONE)) for length in (2, 3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        go.set()
        await first
        return lengths(await third)

    go = threading.Event()
    model = FakeModel(go=go)
    made = joined(model)
    assert asyncio.run(run()) == [3]
    assert model.forwards == [[1], [3]]
    made.close()


def test_an_engine_is_asked_by_several_calls_at_once() -> None:
    async def run() -> list[list[int]]:
        calls = [asyncio.ensure_future(made.score([request(length)], ONE)) for length in (1, 2)]
        await until(lambda: len(asked) == 2)
        assert made.busy_since is not None
        go.set()
        return [lengths(await call) for call in calls]

    def ask(requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        asked.append(question)
        assert go.wait(20)
        return scores(requests)

    go, stopped, asked = threading.Event(), [], []
    made = AskedScoring(ask, actor="teacher-wise-0", threads=2, stop=lambda: stopped.append(True))
    assert asyncio.run(run()) == [[1], [2]]
    assert (made.progress, made.busy_since, len(made.spans())) == (2, None, 2)
    made.close()
    assert stopped == [True]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeadlineError("vllm must score 3 sequences"), TeacherError),
        (EngineError("vllm failed"), TeacherError),
        (TeacherError("HTTP 500"), TeacherError),
        (ConfigError("the temperature must be 1"), ConfigError),
    ],
)
def test_whatever_fails_behind_it_is_the_teachers_failure_and_a_wrong_question_stays_one(
    error: Exception, kind: type[Exception]
) -> None:
    def ask(requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        raise error

    made = AskedScoring(ask, actor="teacher-wise-0", threads=1, broken=lambda: "no step finished")
    with pytest.raises(kind, match=str(error)) as raised:
        asyncio.run(made.score([request(1)], ONE))
    assert type(raised.value) is kind and made.busy_since is None
    assert made.problem == "no step finished"
    made.close()
