"""The options of reward and process-reward modelling's losses, under TRL's argument names where TRL has the option."""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

from pydantic import Field

from trl_ray.config.losses.loss_section import LossSection


class StepAggregation(enum.StrEnum):
    """How the rewards of a trajectory's steps become one."""

    MIN = "min"
    PRODUCT = "product"
    MEAN = "mean"
    LAST = "last"


class RewardLossConfig(LossSection):
    """The loss of a reward model; the name is that of TRL's RewardConfig."""

    built_in: ClassVar[str] = "trl_ray.algorithms.preference.reward_losses:PairRewardLoss"

    center_rewards_coefficient: Annotated[float, Field(gt=0)] | None = None
    """Weight of the squared sum of a pair's rewards, which draws rewards to mean 0; 0.01 is usual, None is none."""


class StepLossConfig(LossSection):
    """The loss of a process reward model, which has no options: the cross-entropy of right against wrong steps."""

    built_in: ClassVar[str] = "trl_ray.algorithms.preference.reward_losses:StepRewardLoss"
