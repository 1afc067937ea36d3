"""Whether self-distillation has anything to learn from, step by step, and when to say that it has not.

    RolloutGroup --self_distillation_group--> facts of a group
    groups of a step --self_distillation_metrics--> metrics --SelfDistillationDiagnostics.observe--> warnings

Names of metrics, tolerances and the rhythm of warnings are those of TRL's SDPO trainer. Training and evaluation have
diagnostics of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trl_ray.types import FloatArray, RolloutGroup

PREFIX = "self_distillation/"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelfDistillationGroup:
    """What became of the G completions of one prompt."""

    rewards: FloatArray
    """[G] in total; NaN where no reward function answered."""
    has_success: bool
    """Whether any completion is a success, whoever is shown it."""
    num_demonstrated: int
    """Completions whose teacher is shown a success."""
    num_with_feedback: int
    """Completions for which there is feedback."""
    num_feedback_used: int
    """Completions whose teacher is shown feedback."""
    num_distilled: int
    """Completions whose teacher is shown anything."""
    num_cut: int = 0
    """Completions whose teacher's prompt lost its head to max_reprompt_len."""
    parts: Mapping[str, FloatArray] = field(default_factory=dict)
    """[G] by reward function; NaN where it did not answer."""


def self_distillation_group(group: RolloutGroup, *, threshold: float) -> SelfDistillationGroup:
    """What became of one finished group, told from its rewards and the contexts of its teachers.

    Args:
        group: without contexts nothing of it was distilled.
        threshold: total reward from which a completion is a success (success_reward_threshold).
    """
    rewards, contexts = group.rewards, group.contexts
    names = dict.fromkeys(name for reward in rewards for name in reward.parts)
    return SelfDistillationGroup(
        rewards=_numbers([reward.total for reward in rewards]),
        has_success=any(reward.total is not None and reward.total >= threshold for reward in rewards),
        num_demonstrated=sum(context.demonstration is not None for context in contexts),
        num_with_feedback=sum(context.has_feedback for context in contexts),
        num_feedback_used=sum(context.uses_feedback for context in contexts),
        num_distilled=sum(context.is_distilled for context in contexts),
        num_cut=sum(context.num_cut > 0 for context in contexts),
        parts={name: _numbers([reward.parts.get(name) for reward in rewards]) for name in names},
    )


def _numbers(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float32)


def self_distillation_metrics(groups: Sequence[SelfDistillationGroup], *, flat_tolerance: float) -> dict[str, float]:
    """Metrics of one step, or of one evaluation.

    Standard deviations are the unbiased ones, 0 for a single reward. Unlike TRL's, those of groups are taken of the
    rewards whatever scale_rewards is.

    Args:
        groups: at least one.
        flat_tolerance: standard deviation up to which a group's rewards are all alike.

    Returns:
        By name, with the prefix ``self_distillation/``; rewards that nobody gave are left out.
    """
    assert groups, "metrics are of at least one group"
    total = sum(len(group.rewards) for group in groups)
    deviations = [_deviation(group.rewards) for group in groups]
    metrics = {
        "success_group_fraction": float(np.mean([group.has_success for group in groups])),
        "success_sample_fraction": sum(group.num_demonstrated for group in groups) / total,
        "feedback_available_fraction": sum(group.num_with_feedback for group in groups) / total,
        "feedback_used_fraction": sum(group.num_feedback_used for group in groups) / total,
        "reprompt_sample_fraction": sum(group.num_distilled for group in groups) / total,
        "reprompt_cut_fraction": sum(group.num_cut for group in groups) / total,
        "group_reward_std_mean": float(np.mean(deviations)),
        "flat_group_fraction": float(np.mean([deviation <= flat_tolerance for deviation in deviations])),
        **_spread(np.concatenate([group.rewards for group in groups])),
        **_parts(groups),
    }
    return {PREFIX + name: value for name, value in metrics.items()}


