"""Advantages: how much better each completion did than what one could expect of it.

sum, then normalise:  rewards [groups][G] --baseline--> --scale--> --(normalize over the step)--> advantages [groups][G]
normalise, then sum:  parts [groups][G][K] --group mean, group std--> --weighted sum--> --step mean, step std--> (GDPO)

| method                 | baseline      | scale | normalize | source                           |
|------------------------|---------------|-------|-----------|----------------------------------|
| GRPO                   | group_mean    | group | no        | https://arxiv.org/abs/2402.03300 |
| Dr. GRPO               | group_mean    | none  | no        | https://arxiv.org/abs/2503.20783 |
| RLOO                   | leave_one_out | none  | optional  | https://arxiv.org/abs/2402.14740 |
| REINFORCE++            | none          | none  | yes       | https://arxiv.org/abs/2501.03262 |
| REINFORCE++ (baseline) | group_mean    | none  | yes       | https://arxiv.org/abs/2501.03262 |

An advantage is one number for its whole completion. REINFORCE++ with a KL in the reward differs from its paper in that:
there a token gets the KL of the tokens after it only, which has the same mean gradient and less noise.

A completion without a score (None) enters no statistic and gets 0. One whose reward is NaN or infinite enters none
either, but gets NaN, so that the learner meets it, names it and skips the step. Groups without differences get exactly
0 wherever the baseline is one of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.losses.advantage_options import AdvantageBaseline, ScaleRewards

EPSILON = 1e-4
"""Added to every standard deviation, as TRL's GRPO and RLOO do."""
Rewards: TypeAlias = Sequence[Sequence[float | None]]
Parts: TypeAlias = Sequence[Sequence[Sequence[float | None]]]
"""[groups][G][K] rewards of K functions."""
_Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advantages:
    """One array per group because groups may differ in size."""

    values: tuple[NDArray[np.float64], ...]
    """[groups][G]"""
    flat: NDArray[np.bool_]
    """[groups] True where all scores are equal, so that the group itself has nothing to tell."""


def group_advantages(
    rewards: Rewards,
    *,
    scale: ScaleRewards,
    baseline: AdvantageBaseline = AdvantageBaseline.GROUP_MEAN,
    normalize: bool = False,
) -> Advantages:
    """Advantages from total rewards, in float64.

    Args:
        rewards: [groups][G]; None where there is no score.
        scale: the standard deviation that divides: of the group, of all rewards of the step
            (https://arxiv.org/abs/2508.08221), or none.
        baseline: what is taken from a reward. `leave_one_out` is the mean of the others that have a score; without
            any other the advantage is 0.
        normalize: shift and scale to mean 0 and deviation 1 over the step, as the last thing.

    Returns:
        Advantages [groups][G].
    """
    arrays = [_known(group) for group in rewards]
    flat = np.array([_is_flat(group) for group in arrays], dtype=np.bool_)
    divisors = _divisors(arrays, scale)
    values = [_centred(group, baseline) / divisor for group, divisor in zip(arrays, divisors, strict=True)]
    if normalize:
        # Without a baseline a group of equal rewards is not at 0, and shifts like any other.
        values = _normalized(values, keep=flat & (baseline is not AdvantageBaseline.NONE))
    # Statistics first, what is no number last: one bad reward must not spoil the advantages of all others.
    return Advantages(values=_finished(values, [_poisoned(group) for group in rewards]), flat=flat)


def objective_advantages(parts: Parts, *, weights: Sequence[float] | None = None) -> Advantages:
    """Advantages from K rewards, each normalised within its group before they are added up, in float64.

    So no function drowns another by its range (GDPO, https://arxiv.org/abs/2601.05242). The sum is normalised
    over the step. A function that has no score for a completion adds 0 to it, as does one that scored only one
    completion of the group.

    Args:
        parts: [groups][G][K] in the order of the functions; None where a function has no score.
        weights: [K]; None weighs all 1.

    Returns:
        Advantages [groups][G].
    """
    combined, flat, poisoned = [], [], []
    for group in parts:
        columns = [_known([row[k] for row in group]) for k in range(len(group[0]) if group else 0)]
        factors = [1.0] * len(columns) if weights is None else list(weights)
        assert len(factors) == len(columns), f"one weight per function, got {len(factors)} for {len(columns)}"
        scores = [_centred(column, AdvantageBaseline.GROUP_MEAN) / (_std(column) + EPSILON) for column in columns]
        # A function that abstained moves nothing; its NaN would swallow what the others say.
        total = sum((w * np.nan_to_num(z, nan=0.0) for w, z in zip(factors, scores, strict=True)), np.zeros(len(group)))
        bad = np.array([any(_is_bad(value) for value in row) for row in group], dtype=np.bool_)
        nobody = np.array([all(value is None for value in row) for row in group], dtype=np.bool_)
        # Neither is a score, so that both stay out of the statistics of the step.
        combined.append(np.where(bad | nobody, np.nan, total))
        flat.append(all(_is_flat(column) for column in columns))
        poisoned.append(bad)
    keep = np.array(flat, dtype=np.bool_)
    return Advantages(values=_finished(_normalized(combined, keep=keep), poisoned), flat=keep)


