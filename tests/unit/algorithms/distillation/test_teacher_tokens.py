"""What teachers say, at the trained tokens of samples: gaps, lists of unequal length, samples without a teacher."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from trl_ray.algorithms.distillation.teacher_signal import NO_TOKEN, teacher_tokens
from trl_ray.types import TeacherScores, TrainingSample

INF = math.inf


def sample(mask: list[bool], scores: TeacherScores | None) -> TrainingSample:
    return TrainingSample(
        group_id=0,
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.arange(len(mask), dtype=np.int32),
        loss_mask=np.array(mask),
        teacher=scores,
    )


def scores(
    logprobs: list[float],
    ids: list[list[int]] | None = None,
    top: list[list[float]] | None = None,
    tail: list[float] | None = None,
) -> TeacherScores:
    return TeacherScores(
        teacher="t",
        version=3,
        logprobs=np.array(logprobs, np.float32),
        top_ids=None if ids is None else np.array(ids, np.int32),
        top_logprobs=None if top is None else np.array(top, np.float32),
        tail=None if tail is None else np.array(tail, np.float32),
    )


WIDE = scores([-1, -2, -3], [[7, 8], [5, 6], [4, 0]], [[-1, -2], [-3, -4], [-5, -INF]], [-6, -7, -8])
NARROW = scores([-4], [[9]], [[-0.5]], [-9])


def test_only_trained_tokens_are_taken_and_a_place_for_no_token_has_the_id_of_none() -> None:
    found = teacher_tokens([sample([True, False, True], WIDE)])
    assert found.logprobs.tolist() == [-1, -3] and found.has_teacher.tolist() == [True]
    assert found.top_ids is not None and found.top_logprobs is not None and found.tail is not None
    assert found.top_ids.tolist() == [[7, 8], [4, NO_TOKEN]] and found.top_ids.dtype == torch.int64
    assert found.top_logprobs.tolist() == [[-1, -2], [-5, -INF]] and found.tail.tolist() == [-6, -8]


def test_shorter_lists_and_samples_without_a_teacher_are_filled_up() -> None:
    found = teacher_tokens([sample([True], NARROW), sample([True, True], None), sample([True] * 3, WIDE)])
    assert found.has_teacher.tolist() == [True, False, True]
    assert found.logprobs.tolist() == [-4, 0, 0, -1, -2, -3]
    assert found.top_ids is not None and found.top_logprobs is not None and found.tail is not None
    assert found.top_ids[:3].tolist() == [[9, NO_TOKEN], [NO_TOKEN] * 2, [NO_TOKEN] * 2]
    assert found.top_logprobs[:3].tolist() == [[-0.5, -INF], [-INF] * 2, [-INF] * 2]
    assert found.tail.tolist() == [-9, 0, 0, -6, -7, -8]


def test_a_tail_that_one_teacher_does_not_give_is_given_by_none() -> None:
    found = teacher_tokens([sample([True], NARROW), sample([True] * 3, dataclasses.replace(WIDE, tail=None))])
    assert found.tail is None and found.top_ids is not None


def test_teachers_who_were_asked_about_the_completions_alone_give_no_lists() -> None:
    found = teacher_tokens([sample([True, True], scores([-1, -2])), sample([True], None)])
    assert found.top_ids is found.top_logprobs is found.tail is None
    assert found.logprobs.tolist() == [-1, -2, 0]


def test_no_samples_give_no_tokens() -> None:
    found = teacher_tokens([])
    assert found.logprobs.shape == (0,) and found.has_teacher.shape == (0,)
