"""Whether what a group brings from its teachers can be what teachers said: lengths, shapes, numbers.

Checked before a group is stored and when it is read again, so that a damaged file teaches nothing.
"""

from __future__ import annotations

import numpy as np

from trl_ray.errors import DataError
from trl_ray.types import Completion, RolloutGroup, TeacherContext, TeacherScores

_FLAGS = ("is_distilled", "has_feedback", "uses_feedback")


def check_teaching(group: RolloutGroup, where: str) -> None:
    """Check contexts and teachings of a group against its completions.

    Args:
        group: with or without teachers.
        where: names it in messages.

    Raises:
        DataError: another number of them than completions, teachings without contexts, a fact of a wrong type,
            another length or shape than the completion has, or NaN.
    """
    count = len(group.completions)
    for name, items in (("contexts", group.contexts), ("teachings", group.teachings)):
        if len(items) not in {0, count}:
            raise DataError(f"A group must hold no {name} or one per completion; {where} holds {len(items)}.")
    if group.teachings and not group.contexts:
        raise DataError(f"Teachings must come with their contexts; {where} holds none.")
    for index, context in enumerate(group.contexts):
        _check_context(context, count, f"context {index} of {where}")
    for index, (scores, completion) in enumerate(zip(group.teachings, group.completions, strict=False)):
        if scores is None:
            if group.contexts[index].is_distilled:
                raise DataError(f"A completion that is distilled must be taught; completion {index} of {where} is not.")
            continue
        _check_scores(scores, completion, f"teaching {index} of {where}")


def _check_context(context: TeacherContext, count: int, where: str) -> None:
    for name in _FLAGS:
        if type(getattr(context, name)) is not bool:
            raise DataError(f"{name} must be true or false, got {getattr(context, name)!r} in {where}.")
    shown, cut = context.demonstration, context.num_cut
    if shown is not None and (type(shown) is not int or not 0 <= shown < count):
        raise DataError(f"demonstration must be a completion of {count} or None, got {shown!r} in {where}.")
    if type(cut) is not int or cut < 0:
        raise DataError(f"num_cut must be at least 0, got {cut!r} in {where}.")


def _check_scores(scores: TeacherScores, completion: Completion, where: str) -> None:
    length = len(completion.token_ids)
    if scores.version is not None and type(scores.version) is not int:
        raise DataError(f"version must be a whole number or None, got {scores.version!r} in {where}.")
    if len(scores.logprobs) != length or (scores.tail is not None and len(scores.tail) != length):
        raise DataError(f"A teacher must score all {length} tokens, {where} has {len(scores.logprobs)}.")
    ids, logprobs = scores.top_ids, scores.top_logprobs
    if (ids is None) != (logprobs is None):
        raise DataError(f"top_ids must come with top_logprobs, {where} has one of the two.")
    if (
        ids is not None
        and logprobs is not None
        and (ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != length)
    ):
        raise DataError(
            f"top_ids and top_logprobs must have one shape [{length}, K], {where} has {ids.shape} and {logprobs.shape}."
        )
    if not np.isfinite(scores.logprobs).all():
        raise DataError(f"A teacher's logprobs must be finite, those of {where} are not.")
    for name, numbers in (("top_logprobs", logprobs), ("tail", scores.tail)):
        if numbers is not None and np.isnan(numbers).any():
            raise DataError(f"A teacher's {name} must be numbers, those of {where} hold NaN.")