def _spread(rewards: FloatArray) -> dict[str, float]:
    known = rewards[~np.isnan(rewards)].astype(np.float64)
    if not len(known):
        return {"reward_std": 0.0}
    return {
        "reward_mean": float(known.mean()),
        "reward_std": _deviation(rewards),
        "reward_min": float(known.min()),
        "reward_max": float(known.max()),
    }


def _parts(groups: Sequence[SelfDistillationGroup]) -> dict[str, float]:
    means = {}
    for name in dict.fromkeys(name for group in groups for name in group.parts):
        values = np.concatenate([group.parts[name] for group in groups if name in group.parts]).astype(np.float64)
        if not np.isnan(values).all():
            means[f"rewards/{name}"] = float(np.nanmean(values))
    return means


def _deviation(rewards: FloatArray) -> float:
    known = rewards[~np.isnan(rewards)].astype(np.float64)
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


class Degeneracy(enum.StrEnum):
    """Ways in which a step can teach nothing; the values are TRL's names of their counters."""

    FLAT_REWARDS = "flat_rewards"
    INACTIVE_SELF_DISTILLATION = "inactive_self_distillation"
    NO_SUCCESSFUL_ROLLOUTS = "no_successful_rollouts"


_WARNINGS = {
    Degeneracy.FLAT_REWARDS: (
        "rewards should differ within groups, but all completions of the step got the same one: advantages are zero, "
        "and the policy term teaches nothing. Check that the reward function can tell completions apart"
    ),
    Degeneracy.INACTIVE_SELF_DISTILLATION: (
        "some completions should have a teacher that is told more than the student, but none has: there was neither a "
        "sibling's success nor feedback to show, and the distillation term teaches nothing. Check "
        "success_reward_threshold, use_successful_as_teacher and include_environment_feedback"
    ),
    Degeneracy.NO_SUCCESSFUL_ROLLOUTS: (
        "some completions should reach success_reward_threshold, but none of the step does. If it stays so, take "
        "easier prompts, lower the threshold, or shape the rewards"
    ),
}


class SelfDistillationDiagnostics:
    """Counts steps in a row in which nothing could be learnt, and says when to warn.

    A warning comes with the first such step and with every `warning_interval`-th in a row; a step in which there was
    something to learn begins the count anew.

    Args:
        warning_interval: steps; 0 neither counts nor warns.
        flat_tolerance: up to which deviations and fractions count as zero.
    """

    def __init__(self, *, warning_interval: int, flat_tolerance: float) -> None:
        self._interval, self._tolerance = warning_interval, flat_tolerance
        self._counts = dict.fromkeys(Degeneracy, 0)

    @property
    def counts(self) -> Mapping[Degeneracy, int]:
        """Degenerate steps in a row, up to now."""
        return dict(self._counts)

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        """Count one step.

        Args:
            metrics: of `self_distillation_metrics`.

        Returns:
            What to warn of, in words.
        """
        return [warning for kind in Degeneracy if (warning := self._count(kind, self._is_degenerate(kind, metrics)))]

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {kind.value: count for kind, count in self._counts.items()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` gave."""
        self._counts = {kind: int(state.get(kind.value, 0)) for kind in Degeneracy}

    def _is_degenerate(self, kind: Degeneracy, metrics: Mapping[str, float]) -> bool:
        if kind is Degeneracy.FLAT_REWARDS:
            is_flat = metrics[PREFIX + "reward_std"] <= self._tolerance
            return is_flat and metrics[PREFIX + "flat_group_fraction"] >= 1 - self._tolerance
        if kind is Degeneracy.INACTIVE_SELF_DISTILLATION:
            return metrics[PREFIX + "reprompt_sample_fraction"] <= self._tolerance
        return metrics[PREFIX + "success_group_fraction"] <= self._tolerance

    def _count(self, kind: Degeneracy, is_degenerate: bool) -> str | None:
        if not is_degenerate:
            self._counts[kind] = 0
        elif self._interval:
            self._counts[kind] += 1
            count = self._counts[kind]
            if count == 1 or count % self._interval == 0:
                return f"{_WARNINGS[kind]} (step {count} of this kind in a row)."
        return None
