"""A loss with options and totals of its own, from outside the package: the options and the loss, in one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from trl_ray.algorithms.loss import LossInputs, LossOutput
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.types import TrainingSample


class ScaledOptions(LossConfig):
    """Those of the policy loss, and two more."""

    scale: float = 1.0
    """Multiplies the loss."""
    by_successes: bool = False
    """Divide by the update's completions with an advantage above 0, in the place of all of them."""


class ScaledLoss(PolicyLoss):
    """The policy loss, scaled."""

    options_class: ClassVar[type[LossConfig]] = ScaledOptions
    config: ScaledOptions

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        """Successes of the whole update."""
        return {"successes": sum(sample.advantage > 0 for sample in samples)}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """One micro-batch."""
        output, factor = super().__call__(inputs), self.config.scale
        if self.config.by_successes:
            factor *= inputs.totals.num_samples / inputs.totals.count("successes")
        return dataclasses.replace(output, loss=factor * output.loss)
