"""Batches of completions with scores that a teacher could have given, from random logits.

one random distribution [V], turned by another number of ids for each token --> TeacherScores x B, as asked
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trl_ray.types import FloatArray, IntArray, TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.teacher_answers import log_tail

VOCAB = 50


def make_requests(
    lengths: Sequence[int], *, support: int = 0, vocab_size: int = VOCAB, seed: int = 0
) -> list[TeacherRequest]:
    """Requests about random completions of these lengths, behind prompts of 1, 2, 3 ... tokens."""
    rng = np.random.default_rng(seed)
    return [
        TeacherRequest(
            prompt_ids=rng.integers(0, vocab_size, 1 + index, dtype=np.int32),
            completion_ids=rng.integers(0, vocab_size, length, dtype=np.int32),
            support_ids=_distinct(rng, length, support, vocab_size) if support else None,
        )
        for index, length in enumerate(lengths)
    ]


def make_scores(
    requests: Sequence[TeacherRequest], question: TeacherQuestion, *, version: int | None = 3, seed: int = 1
) -> list[TeacherScores]:
    """What a teacher with random logits says."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, question.vocab_size) / question.temperature
    logprobs = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    order = np.argsort(-logprobs)[: question.top_k].astype(np.int32)
    return [
        _score(
            request,
            question,
            version,
            logprobs,
            order,
            rng.integers(0, question.vocab_size, request.completion_ids.shape),
        )
        for request in requests
    ]


def _score(
    request: TeacherRequest,
    question: TeacherQuestion,
    version: int | None,
    logprobs: FloatArray,
    order: IntArray,
    turns: NDArray[np.int64],
) -> TeacherScores:
    size, turns = question.vocab_size, turns[:, None]
    own = ((order + turns) % size).astype(np.int32)
    given = own[:, :0] if request.support_ids is None else request.support_ids
    ids = np.concatenate([own, given], axis=1)
    top = logprobs[(ids - turns) % size]
    repeats = (given[:, :, None] == own[:, None, :]).any(axis=2)
    top[:, question.top_k :][repeats] = -np.inf
    has_top = ids.shape[1] > 0
    return TeacherScores(
        teacher="ours",
        version=version,
        logprobs=logprobs[(request.completion_ids - turns[:, 0]) % size],
        top_ids=ids if has_top else None,
        top_logprobs=top if has_top else None,
        tail=log_tail(top) if question.tail else None,
    )


def _distinct(rng: np.random.Generator, length: int, width: int, vocab_size: int) -> IntArray:
    return np.stack([rng.permutation(vocab_size)[:width] for _ in range(length)]).astype(np.int32)
