"""What one pair loses: a function per kind of loss of DPO's family.

c, r    log-prob policy / reference of the chosen and of the rejected completion, in nats
s       f'(ratio): what an f-divergence makes of a log-ratio x                https://arxiv.org/abs/2309.16240
        reverse_kl x     forward_kl 1 - e^-x     js_divergence ln 2 + ln sigma(x)
        alpha_divergence (e^((alpha - 1) x) - 1) / (alpha - 1)
z       beta (s_c - s_r)                                                      sigma: the logistic function

sigmoid       -ln sigma(z)                                                    https://arxiv.org/abs/2305.18290
hinge         max(0, 1 - z)                                                   https://arxiv.org/abs/2309.06657
ipo           (s_c / |c| - s_r / |r| - 1 / (2 beta))^2                        https://arxiv.org/abs/2310.12036
sigmoid_norm  -ln sigma(beta (s_c / |c| - s_r / |r|))                         https://arxiv.org/abs/2411.15124
robust        (-(1 - e) ln sigma(z) + e ln sigma(-z)) / (1 - 2 e)             https://arxiv.org/abs/2403.00409
exo_pair      KL((sigma(z), sigma(-z)) || (1 - e, e))                         https://arxiv.org/abs/2402.00856
discopop      (1 - g)(-ln sigma(z)) + g e^-z, g = sigma(z / tau)              https://arxiv.org/abs/2406.08414
nca_pair      -ln sigma(beta c) - ln sigma(-beta c) / 2 - ln sigma(-beta r) / 2     https://arxiv.org/abs/2402.05369
bco_pair      -ln sigma(beta c) - ln sigma(-beta r), without the paper's shift      https://arxiv.org/abs/2404.04656
sppo_hard     (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2                     https://arxiv.org/abs/2405.00675
apo_zero      1 - sigma(beta c) + sigma(beta r)                               https://arxiv.org/abs/2408.06266
apo_down      sigma(beta c) + 1 - sigma(beta (c - r))                         the same
aot           robust's numerator of d = sort(policy c - policy r) - sort(reference c - reference r)
aot_unpaired  the same of d = sort(c) - sort(r)                               https://arxiv.org/abs/2406.05882

The e is `label_smoothing`. The two aot sort over the pairs they are given, by definition a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_ray.config.losses.preference_options import FDivergence, PreferenceLossConfig, PreferenceLossType

_LARGEST_EXPONENT = 80.0  # e^80 still is a float32
_NEAR_ONE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairScores:
    """What the losses of P pairs are made of."""

    chosen: Tensor
    """[P] log-ratios policy / reference of chosen completions, with gradient."""
    rejected: Tensor
    """[P]"""
    chosen_score: Tensor
    """[P] the same seen through the f-divergence."""
    rejected_score: Tensor
    """[P]"""
    chosen_length: Tensor
    """[P] completion tokens, at least 1."""
    rejected_length: Tensor
    """[P]"""
    policy_margin: Tensor
    """[P] log-prob of the chosen over the rejected completion under the policy."""
    reference_margin: Tensor
    """[P] under the reference."""


def f_score(log_ratio: Tensor, config: PreferenceLossConfig) -> Tensor:
    """The derivative of the f-divergence at ratios policy / reference, from their logarithms [P].

    The exponent of alpha_divergence is held below 80, beyond which there is no gradient.
    """
    match config.f_divergence_type:
        case FDivergence.REVERSE_KL:
            return log_ratio
        case FDivergence.FORWARD_KL:
            return -torch.expm1(-log_ratio)
        case FDivergence.JS_DIVERGENCE:
            return math.log(2) + logsigmoid(log_ratio)
        case FDivergence.ALPHA_DIVERGENCE:
            slope = config.f_alpha_divergence_coef - 1.0
            if abs(slope) < _NEAR_ONE:
                return log_ratio
            return torch.expm1((slope * log_ratio).clamp(max=_LARGEST_EXPONENT)) / slope


def _logit(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return config.beta * (pairs.chosen_score - pairs.rejected_score)


def _per_token(pairs: PairScores) -> Tensor:
    return pairs.chosen_score / pairs.chosen_length - pairs.rejected_score / pairs.rejected_length


def _sigmoid(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return -logsigmoid(_logit(pairs, config))


def _hinge(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return torch.relu(1 - _logit(pairs, config))


def _ipo(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return (_per_token(pairs) - 1 / (2 * config.beta)).square()


def _sigmoid_norm(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return -logsigmoid(config.beta * _per_token(pairs))


def _robust(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    z, e = _logit(pairs, config), config.label_smoothing
    return (e * logsigmoid(-z) - (1 - e) * logsigmoid(z)) / (1 - 2 * e)


def _exo_pair(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    z, e = _logit(pairs, config), config.label_smoothing
    good = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
    return good + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def _discopop(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    z = _logit(pairs, config)
    at = z / config.discopop_tau
    # One exponential: for a large negative z the product of the two would be 0 times infinity.
    return torch.sigmoid(-at) * -logsigmoid(z) + torch.exp(logsigmoid(at) - z)


def _nca_pair(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    c, r = config.beta * pairs.chosen, config.beta * pairs.rejected
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


def _bco_pair(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return -logsigmoid(config.beta * pairs.chosen) - logsigmoid(-config.beta * pairs.rejected)


def _sppo_hard(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    half = 0.5 / config.beta
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


def _apo_zero(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return torch.sigmoid(-config.beta * pairs.chosen) + torch.sigmoid(config.beta * pairs.rejected)


def _apo_down(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    margin = pairs.chosen - pairs.rejected
    return torch.sigmoid(config.beta * pairs.chosen) + torch.sigmoid(-config.beta * margin)


def _aot(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return _smoothed(pairs.policy_margin.sort().values - pairs.reference_margin.sort().values, config)


def _aot_unpaired(pairs: PairScores, config: PreferenceLossConfig) -> Tensor:
    return _smoothed(pairs.chosen.sort().values - pairs.rejected.sort().values, config)


def _smoothed(difference: Tensor, config: PreferenceLossConfig) -> Tensor:
    z, e = config.beta * difference, config.label_smoothing
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


PAIR_LOSSES: Mapping[PreferenceLossType, Callable[[PairScores, PreferenceLossConfig], Tensor]] = {
    PreferenceLossType.SIGMOID: _sigmoid,
    PreferenceLossType.HINGE: _hinge,
    PreferenceLossType.IPO: _ipo,
    PreferenceLossType.SIGMOID_NORM: _sigmoid_norm,
    PreferenceLossType.ROBUST: _robust,
    PreferenceLossType.EXO_PAIR: _exo_pair,
    PreferenceLossType.DISCOPOP: _discopop,
    PreferenceLossType.NCA_PAIR: _nca_pair,
    PreferenceLossType.BCO_PAIR: _bco_pair,
    PreferenceLossType.SPPO_HARD: _sppo_hard,
    PreferenceLossType.APO_ZERO: _apo_zero,
    PreferenceLossType.APO_DOWN: _apo_down,
    PreferenceLossType.AOT: _aot,
    PreferenceLossType.AOT_UNPAIRED: _aot_unpaired,
}
"""Losses [P] of pairs; sft, whose loss is of tokens, is in `trl_ray.algorithms.preference.paired_preference`."""
