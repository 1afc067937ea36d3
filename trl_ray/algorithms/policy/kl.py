"""Estimates of KL(policy || reference) from single tokens; x = log reference - log policy.

    k1 = -x     k2 = x^2 / 2     k3 = e^x - x - 1                                 http://joschu.net/blog/kl-approx.html

A loss asks for the right *gradient*, which is another matter than the right value
(https://arxiv.org/abs/2506.09477). For tokens drawn from the policy, the mean gradient of k2 is that of the KL, that of
k1 is 0, and that of k3 is the gradient of the other KL, reference || policy. What mends k1 and k3 is the ratio policy /
old policy: the mean of rho k is the KL whatever policy drew the tokens, so the mean of its gradient is that of the KL
(https://arxiv.org/abs/2512.02556, section 3.1). k2 needs the ratio as a mere weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ray.config.losses.policy_options import KLEstimator


def kl_estimate(logprobs: Tensor, other: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates [N] of KL(p || q) from log-probs under p and q of tokens drawn from p, in nats."""
    x = other - logprobs
    match estimator:
        case KLEstimator.K1:
            return -x
        case KLEstimator.K2:
            return x.square() / 2
        case KLEstimator.K3:
            return torch.expm1(x) - x


def kl_penalty(kl: Tensor, ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates [N] times the ratio policy / old policy [N], so that their gradient is that of the KL itself."""
    return kl * (ratio.detach() if estimator is KLEstimator.K2 else ratio)
