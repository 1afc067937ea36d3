"""Questions about completions on the engine's thread: what is refused, which version answers, what is waited for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from completion_scores import check_scores
from teacher_batches import make_requests
from tiny_models import VOCAB_SIZE, build_tokenizer, random_model
from trl_ray.engines.backend import CHECKPOINT_VERSION, Finished, Limits
from trl_ray.engines.completion_scoring import answer_of, top_width
from trl_ray.engines.thread import EngineThread
from trl_ray.engines.transformers import TransformersEngine
from trl_ray.errors import ConfigError, DataError, DeadlineError, EngineError, TeacherError
from trl_ray.types import (
    GenerationRequest,
    SamplingParams,
    TeacherQuestion,
    TeacherRequest,
    WeightPayload,
    WeightVersion,
)
from trl_ray.wire.teacher_answers import TeacherAnswer

LN2 = math.log(2)
QUESTION = TeacherQuestion(vocab_size=10, top_k=1, tail=True)


def request(*, prompt: int = 2, completion: int = 3) -> TeacherRequest:
    return TeacherRequest(prompt_ids=np.zeros(prompt, np.int32), completion_ids=np.full(completion, 1, np.int32))


class FakeBackend:
    """Answers one question a step: every token is the likelier one of two with probability a half."""

    def __init__(
        self, *, before_step: Callable[[FakeBackend], None] = lambda backend: None, wrong: bool = False
    ) -> None:
        self.before_step, self.wrong = before_step, wrong
        self.version = CHECKPOINT_VERSION.version
        self.asked: list[tuple[str, TeacherRequest]] = []
        self.answered: list[str] = []

    def build(self) -> Limits:
        return Limits(max_model_len=8, vocab_size=10, manifest=())

    def check_question(self, requests: Any, question: TeacherQuestion) -> None:
        if question.temperature != 1:
            raise ConfigError("no such temperature")

    def add_question(self, key: str, asked: TeacherRequest, question: TeacherQuestion) -> None:
        if len(asked.completion_ids) == 1:
            raise ValueError("one")
        self.asked.append((key, asked))

    def abort(self, keys: Any) -> None:
        self.asked = [each for each in self.asked if each[0] not in set(keys)]

    def step(self) -> list[Finished]:
        self.before_step(self)
        key, asked = self.asked.pop(0)
        self.answered.append(key)
        length = len(asked.completion_ids)
        half = np.full(length, math.nan if self.wrong else -LN2, np.float32)
        answer = TeacherAnswer(
            lengths=np.array([length]),
            logprobs=half,
            top_ids=np.ones((length, 1), np.int32),
            top_logprobs=half[:, None],
            version=self.version,
        )
        return [Finished(key=key, result=answer)]

    def load(self, payload: WeightPayload) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def engine_of(backend: FakeBackend) -> EngineThread:
    return EngineThread(backend, name="fake", max_num_seqs=4, hang_deadline_s=20)  # type: ignore[arg-type]


def test_scores_bear_name_version_and_the_mass_left_out() -> None:
    engine = engine_of(FakeBackend())
    scores = engine.score_completions([request(), request(completion=5)], QUESTION, deadline_s=20, teacher="big")
    assert [(each.teacher, each.version, len(each.logprobs)) for each in scores] == [("big", 0, 3), ("big", 0, 5)]
    for each in scores:
        assert each.tail is not None
        np.testing.assert_allclose(each.tail, -LN2, atol=1e-6)
    [named] = engine.score_completions([request()], QUESTION, deadline_s=20)
    assert named.teacher == "fake"
    assert engine.score_completions([], QUESTION, deadline_s=20) == []
    engine.close()


def test_all_scores_of_a_call_are_of_one_version_those_overtaken_are_asked_again() -> None:
    def update(backend: FakeBackend) -> None:
        if len(backend.answered) == 2:
            backend.version = 5

    backend = FakeBackend(before_step=update)
    engine = engine_of(backend)
    scores = engine.score_completions([request() for _ in range(4)], QUESTION, deadline_s=20)
    assert [each.version for each in scores] == [5] * 4
    assert len(backend.answered) == 6
    engine.close()


def test_what_cannot_be_true_is_an_error_of_the_teacher() -> None:
    engine = engine_of(FakeBackend(wrong=True))
    with pytest.raises(TeacherError, match=r"teacher big: completion 0, token 0"):
        engine.score_completions([request()], QUESTION, deadline_s=20, teacher="big")
    assert engine.broken is None
    engine.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 11}, "every token of the student's vocabulary"),
        ({"vocab_size": 0}, "every token of the student's vocabulary"),
        ({"temperature": 0.0}, "a positive number"),
        ({"temperature": math.inf}, "a positive number"),
        ({"temperature": math.nan}, "a positive number"),
        ({"temperature": 0.5}, "no such temperature"),
        ({"top_k": 11}, "top_k must be in"),
        ({"top_k": -1}, "top_k must be in"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(changes: dict[str, Any], words: str) -> None:
    engine = engine_of(FakeBackend())
    with pytest.raises(ConfigError, match=words):
        engine.score_completions([request()], TeacherQuestion(**{"vocab_size": 10, **changes}), deadline_s=20)
    engine.close()


@pytest.mark.parametrize(("prompt", "completion"), [(0, 3), (3, 0), (4, 5), (8, 1)])
def test_an_empty_or_overlong_request_is_refused_by_its_number(prompt: int, completion: int) -> None:
    engine = engine_of(FakeBackend())
    with pytest.raises(DataError, match="completion 1 must have"):
        engine.score_completions([request(), request(prompt=prompt, completion=completion)], QUESTION, deadline_s=20)
    assert len(engine.score_completions([request(prompt=4, completion=4)], QUESTION, deadline_s=20)) == 1
    engine.close()


def test_a_request_that_the_back_end_refuses_fails_and_takes_the_others_out_of_the_queue() -> None:
    may_go = threading.Event()

    def wait(backend: FakeBackend) -> None:
        assert may_go.wait(20)

    backend = FakeBackend(before_step=wait)
    engine = engine_of(backend)
    with pytest.raises(EngineError, match="one"):
        engine.score_completions([request(completion=1), request(), request()], QUESTION, deadline_s=20)
    may_go.set()
    engine.score_completions([request()], QUESTION, deadline_s=20)
    # At most the one that was under way when the call failed.
    assert len(backend.answered) <= 2 and backend.asked == []
    engine.close()


def test_a_deadline_that_passes_is_named_and_nothing_stays_in_the_queue() -> None:
    engine = engine_of(backend := FakeBackend())
    engine.pause()
    with pytest.raises(DeadlineError, match=r"score 2 sequences within 0.05 s.*paused"):
        engine.score_completions([request(), request()], QUESTION, deadline_s=0.05)
    engine.resume()
    engine.score_completions([request()], QUESTION, deadline_s=20)
    assert len(backend.answered) == 1
    engine.close()


def test_a_closed_engine_is_asked_nothing() -> None:
    engine = engine_of(FakeBackend())
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.score_completions([request()], QUESTION, deadline_s=20)


def test_ids_that_the_student_lacks_make_room_for_those_it_has() -> None:
    question = TeacherQuestion(vocab_size=6, top_k=2)
    assert top_width(question, vocab_size=10, spare=8) == 6
    assert top_width(question, vocab_size=10, spare=3) == 5
    assert top_width(question, vocab_size=6, spare=8) == 2
    assert top_width(TeacherQuestion(vocab_size=6), vocab_size=10, spare=8) == 0
    ids = np.array([[7, 3, 9, 1], [0, 5, 8, 2], [9, 8, 7, 4]], np.int32)
    logprobs = np.array([[-1, -2, -3, -4]] * 3, np.float32)
    answer = answer_of(np.zeros(3, np.float32), ids, logprobs, question=question, version=0)
    assert answer.top_ids is not None and answer.top_logprobs is not None
    assert answer.top_ids.tolist() == [[3, 1], [0, 5], [4, 9]]  # the check names the last one
    assert answer.top_logprobs.tolist() == [[-2, -4], [-1, -2], [-4, -1]]


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    made = TransformersEngine(model=random_model(), tokenizer=build_tokenizer(), max_model_len=256, max_num_seqs=4)
    yield made
    made.close()


@pytest.mark.parametrize(
    "question",
    [
        TeacherQuestion(vocab_size=VOCAB_SIZE),
        TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=0.3, top_k=7, tail=True),
        TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=2.0, top_k=VOCAB_SIZE),
        TeacherQuestion(vocab_size=256, top_k=256, tail=True),
    ],
)
def test_a_transformers_engine_says_what_its_model_says(engine: TransformersEngine, question: TeacherQuestion) -> None:
    requests = make_requests([5, 40, 1, 17], vocab_size=256)
    scores = engine.score_completions(requests, question, deadline_s=60)
    check_scores(random_model(), requests, question, scores, tolerance=1e-5, over=question.vocab_size)


def test_questions_about_given_tokens_and_others_that_wait_together_are_not_mixed_up(
    engine: TransformersEngine,
) -> None:
    asked = [
        (make_requests([4, 9], support=3, vocab_size=256), TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=2, tail=True)),
        (make_requests([6], vocab_size=256), TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=0.5)),
        (make_requests([6, 2], vocab_size=256, seed=3), TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=2, tail=True)),
    ]
    found: dict[int, Any] = {}
    engine.pause()
    threads = [
        threading.Thread(
            target=lambda place, call: found.update({place: engine.score_completions(*call, deadline_s=60)}),
            args=(place, call),
        )
        for place, call in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    engine.resume()
    for thread in threads:
        thread.join()
    for place, (requests, question) in enumerate(asked):
        check_scores(random_model(), requests, question, found[place], tolerance=1e-5)


def test_what_is_generated_does_not_depend_on_what_was_asked_in_between(engine: TransformersEngine) -> None:
    def generate() -> list[tuple[list[int], bytes]]:
        asked = [
            GenerationRequest(
                request_id=str(length),
                prompt_ids=np.arange(length, dtype=np.int32),
                n=2,
                sampling=SamplingParams(max_tokens=20),
                seed=length,
            )
            for length in (3, 17)
        ]
        done = [future.result(timeout=60) for future in engine.submit(asked)]
        return [(each.token_ids.tolist(), each.logprobs.tobytes()) for group in done for each in group]

    before = generate()
    engine.score_completions(
        make_requests([5, 40], vocab_size=256), TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=2), deadline_s=60
    )
    assert generate() == before


def test_given_tokens_outside_the_vocabulary_fail_alone(engine: TransformersEngine) -> None:
    bad = TeacherRequest(
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.array([2], np.int32),
        support_ids=np.array([[VOCAB_SIZE]], np.int32),
    )
    with pytest.raises(EngineError, match="vocabulary"):
        engine.score_completions([bad], TeacherQuestion(vocab_size=VOCAB_SIZE), deadline_s=60)
    assert engine.broken is None
    assert WeightVersion(version=0, checksum="checkpoint") == engine.version
