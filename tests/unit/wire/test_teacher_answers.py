"""An answer that cannot be true is refused, and the error names teacher, completion, token and field."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from teacher_batches import make_requests, make_scores
from trl_ray.config.teacher_options import PayloadDtype
from trl_ray.errors import TeacherError
from trl_ray.types import TeacherQuestion
from trl_ray.wire.teacher_answers import TeacherAnswer, check_answer, join_scores, log_tail, split_answer

LENGTHS = [3, 5, 4]
QUESTION = TeacherQuestion(vocab_size=50, top_k=4, tail=True)
REQUESTS = make_requests(LENGTHS)


def answer(**changes: Any) -> TeacherAnswer:
    """A right answer with some fields changed; the sampled tokens are none of the four."""
    return dataclasses.replace(join_scores(make_scores(REQUESTS, QUESTION)), **changes)


def changed(name: str, place: tuple[int, ...], value: float) -> TeacherAnswer:
    array = getattr(answer(), name).copy()
    array[place] = value
    return answer(**{name: array})


def check(given: TeacherAnswer, question: TeacherQuestion = QUESTION, **more: Any) -> None:
    check_answer(given, teacher="big", requests=REQUESTS, question=question, **more)


def test_a_right_answer_passes_and_splits_into_the_scores_it_was_made_of() -> None:
    scores = make_scores(REQUESTS, QUESTION)
    check(join_scores(scores))
    for one, again in zip(scores, split_answer(join_scores(scores), teacher="ours"), strict=True):
        assert (again.teacher, again.version) == ("ours", 3)
        for name in ("logprobs", "top_ids", "top_logprobs", "tail"):
            np.testing.assert_array_equal(getattr(again, name), getattr(one, name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed("logprobs", (3,), np.nan), "completion 1, token 0, logprobs"),
        (changed("logprobs", (11,), -np.inf), "completion 2, token 3, logprobs"),
        (changed("logprobs", (0,), 0.01), "completion 0, token 0, logprobs"),
        (changed("top_logprobs", (7, 2), np.nan), "completion 1, token 4, top_logprobs"),
        (changed("top_logprobs", (7, 2), 0.01), "completion 1, token 4, top_logprobs"),
        (changed("top_logprobs", (8, 0), -0.001), "completion 2, token 0, top_logprobs: must have a mass of 1"),
        (changed("top_logprobs", (8, 0), -20.0), "completion 2, token 0, top_logprobs: must have a mass of 1"),
        (changed("tail", (2,), np.nan), "completion 0, token 2, tail"),
        (changed("tail", (2,), 0.01), "completion 0, token 2, tail"),
        (changed("top_ids", (4, 1), 50), "completion 1, token 1, top_ids: must be ids of a vocabulary of 50, got 50"),
        (changed("top_ids", (4, 1), -1), "completion 1, token 1, top_ids: must be ids of a vocabulary of 50, got -1"),
        (answer(lengths=np.array([3, 5])), "completions: must be 3, got 2"),
        (answer(lengths=np.array([3, 4, 5])), "completion 1, length: must be 5 tokens, got 4"),
        (answer(logprobs=answer().logprobs[:-1]), r"logprobs: must have shape \(12,\), got \(11,\)"),
        (answer(tail=None), r"tail: must have shape \(12,\), got None"),
        (answer(top_ids=answer().top_ids[:, :3]), r"top_ids: must have shape \(12, 4\), got \(12, 3\)"),  # type: ignore[index]
        (answer(top_logprobs=None), r"top_logprobs: must have shape \(12, 4\), got None"),
    ],
)
def test_an_answer_that_cannot_be_true_is_refused_by_name(given: TeacherAnswer, message: str) -> None:
    with pytest.raises(TeacherError, match=f"teacher big: {message}"):
        check(given)


def test_a_place_without_any_token_is_refused() -> None:
    question = dataclasses.replace(QUESTION, tail=False)
    logprobs = answer().top_logprobs.copy()  # type: ignore[union-attr]
    logprobs[5, :] = -np.inf
    with pytest.raises(TeacherError, match="completion 1, token 2, top_logprobs: must hold a number"):
        check(answer(tail=None, top_logprobs=logprobs), question)
    # Improbable tokens are no missing ones.
    logprobs[5, :] = -500.0
    check(answer(tail=None, top_logprobs=logprobs), question)


def test_two_log_probs_of_one_token_must_agree() -> None:
    question = TeacherQuestion(vocab_size=50, top_k=50)
    right = join_scores(make_scores(REQUESTS, question))
    logprobs = right.logprobs.copy()
    logprobs[6] -= 0.2
    check(dataclasses.replace(right, logprobs=logprobs), question)
    logprobs[6] -= 0.1
    with pytest.raises(TeacherError, match="completion 1, token 3, logprobs: must be that of the same token"):
        check(dataclasses.replace(right, logprobs=logprobs), question)


def test_tokens_that_were_asked_about_must_come_back_in_their_order() -> None:
    requests = make_requests(LENGTHS, support=3)
    question = TeacherQuestion(vocab_size=50, top_k=2)
    right = join_scores(make_scores(requests, question))
    check_answer(right, teacher="big", requests=requests, question=question)
    ids = right.top_ids.copy()  # type: ignore[union-attr]
    ids[9, 2:] = ids[9, 2:][::-1]
    wrong = dataclasses.replace(right, top_ids=ids)
    with pytest.raises(TeacherError, match="completion 2, token 1, top_ids: must be those that were asked about"):
        check_answer(wrong, teacher="big", requests=requests, question=question)


def test_a_token_that_is_asked_about_and_among_the_teachers_own_counts_once() -> None:
    question = TeacherQuestion(vocab_size=50, top_k=50)
    requests = [dataclasses.replace(each, support_ids=each.completion_ids[:, None]) for each in REQUESTS]
    right = join_scores(make_scores(requests, question))
    assert np.isneginf(right.top_logprobs[:, 50]).all()  # type: ignore[index]
    check_answer(right, teacher="big", requests=requests, question=question)


def test_a_coarser_format_is_given_more_slack() -> None:
    top = answer().top_logprobs.copy()  # type: ignore[union-attr]
    # 1.01 of the largest probability of every place.
    top[:, 0] += np.log(np.float32(1.01))
    with pytest.raises(TeacherError, match="mass"):
        check(answer(top_logprobs=top))
    check(answer(top_logprobs=top), dtype=PayloadDtype.BFLOAT16)


def test_the_tail_is_the_mass_left_out_and_never_nothing() -> None:
    logprobs = np.array([[np.log(0.5), np.log(0.25)], [np.log(0.75), np.log(0.25)], [-np.inf, np.log(0.1)]], np.float32)
    np.testing.assert_allclose(log_tail(logprobs), np.log([0.25, 1e-7, 0.9]), rtol=1e-6)
    assert log_tail(np.full((1, 2), -np.inf, np.float32)) == 0
