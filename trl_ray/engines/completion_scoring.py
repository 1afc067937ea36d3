"""From a question about completions to checked scores, whatever software computes the answer and wherever it runs.

    question --check_question--> engine, server: logprobs [L], most probable tokens [L, W] --answer_of--> TeacherAnswer
    TeacherAnswer x B --finish_answers: checked, tail--> TeacherScores x B

W is more than `top_k` where what answers ranks ids that the question's vocabulary lacks, or cannot be asked for fewer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from trl_ray.errors import ConfigError
from trl_ray.types import FloatArray, IntArray, TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.teacher_answers import (
    TeacherAnswer,
    check_answer,
    join_scores,
    split_answer,
    tail_of,
)


def check_question(question: TeacherQuestion, *, vocab_size: int, engine: str) -> None:
    """Refuse what no engine with a vocabulary of `vocab_size` can answer.

    Raises:
        ConfigError: a larger vocabulary, a temperature that is no positive number, or more tokens than there are.
    """
    if not 1 <= question.vocab_size <= vocab_size:
        raise ConfigError(
            f"a teacher must know every token of the student's vocabulary, but {engine} has {vocab_size} and is asked "
            f"about {question.vocab_size}. Choose a teacher with the student's tokenizer."
        )
    if not (question.temperature > 0 and math.isfinite(question.temperature)):
        raise ConfigError(f"the temperature must be a positive number, got {question.temperature}. Correct it.")
    if not 0 <= question.top_k <= question.vocab_size:
        raise ConfigError(
            f"top_k must be in [0, {question.vocab_size}] (the vocabulary), got {question.top_k}. Correct it."
        )


def top_width(question: TeacherQuestion, *, vocab_size: int, spare: int) -> int:
    """W: the most probable tokens to compute, so that `top_k` of the question's vocabulary are among them.

    Args:
        question: what is asked.
        vocab_size: of the model, at least the question's.
        spare: how many at most to compute in vain.
    """
    return question.top_k + min(vocab_size - question.vocab_size, spare) if question.top_k else 0


def answer_of(
    logprobs: FloatArray,
    top_ids: IntArray,
    top_logprobs: FloatArray,
    *,
    question: TeacherQuestion,
    version: int | None = None,
) -> TeacherAnswer:
    """What is said of one completion, without the tail.

    Args:
        logprobs: [L] of its own tokens.
        top_ids: [L, W] the model's most probable tokens, most probable first.
        top_logprobs: [L, W] theirs.
        question: what was asked.
        version: of the weights; None: it is not told.
    """
    ids, values = _known(top_ids, top_logprobs, question)
    return TeacherAnswer(
        lengths=np.array([len(logprobs)], dtype=np.int64),
        logprobs=logprobs,
        top_ids=ids if question.top_k else None,
        top_logprobs=values if question.top_k else None,
        version=version,
    )


def finish_answers(
    answers: Sequence[TeacherAnswer], *, requests: Sequence[TeacherRequest], question: TeacherQuestion, teacher: str
) -> list[TeacherScores]:
    """Check what was computed, and take the tail from what has been checked.

    Args:
        answers: [B] one for each request, all of one weight version.
        requests: [B]
        question: what was asked.
        teacher: the name that the scores bear.

    Raises:
        TeacherError: it cannot be true.
    """
    if not answers:
        return []
    whole = join_scores([scores for answer in answers for scores in split_answer(answer, teacher=teacher)])
    told = dataclasses.replace(question, tail=False)
    check_answer(whole, teacher=teacher, requests=requests, question=told)
    if question.tail:
        whole = dataclasses.replace(whole, tail=tail_of(whole.top_logprobs, tokens=len(whole.logprobs)))
    return split_answer(whole, teacher=teacher)


def _known(ids: IntArray, logprobs: FloatArray, question: TeacherQuestion) -> tuple[IntArray, FloatArray]:
    """The first `top_k` of each row that are ids of the question's vocabulary.

    Where too many are not, some stay, and the check names them.
    """
    if ids.shape[1] == question.top_k:
        return ids, logprobs
    # Stable: those that are known come first, each kind in the order it had.
    order = np.argsort(ids >= question.vocab_size, axis=1, kind="stable")[:, : question.top_k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
