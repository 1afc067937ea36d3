"""What one token loses: a function per kind of loss; rho is the ratio policy / old policy, A the advantage.

clipped  -min(min(rho, delta) A, clip(rho, 1-eps, 1+eps_high) A)     grpo dapo dr_grpo bnpo luspo
cispo    -sg(min(rho, eps_high)) A log pi                            sg: without gradient
sapo     -(4 / tau) sigmoid(tau (rho - 1)) A                         tau by the sign of A
vespo    -sg(phi(w)) A log pi                                        w: ratio of the whole completion
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trl_ray.algorithms.loss import SampleTokens

_LOG_SMALLEST, _LOG_LARGEST = math.log(1e-8), 20.0


def clipped(ratio: Tensor, advantages: Tensor, *, low: float, high: float, delta: float | None = None) -> Tensor:
    """PPO's surrogate [N] (https://arxiv.org/abs/1707.06347, eq. 7).

    Args:
        ratio: [N]
        advantages: [N]
        low: the ratio counts from 1 - low.
        high: to 1 + high.
        delta: where the advantage is negative a ratio counts up to this, beyond which it has no gradient any more
            (https://arxiv.org/abs/2505.07291); None: without end.
    """
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    # The smaller of the two: leaving the bounds never pays, but a ratio that is too far on the wrong side still learns.
    return -torch.minimum(bounded * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def cispo(logprobs: Tensor, ratio: Tensor, advantages: Tensor, *, cap: float) -> Tensor:
    """Log-probs weighed by a ratio that is held below a cap [N]: no token loses its gradient.

    https://arxiv.org/abs/2506.13585; without a lower bound.
    """
    return -ratio.detach().clamp(max=cap) * advantages * logprobs


def sapo(ratio: Tensor, advantages: Tensor, *, positive: float, negative: float) -> Tensor:
    """A soft gate in the place of clipping [N] (https://arxiv.org/abs/2511.20347).

    Args:
        ratio: [N]
        advantages: [N]
        positive: temperature of the gate where the advantage is above 0; hotter gates close faster.
        negative: elsewhere.
    """
    temperature = torch.where(advantages > 0, positive, negative)
    # 4 / temperature gives the gate the slope of the plain ratio where policy and old policy are the same.
    return -torch.sigmoid(temperature * (ratio - 1)) * 4.0 / temperature * advantages


def vespo_weights(
    log_ratio: Tensor,
    tokens: SampleTokens,
    *,
    correction: Tensor | None,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Tensor:
    """phi(w) = w^k e^(lambda (1 - w)) [N] of the token's completion, without gradient; 1 at w = 1.

    https://arxiv.org/abs/2602.10693. w is the product over the completion of the ratios policy / old policy and of the
    corrections for the sampler. Its logarithm is held within [ln 1e-8, 20], as is each correction's; each log-ratio
    within [-20, 20].

    Args:
        log_ratio: [N] of tokens.
        tokens: their samples and advantages.
        correction: [N] ratios old policy / sampler of tokens, truncated or masked.
        positive: (k, lambda) where the advantage is not negative.
        negative: (k, lambda) elsewhere.
    """
    # In logarithms, as products over long completions leave float32 at both ends.
    per_token = log_ratio.detach().clamp(-_LOG_LARGEST, _LOG_LARGEST)
    if correction is not None:
        # A masked token has weight 0, whose logarithm would take the whole completion to minus infinity.
        per_token = per_token + correction.log().clamp(_LOG_SMALLEST, _LOG_LARGEST)
    log_w = tokens.sums(per_token).clamp(_LOG_SMALLEST, _LOG_LARGEST)[tokens.sample_index]
    good = tokens.advantages >= 0
    k = torch.where(good, positive[0], negative[0])
    rate = torch.where(good, positive[1], negative[1])
    return torch.exp(k * log_w - rate * torch.expm1(log_w))


def weighed(logprobs: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:
    """Log-probs times advantages times weights without gradient [N]: REINFORCE with weights."""
    return -weights * advantages * logprobs
