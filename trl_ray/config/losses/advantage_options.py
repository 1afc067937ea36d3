"""The options that turn rewards into the training signal of each completion."""

from __future__ import annotations

import enum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trl_ray.config.base import FROM_STRING, Natural, Section, rule


class ScaleRewards(enum.StrEnum):
    """Which standard deviation divides the centred rewards."""

    GROUP = "group"
    BATCH = "batch"
    NONE = "none"


class AdvantageBaseline(enum.StrEnum):
    """What a completion's reward is compared with."""

    GROUP_MEAN = "group_mean"
    """The mean of its group, itself included (GRPO)."""
    LEAVE_ONE_OUT = "leave_one_out"
    """The mean of the others of its group (RLOO): unbiased."""
    NONE = "none"
    """Nothing; with `normalize_advantages` the mean of the step takes its place (REINFORCE++)."""


class Aggregation(enum.StrEnum):
    """How the rewards of several functions become one advantage."""

    SUM_THEN_NORMALIZE = "sum_then_normalize"
    NORMALIZE_THEN_SUM = "normalize_then_sum"
    """Each function's rewards are normalised within the group first, so that none drowns another (GDPO)."""


class ZeroVariance(enum.StrEnum):
    """What becomes of a group whose rewards are all equal (its advantages are all 0)."""

    KEEP = "keep"
    DROP = "drop"
    """Drop it and wait for another, as DAPO's dynamic sampling does."""


def _from_bool(value: Any) -> Any:
    """TRL's older spelling: true is ``group``, false is ``none``."""
    if not isinstance(value, bool):
        return value
    return ScaleRewards.GROUP if value else ScaleRewards.NONE


def _from_list(value: Any) -> Any:
    """A strict model takes no list for a tuple; YAML has nothing else."""
    if value is not None and not (isinstance(value, (list, tuple)) and len(value) == 2):
        raise ValueError(f"it must hold the smallest and the largest reward, like [-1.0, 1.0], got {value!r}.")
    return tuple(value) if isinstance(value, list) else value


ScaleRewardsOption = Annotated[ScaleRewards, FROM_STRING, BeforeValidator(_from_bool)]


class AdvantageConfig(Section):
    """From rewards to advantages, and which completions count.

    `trl_ray.algorithms.policy.advantages` lists which of these options make up GRPO, Dr. GRPO, RLOO and REINFORCE++.
    """

    scale_rewards: ScaleRewardsOption = ScaleRewards.GROUP
    """What divides the centred rewards: the deviation of the group, of the whole step, or nothing."""
    advantage_baseline: Annotated[AdvantageBaseline, FROM_STRING] = AdvantageBaseline.GROUP_MEAN
    multi_objective_aggregation: Annotated[Aggregation, FROM_STRING] = Aggregation.SUM_THEN_NORMALIZE
    normalize_advantages: bool = False
    """Shift and scale advantages to mean 0 and standard deviation 1 over the step (REINFORCE++, RLOO)."""
    reward_clip_range: Annotated[tuple[float, float] | None, BeforeValidator(_from_list)] = None
    """Smallest and largest total reward that counts; penalties for length and KL are taken from what is clipped."""
    overlong_buffer_len: Natural = 0
    """Tokens before `max_completion_length` over which a growing penalty is taken from the reward; 0 is none."""
    overlong_penalty_factor: Annotated[float, Field(ge=0)] = 1.0
    """The penalty at `max_completion_length` (DAPO's soft overlong punishment)."""
    mask_truncated_completions: bool = False
    zero_variance_groups: Annotated[ZeroVariance, FROM_STRING] = ZeroVariance.KEEP
    max_resampled_groups: Natural | None = None
    """Groups of one step that may be replaced because there is nothing to learn of them (equal rewards, or all cut
    off), before the run stops; None: ten times as many as the step takes."""

    @property
    def has_overlong_penalty(self) -> bool:
        """Whether long completions lose reward."""
        return self.overlong_buffer_len > 0 and self.overlong_penalty_factor > 0

    @rule
    def _check_clip_range(self) -> None:
        bounds = self.reward_clip_range
        if bounds is not None and bounds[0] >= bounds[1]:
            raise ValueError(
                f"reward_clip_range must go from the smaller to the larger reward, got {list(bounds)}. Swap the two."
            )

    @rule
    def _check_scale(self) -> None:
        if self.advantage_baseline is AdvantageBaseline.NONE and self.scale_rewards is not ScaleRewards.NONE:
            raise ValueError(
                f"scale_rewards must be none with advantage_baseline=none, got {self.scale_rewards.value}: rewards "
                "that are not centred would explode where they hardly differ. Set scale_rewards=none (REINFORCE++: and "
                "normalize_advantages=true)."
            )

    @rule
    def _check_objectives(self) -> None:
        if self.multi_objective_aggregation is not Aggregation.NORMALIZE_THEN_SUM:
            return
        fixed: list[tuple[str, Any, Any]] = [
            ("advantage_baseline", self.advantage_baseline.value, AdvantageBaseline.GROUP_MEAN.value),
            ("scale_rewards", self.scale_rewards.value, ScaleRewards.GROUP.value),
            ("normalize_advantages", self.normalize_advantages, False),
            ("reward_clip_range", self.reward_clip_range, None),
            ("overlong_buffer_len", self.overlong_buffer_len, 0),
        ]
        for name, value, needed in fixed:
            if value != needed:
                raise ValueError(
                    f"{name} must be {_shown(needed)} with multi_objective_aggregation=normalize_then_sum, got "
                    f"{_shown(value)}: each function's rewards are compared with the mean of the group, divided by its "
                    "deviation, summed and normalised over the step, and there is no total before that. Set "
                    f"{name}={_shown(needed)}."
                )

    @rule
    def _check_zero_variance(self) -> None:
        if self.zero_variance_groups is not ZeroVariance.DROP:
            return
        telling = {
            "advantage_baseline=none": self.advantage_baseline is AdvantageBaseline.NONE,
            "multi_objective_aggregation=normalize_then_sum": (
                self.multi_objective_aggregation is Aggregation.NORMALIZE_THEN_SUM
            ),
            f"overlong_buffer_len={self.overlong_buffer_len}": self.has_overlong_penalty,
        }
        for option, applies in telling.items():
            if applies:
                raise ValueError(explain_zero_variance(option))


def explain_zero_variance(option: str) -> str:
    """Why groups of equal total reward cannot be dropped with an option, given as ``name=value``."""
    return (
        f"zero_variance_groups must be keep with {option}, got drop: completions of equal total reward can have "
        "advantages other than 0 then. Set zero_variance_groups=keep."
    )


def _shown(value: Any) -> str:
    """As YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