def clip_reward(reward: float, bounds: tuple[float, float] | None) -> float:
    """A total reward held between two bounds; None leaves it alone."""
    return reward if bounds is None else float(np.clip(reward, *bounds))


def group_deviations(rewards: Rewards) -> NDArray[np.float64]:
    """[groups] sample standard deviations (ddof 1); 0 where fewer than two completions have a score."""
    return np.array([_std(_known(group)) for group in rewards], dtype=np.float64)


def _is_bad(reward: float | None) -> bool:
    return reward is not None and not np.isfinite(reward)


def _poisoned(group: Sequence[float | None]) -> NDArray[np.bool_]:
    """[G] True where a reward is NaN or infinite."""
    return np.array([_is_bad(reward) for reward in group], dtype=np.bool_)


def _known(group: Sequence[float | None]) -> _Array:
    """[G] rewards; NaN where there is none that could enter a statistic."""
    return np.array([np.nan if r is None or _is_bad(r) else r for r in group], dtype=np.float64)


def _centred(group: _Array, baseline: AdvantageBaseline) -> _Array:
    """[G] rewards less their baseline; NaN where there is no reward or no baseline."""
    scored = group[~np.isnan(group)]
    if baseline is AdvantageBaseline.NONE or not scored.size:
        return group
    # There are no others that it could be held against.
    if baseline is AdvantageBaseline.LEAVE_ONE_OUT and scored.size == 1:
        return np.full_like(group, np.nan)
    if _is_flat(group):
        # A mean of equal floats can miss them by one rounding, which the small divisor would blow up.
        return np.where(np.isnan(group), np.nan, 0.0)
    if baseline is AdvantageBaseline.LEAVE_ONE_OUT:
        return np.asarray(group - (scored.sum() - group) / (scored.size - 1))
    return np.asarray(group - scored.mean())


def _divisors(groups: Sequence[_Array], scale: ScaleRewards) -> list[float]:
    """[groups]"""
    match scale:
        case ScaleRewards.GROUP:
            return [_std(group) + EPSILON for group in groups]
        case ScaleRewards.BATCH:
            return [(_std(np.concatenate(groups)) if groups else 0.0) + EPSILON] * len(groups)
        case ScaleRewards.NONE:
            return [1.0] * len(groups)


def _normalized(groups: Sequence[_Array], *, keep: NDArray[np.bool_]) -> list[_Array]:
    """Shift and scale to mean 0 and deviation 1 over the step.

    Args:
        groups: [groups][G]; NaN enters no statistic.
        keep: [groups] True where all values are 0 and stay it: deviations from a group's own baseline add up to 0, so
            the mean of the step is 0 too, but for rounding.
    """
    pooled = np.concatenate(groups) if groups else np.zeros(0)
    scored = pooled[~np.isnan(pooled)]
    # As for a group: what rounding leaves of equal numbers must not be divided by the small divisor.
    if _is_flat(pooled):
        return [np.where(np.isnan(group), np.nan, 0.0) for group in groups]
    mean, divisor = scored.mean(), _std(pooled) + EPSILON
    return [group if still else (group - mean) / divisor for group, still in zip(groups, keep, strict=True)]


def _finished(groups: Sequence[_Array], poisoned: Sequence[NDArray[np.bool_]]) -> tuple[_Array, ...]:
    """[groups][G] with 0 for those without a score and NaN for those whose score is no number."""
    pairs = zip(groups, poisoned, strict=True)
    return tuple(np.where(bad, np.nan, np.nan_to_num(group, nan=0.0)) for group, bad in pairs)


def _is_flat(group: _Array) -> bool:
    scored = group[~np.isnan(group)]
    return scored.size == 0 or bool(np.all(scored == scored[0]))


def _std(group: _Array) -> float:
    scored = group[~np.isnan(group)]
    # The deviation of one number is unknown; NaN would reach the advantage through the divisor.
    return float(scored.std(ddof=1)) if scored.size > 1 else 0.0
