"""A surrogate loss as somebody outside the package writes it: one class in one file.  `loss: ...reinforce:Reinforce`"""

from __future__ import annotations

from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenMetrics
from trl_ray.algorithms.loss import LossInputs
from trl_ray.algorithms.policy.policy_loss import PolicyLoss


class Reinforce(PolicyLoss):
    """-A log pi: the gradient of the clipped loss at ratio 1, without its clipping."""

    def surrogate(
        self, inputs: LossInputs, log_ratio: Tensor, ratio: Tensor, weight: Tensor | None, metrics: TokenMetrics
    ) -> Tensor:
        """[N]"""
        return -inputs.tokens.advantages * inputs.logprobs
