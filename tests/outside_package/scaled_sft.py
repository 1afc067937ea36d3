"""A loss of a supervised pipeline with an option of its own, from outside the package."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from trl_ray.algorithms.loss import LossInputs, LossOutput
from trl_ray.algorithms.supervised_loss import SupervisedLoss
from trl_ray.config.losses.supervised_options import SupervisedLossConfig


class ScaledSFTOptions(SupervisedLossConfig):
    """Those of the supervised loss, and one more."""

    scale: float = 1.0
    """Multiplies the loss."""


class ScaledSFTLoss(SupervisedLoss):
    """The supervised loss, scaled."""

    options_class: ClassVar[type[SupervisedLossConfig]] = ScaledSFTOptions
    config: ScaledSFTOptions

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """One micro-batch."""
        output = super().__call__(inputs)
        return dataclasses.replace(output, loss=self.config.scale * output.loss)
