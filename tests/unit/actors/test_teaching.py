"""How a group gets its teachers' scores: contexts, who is asked, every way to fail, and how often it may."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fakes import FakeHandle, in_turn, until
from tiny_models import build_tokenizer
from trl_ray.actors.teaching import Taught, TeacherErrorKind, TeacherSeat, Teaching, TeachingPlan
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.errors import ActorLostError, DeadlineError, EngineError, TeacherError
from trl_ray.types import (
    Completion,
    FinishReason,
    Prompt,
    Reward,
    TeacherQuestion,
    TeacherRequest,
    TeacherScores,
    VersionSpan,
)
from trl_ray.wire.teacher_payload import encode_scores

VOCAB = 300
QUESTION = TeacherQuestion(vocab_size=VOCAB, top_k=2, tail=True)
TOKENIZER = build_tokenizer()
SHORT = RepromptConfig(
    reprompt_template="{prompt}{solution}{feedback}",
    solution_template="+{successful_previous_attempt}",
    feedback_template="-{feedback_raw}",
    include_environment_feedback=True,
)


def ids(text: str) -> np.ndarray:
    return np.array(TOKENIZER(text)["input_ids"], np.int32)


def prompt(**columns: Any) -> Prompt:
    return Prompt(prompt_id="0:7", token_ids=ids("q"), text="q", columns=columns)


def completion(text: str, *, version: int = 5) -> Completion:
    tokens = ids(text)
    return Completion(
        token_ids=tokens,
        logprobs=np.full(len(tokens), -1, np.float32),
        versions=(VersionSpan(version=version, start=0, end=len(tokens)),),
        finish_reason=FinishReason.STOP,
        text=text,
    )


COMPLETIONS = (completion("ab"), completion("cde"))
UNREWARDED = (Reward(total=None, parts={}),) * 2


def scores_of(request: TeacherRequest, *, version: int | None = 3, logprob: float = -0.5) -> TeacherScores:
    """The teacher holds every token of the completion for likely, and token 299 for the next best."""
    length = len(request.completion_ids)
    top = np.full((length, 2), [logprob, -2.0], np.float32)
    return TeacherScores(
        teacher="t",
        version=version,
        logprobs=np.full(length, logprob, np.float32),
        top_ids=np.stack([request.completion_ids, np.full(length, 299, np.int32)], axis=1),
        top_logprobs=top,
        tail=np.log(1 - np.exp(top.astype(np.float64)).sum(axis=1)).astype(np.float32),
    )


def frame(requests: Any, question: TeacherQuestion = QUESTION, **changes: Any) -> np.ndarray:
    return encode_scores([replace(scores_of(each), **changes) for each in requests], question=question)


def answering(name: str = "teacher-0", **options: Any) -> FakeHandle:
    def score(*, requests: Any, question: TeacherQuestion, dtype: Any, ids: Any) -> np.ndarray:
        return frame(requests, question, **options)

    return FakeHandle(name=name, answers={"score": score})


def failing(answer: Any, name: str = "teacher-0") -> FakeHandle:
    return FakeHandle(name=name, answers={"score": answer})


def plan(**options: Any) -> TeachingPlan:
    return TeachingPlan(**{"question": QUESTION, "timeout_s": 0.05, "max_attempts": 3} | options)


def taught_by(*copies: FakeHandle, rewards: Any = UNREWARDED, row: Prompt | None = None, **options: Any) -> Taught:
    teaching = Teaching(plan(**options), teachers={"t": copies}, tokenizer=TOKENIZER)
    return asyncio.run(teaching.teach(row or prompt(), COMPLETIONS, rewards))


def test_without_reprompts_every_completion_is_asked_about_behind_the_students_prompt() -> None:
    teacher = answering()
    taught = taught_by(teacher, payload_dtype=PayloadDtype.FLOAT16, payload_ids=PayloadIds.COMPACT)
    [call] = teacher.calls
    assert [each.prompt_ids.tolist() for each in call.kwargs["requests"]] == [ids("q").tolist()] * 2
    assert [each.completion_ids.tolist() for each in call.kwargs["requests"]] == [
        ids("ab").tolist(),
        ids("cde").tolist(),
    ]
    assert (call.kwargs["question"], call.kwargs["dtype"], call.kwargs["ids"]) == (QUESTION, "float16", "compact")
    assert taught.failure is None
    assert [len(scores.logprobs) for scores in taught.teachings if scores is not None] == [2, 3]
    assert all(context.is_distilled for context in taught.contexts)
    # The youngest token was sampled by version 5, the teacher's weights are those of 3.
    assert (taught.metrics["teacher/version_lag"], taught.metrics["teacher/attempts"]) == (2.0, 1.0)
    assert taught.metrics["time/teacher_s"] >= 0


def test_a_teacher_whose_weights_never_change_has_no_lag() -> None:
    assert "teacher/version_lag" not in taught_by(answering(version=None)).metrics


def test_only_what_is_distilled_is_asked_about() -> None:
    rewards = (Reward(total=0.0, parts={}), Reward(total=1.0, parts={}))
    teacher = answering()
    taught = taught_by(teacher, reprompt=SHORT, rewards=rewards)
    [request] = teacher.calls[0].kwargs["requests"]
    assert TOKENIZER.decode(request.prompt_ids) == "q+cde"
    first, second = taught.teachings
    assert first is not None and second is None
    assert [context.demonstration for context in taught.contexts] == [1, None]


def test_feedback_of_the_row_and_of_rewards_is_shown() -> None:
    rewards = (Reward(total=0.0, parts={}, extra={"feedback": "odd"}), Reward(total=0.0, parts={}))
    teacher = answering()
    taught_by(teacher, reprompt=SHORT, rewards=rewards, row=prompt(privileged_context="late"))
    shown = [TOKENIZER.decode(request.prompt_ids) for request in teacher.calls[0].kwargs["requests"]]
    assert shown == ["q-late\nodd", "q-late"]


def test_nobody_is_asked_when_nothing_is_distilled() -> None:
    teacher = answering()
    taught = taught_by(teacher, reprompt=SHORT)
    assert (teacher.calls, taught.teachings, taught.failure) == ([], (None, None), None)


def test_of_an_empty_completion_nothing_is_asked() -> None:
    teacher = answering()
    teaching = Teaching(plan(), teachers={"t": (teacher,)})
    empty = replace(completion("a"), token_ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32))
    taught = asyncio.run(teaching.teach(prompt(), (empty, COMPLETIONS[0]), UNREWARDED))
    assert [context.is_distilled for context in taught.contexts] == [False, True]
    assert taught.teachings[0] is None
    assert len(teacher.calls[0].kwargs["requests"]) == 1


def test_where_the_learner_holds_the_teacher_contexts_travel_alone() -> None:
    rewards = (Reward(total=0.0, parts={}), Reward(total=1.0, parts={}))
    teaching = Teaching(plan(asks=TeacherSeat.LEARNER, reprompt=SHORT), teachers={}, tokenizer=TOKENIZER)
    taught = asyncio.run(teaching.teach(prompt(), COMPLETIONS, rewards))
    assert [TOKENIZER.decode(context.prompt_ids) for context in taught.contexts] == ["q+cde", "q"]
    assert (taught.teachings, taught.failure, taught.metrics) == ((), None, {})


def wrong_length(requests: Any, **_: Any) -> np.ndarray:
    return frame([replace(each, completion_ids=each.completion_ids[:-1]) for each in requests])


def wrong_vocabulary(requests: Any, **_: Any) -> np.ndarray:
    return frame(requests, replace(QUESTION, vocab_size=VOCAB + 1))


def id_beyond_the_vocabulary(requests: Any, **_: Any) -> np.ndarray:
    scores = [scores_of(each) for each in requests]
    for each in scores:
        assert each.top_ids is not None
        each.top_ids[:, 1] = VOCAB
    return encode_scores(scores, question=QUESTION)


def with_nan(requests: Any, **_: Any) -> np.ndarray:
    return encode_scores([scores_of(each, logprob=float("nan")) for each in requests], question=QUESTION)


def flipped(requests: Any, **_: Any) -> np.ndarray:
    data = frame(requests).copy()
    data[-1] ^= 1
    return data


async def hung(**_: Any) -> None:
    raise DeadlineError("teacher-0.score must answer within 0.05 s, but did not.")


FAILURES = {
    "killed": (ActorLostError("teacher-0 died during score"), TeacherErrorKind.LOST, "died during score"),
    "hung": (hung, TeacherErrorKind.TIMEOUT, "must answer within"),
    "error": (TeacherError("teacher t: HTTP 500"), TeacherErrorKind.ERROR, "HTTP 500"),
    "nan": (with_nan, TeacherErrorKind.INVALID, "logprobs"),
    "wrong length": (wrong_length, TeacherErrorKind.INVALID, "must be 2 tokens, got 1"),
    "wrong vocabulary": (wrong_vocabulary, TeacherErrorKind.INVALID, "vocabulary"),
    "id beyond the vocabulary": (id_beyond_the_vocabulary, TeacherErrorKind.INVALID, "vocabulary of 300, got 300"),
    "flipped bit": (flipped, TeacherErrorKind.INVALID, "checksum"),
    "garbage": (np.arange(200, dtype=np.uint8), TeacherErrorKind.INVALID, "must begin with"),
    "no bytes": (np.zeros(0, np.uint8), TeacherErrorKind.INVALID, "header"),
    "no frame": ({"logprobs": [1]}, TeacherErrorKind.INVALID, "frame of bytes, got dict"),
    "wrong numbers": (np.zeros(400, np.float32), TeacherErrorKind.INVALID, "frame of bytes"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_named_and_tried_as_often_as_it_may(name: str) -> None:
    answer, kind, words = FAILURES[name]
    teacher = failing(answer)
    taught = taught_by(teacher)
    failure = taught.failure
    assert failure is not None
    assert (failure.teacher, failure.kind) == ("t", kind)
    assert words in failure.detail
    assert "asked 3 times" in failure.detail
    assert str(failure).startswith(f"teacher t ({kind.value}): ")
    assert (taught.contexts, taught.teachings) == ((), ())
    assert taught.metrics["teacher/attempts"] == 3.0
    # A lost actor is waited for within an attempt, so it is called more often.
    assert len(teacher.calls) == 3 or kind is TeacherErrorKind.LOST


def test_a_second_attempt_may_succeed() -> None:
    def score(**arguments: Any) -> np.ndarray:
        return next(answers)(**arguments)

    good = answering().answers["score"]
    answers = iter([with_nan, good])
    taught = taught_by(failing(score))
    assert taught.failure is None
    assert taught.metrics["teacher/attempts"] == 2.0


def test_a_lost_actor_is_waited_for_within_one_attempt() -> None:
    async def scenario() -> None:
        answers = in_turn(ActorLostError("gone"), ActorLostError("gone"), None)
        good = answering().answers["score"]
        teacher = failing(lambda **arguments: answers() or good(**arguments))
        teaching = Teaching(plan(timeout_s=30.0), teachers={"t": (teacher,)})
        taught = await teaching.teach(prompt(), COMPLETIONS, UNREWARDED)
        assert taught.failure is None
        assert taught.metrics["teacher/attempts"] == 1.0
        assert len(teacher.calls) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [ActorLostError("gone"), hung, with_nan])
def test_another_copy_is_asked_after_a_failure_at_once(answer: Any) -> None:
    # Long enough that a test that waits for the lost one does not end.
    first, second = failing(answer, "teacher-0"), answering("teacher-1")
    taught = taught_by(first, second, timeout_s=3600.0)
    assert taught.failure is None
    assert (len(first.calls), len(second.calls)) == (1, 1)


def test_delays_between_attempts_double_up_to_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        delays.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    assert taught_by(failing(with_nan), max_attempts=7, retry_delay_s=0.5).failure is not None
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]


def test_after_all_copies_have_failed_the_first_is_asked_again() -> None:
    first, second = failing(with_nan, "teacher-0"), failing(with_nan, "teacher-1")
    assert taught_by(first, second, max_attempts=4).failure is not None
    assert (len(first.calls), len(second.calls)) == (2, 2)


def test_the_copy_with_the_least_to_do_is_asked() -> None:
    async def scenario() -> None:
        release = asyncio.Event()
        good = answering().answers["score"]

        async def slow(**arguments: Any) -> np.ndarray:
            await release.wait()
            return good(**arguments)

        first, second = failing(slow, "teacher-0"), answering("teacher-1")
        teaching = Teaching(plan(timeout_s=60.0), teachers={"t": (first, second)})
        held = asyncio.create_task(teaching.teach(prompt(), COMPLETIONS, UNREWARDED))
        await until(lambda: bool(first.calls))
        for _ in range(3):
            assert (await teaching.teach(prompt(), COMPLETIONS, UNREWARDED)).failure is None
        assert (len(first.calls), len(second.calls)) == (1, 3)
        release.set()
        assert (await held).failure is None
        await teaching.teach(prompt(), COMPLETIONS, UNREWARDED)
        assert len(first.calls) == 2

    asyncio.run(scenario())


def test_a_column_says_whom_to_ask_and_without_one_it_is_the_first() -> None:
    async def scenario() -> None:
        maths, code = answering("maths-0"), answering("code-0")
        teachers = {"maths": (maths,), "code": (code,)}
        routed = Teaching(plan(column="who"), teachers=teachers)
        taught = await routed.teach(prompt(who="code"), COMPLETIONS, UNREWARDED)
        assert (len(maths.calls), len(code.calls)) == (0, 1)
        assert {scores.teacher for scores in taught.teachings if scores is not None} == {"code"}
        await Teaching(plan(), teachers=teachers).teach(prompt(who="code"), COMPLETIONS, UNREWARDED)
        assert (len(maths.calls), len(code.calls)) == (1, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize(("named", "words"), [("mats", "Did you mean 'maths'"), (None, "got None"), (3, "got 3")])
def test_a_row_that_names_nobody_is_a_failure_and_nobody_is_asked(named: Any, words: str) -> None:
    maths = answering("maths-0")
    teaching = Teaching(plan(column="who"), teachers={"maths": (maths,)})
    failure = asyncio.run(teaching.teach(prompt(who=named), COMPLETIONS, UNREWARDED)).failure
    assert failure is not None
    assert failure.kind is TeacherErrorKind.ERROR
    assert words in failure.detail and "'who' of prompt 0:7" in failure.detail
    assert maths.calls == []


class FakeEngine:
    """An engine that answers like a teacher; an exception is raised."""

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.broken = answer, None
        self.calls: list[tuple[Any, TeacherQuestion, str, float]] = []

    def score_completions(
        self, requests: Any, question: TeacherQuestion, *, teacher: str, deadline_s: float
    ) -> list[TeacherScores]:
        self.calls.append((requests, question, teacher, deadline_s))
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer(requests)
        # Weights were pulled between the first completion and the second.
        return [scores_of(request, version=index) for index, request in enumerate(requests)]


def taught_here(engine: FakeEngine) -> Taught:
    teaching = Teaching(plan(asks=TeacherSeat.OWN_ENGINE, column="who"), teachers={}, engine=engine)
    return asyncio.run(teaching.teach(prompt(), COMPLETIONS, UNREWARDED))


def test_the_workers_own_engine_stands_in_for_a_live_teacher() -> None:
    engine = FakeEngine()
    taught = taught_here(engine)
    [(requests, question, teacher, deadline_s)] = engine.calls
    assert (len(requests), question, teacher, deadline_s) == (2, QUESTION, "live", 0.05)
    assert [scores.version for scores in taught.teachings if scores is not None] == [0, 1]
    assert taught.metrics["teacher/version_lag"] == 5.0


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda requests: [scores_of(each, logprob=float("nan")) for each in requests], TeacherErrorKind.INVALID),
        (lambda requests: [scores_of(requests[0])], TeacherErrorKind.INVALID),
        (DeadlineError("must score within 0.05 s"), TeacherErrorKind.TIMEOUT),
        (EngineError("refused one sequence"), TeacherErrorKind.ERROR),
    ],
    ids=["nan", "too few", "hung", "refused"],
)
def test_what_the_own_engine_does_wrong_is_a_failure_like_any_other(answer: Any, kind: TeacherErrorKind) -> None:
    engine = FakeEngine(answer)
    failure = taught_here(engine).failure
    assert failure is not None
    assert (failure.teacher, failure.kind, len(engine.calls)) == ("live", kind, 3)


def test_an_own_engine_that_is_broken_is_the_workers_problem() -> None:
    engine = FakeEngine(EngineError("half loaded"))
    engine.broken = "half loaded"
    with pytest.raises(EngineError, match="half loaded"):
        taught_here(engine)
    assert len(engine.calls) == 1


def test_the_chat_template_is_told_what_the_students_prompt_was_told() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ mood }}:{{ messages[-1]['content'] }}"
    row = replace(prompt(privileged_context="late"), text=None, messages=({"role": "user", "content": "q"},))
    teacher = answering()
    options = plan(reprompt=SHORT, chat_template_kwargs={"mood": "calm"})
    teaching = Teaching(options, teachers={"t": (teacher,)}, tokenizer=tokenizer)
    asyncio.run(teaching.teach(row, COMPLETIONS, UNREWARDED))
    assert tokenizer.decode(teacher.calls[0].kwargs["requests"][0].prompt_ids) == "calm:q-late"
