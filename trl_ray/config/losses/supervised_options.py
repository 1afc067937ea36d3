"""The options of supervised fine-tuning's loss, under the argument names of TRL's SFTConfig."""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

from pydantic import Field

from trl_ray.config.base import FROM_STRING, rule
from trl_ray.config.losses.loss_section import LossSection


class SupervisedLossType(enum.StrEnum):
    """What a token loses (`trl_ray.algorithms.supervised_loss`)."""

    NLL = "nll"
    DFT = "dft"
    """The negative log-likelihood times the token's probability, without gradient (https://arxiv.org/abs/2508.05629)."""


class SupervisedLossConfig(LossSection):
    """The loss of supervised fine-tuning; names and defaults are those of TRL's SFTConfig."""

    built_in: ClassVar[str] = "trl_ray.algorithms.supervised_loss:SupervisedLoss"

    loss_type: Annotated[SupervisedLossType, FROM_STRING] = SupervisedLossType.NLL
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread evenly over the vocabulary; nll only."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on embeddings in training, uniform within alpha / sqrt(tokens * hidden size)
    (https://arxiv.org/abs/2310.05914); None is none."""

    @property
    def needs_mean_logprobs(self) -> bool:
        """Whether the loss asks for the mean log-prob over the vocabulary at each token."""
        return self.label_smoothing_factor > 0

    @rule
    def _check_label_smoothing(self) -> None:
        if self.label_smoothing_factor > 0 and self.loss_type is SupervisedLossType.DFT:
            raise ValueError(
                f"label_smoothing_factor must be 0 with loss_type=dft, got {self.label_smoothing_factor}: dft weighs "
                "labels by their probability and has no use for smoothed ones. Remove one of the two."
            )
