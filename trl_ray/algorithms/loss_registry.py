"""From the options of any objective to the `Loss` that a learner runs, and to the totals of an update.

options --build_loss--> Loss (on the learner)
options, samples of an update --update_totals--> TrainBatch.totals (on the driver)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from trl_ray.algorithms.distillation.distillation_loss import DistillationLoss
from trl_ray.algorithms.distillation.sdpo_loss import SDPOLoss
from trl_ray.algorithms.loss import Loss
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.algorithms.preference.paired_preference import PreferenceLoss
from trl_ray.algorithms.preference.reference_free import CPOLoss, ORPOLoss
from trl_ray.algorithms.preference.reward_losses import PairRewardLoss, StepRewardLoss
from trl_ray.algorithms.preference.unpaired_preference import UnpairedLoss
from trl_ray.algorithms.supervised_loss import SupervisedLoss
from trl_ray.config.losses.distillation_options import DistillationLossConfig, SDPOObjective
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    UnpairedLossConfig,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.types import TrainingSample

LossOptions: TypeAlias = (
    SDPOObjective
    | LossConfig
    | DistillationLossConfig
    | SupervisedLossConfig
    | PreferenceLossConfig
    | UnpairedLossConfig
    | CPOLossConfig
    | ORPOLossConfig
    | RewardLossConfig
    | StepLossConfig
)
"""The options of one objective; their type says which it is."""


def build_loss(options: LossOptions, *, max_completion_length: int | None = None) -> Loss:
    """The objective that the options describe.

    Args:
        options: its options.
        max_completion_length: the fixed length of dr_grpo, in tokens; only the policy loss reads it.
    """
    match options:
        case SDPOObjective():  # before what it extends
            return SDPOLoss(options, max_completion_length=max_completion_length)
        case DistillationLossConfig():
            return DistillationLoss(options)
        case LossConfig():
            return PolicyLoss(config=options, max_completion_length=max_completion_length)
        case SupervisedLossConfig():
            return SupervisedLoss(options)
        case PreferenceLossConfig():
            return PreferenceLoss(options)
        case UnpairedLossConfig():
            return UnpairedLoss(options)
        case CPOLossConfig():
            return CPOLoss(options)
        case ORPOLossConfig():
            return ORPOLoss(options)
        case RewardLossConfig():
            return PairRewardLoss(options)
        case StepLossConfig():
            return StepRewardLoss()


def update_totals(options: LossOptions, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
    """`TrainBatch.totals` of an update, by the names that its loss documents.

    Args:
        options: of the loss.
        samples: of the whole update, all ranks; those of an example stand together, in order.
    """
    return build_loss(options).totals(samples)
