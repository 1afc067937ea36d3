"""Advantages of a group: how much better each completion did than its siblings.

rewards [groups][G] (None: nothing to score) --> advantages [groups][G] (0 where there was no score)

A = (r - mean of the group) / (std + 1e-4)     std: of the group, of the batch, or 1 for `none`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.sections import ScaleRewards

EPSILON = 1e-4
"""Added to the standard deviation, as TRL's GRPO does."""
Rewards = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advantages:
    """Advantages with the statistics they came from; one array per group because groups may differ in size."""

    values: tuple[NDArray[np.float64], ...]
    """[groups][G]"""
    means: NDArray[np.float64]
    """[groups] mean reward; NaN where a group has no score at all."""
    stds: NDArray[np.float64]
    """[groups] sample standard deviation (ddof 1); 0 where fewer than two completions have a score."""
    flat: NDArray[np.bool_]
    """[groups] True where all scores are equal, so that every advantage is 0."""


def group_advantages(rewards: Rewards, *, scale: ScaleRewards) -> Advantages:
    """Advantages as GRPO defines them, in float64 (https://arxiv.org/abs/2402.03300, section 4.1).

    A reward of None counts in no mean and no standard deviation, and its advantage is 0. `batch` divides by the
    standard deviation over the rewards of all groups (https://arxiv.org/abs/2508.08221) and `none` leaves the
    centred rewards alone, as Dr. GRPO does (https://arxiv.org/abs/2503.20783).
    """
    arrays = [np.array([np.nan if r is None else r for r in group], dtype=np.float64) for group in rewards]
    means = np.array([_mean(group) for group in arrays])
    stds = np.array([_std(group) for group in arrays])
    flat = np.array([_is_flat(group) for group in arrays], dtype=np.bool_)
    if scale is ScaleRewards.GROUP:
        divisors = stds + EPSILON
    elif scale is ScaleRewards.BATCH:
        divisors = np.full(len(arrays), (_std(np.concatenate(arrays)) if arrays else 0.0) + EPSILON)
    else:
        divisors = np.ones(len(arrays))
    values = []
    for group, mean, divisor, is_flat in zip(arrays, means, divisors, flat, strict=True):
        # A mean of equal floats can miss them by one rounding, which the small divisor would blow up.
        centred = np.zeros_like(group) if is_flat else group - mean
        values.append(np.nan_to_num(centred / divisor, nan=0.0))
    return Advantages(values=tuple(values), means=means, stds=stds, flat=flat)


def _is_flat(group: NDArray[np.float64]) -> bool:
    scored = group[~np.isnan(group)]
    return scored.size == 0 or bool(np.all(scored == scored[0]))


def _mean(group: NDArray[np.float64]) -> float:
    scored = group[~np.isnan(group)]
    return float(scored.mean()) if scored.size else float("nan")


def _std(group: NDArray[np.float64]) -> float:
    scored = group[~np.isnan(group)]
    return float(scored.std(ddof=1)) if scored.size > 1 else 0.0
