"""Ratios of probabilities: policy / old policy, which is clipped, and old policy / sampler, which corrects for lag.

    sampler log-probs --correction (no gradient)--> old log-probs --ratio--> policy log-probs
    over a token: e^x   over a sequence: e^(mean x) or e^(sum x), the same at all its tokens          x [N] log-ratio

The old policy is the one before the first update on the samples: with one update per sample it is the policy itself, so
the ratio is 1 and only its gradient counts; with several updates its log-probs come from a first pass. Together this is
decoupled PPO (https://arxiv.org/abs/2110.00641): clipping bounds how far the updates move, whatever the lag of the
sampler. With `old_logprobs=sampler` the two ratios are one, and clipping bounds the lag too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ray.algorithms.loss import LossInputs, SampleTokens
from trl_ray.config.losses.policy_options import MASK_MODES, SEQUENCE_MODES, ImportanceLevel, LossConfig, OldLogprobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplerCorrection:
    """How far the sampler was off, and what corrects for it."""

    ratio: Tensor
    """[N] plain, of the token or of its whole completion: old policy / sampler where that is corrected for, else
    policy / sampler of the token."""
    weight: Tensor | None
    """[N] the ratio truncated or masked, a factor on each token's loss; None where nothing is corrected."""


def old_logprobs(inputs: LossInputs, config: LossConfig) -> Tensor:
    """Log-probs [N] of the old policy, without gradient."""
    if config.old_logprobs is OldLogprobs.SAMPLER:
        return inputs.sampler_logprobs
    known = inputs.tokens.old_logprobs
    return inputs.logprobs.detach() if known is None else known


def policy_ratio(log_ratio: Tensor, tokens: SampleTokens, level: ImportanceLevel) -> Tensor:
    """Ratios [N] policy / old policy from the log-ratios [N] of tokens; the gradient flows through sums and means.

    Over a sequence it is the geometric mean (GSPO, https://arxiv.org/abs/2507.18071, eq. 7) or the product (RLOO).
    """
    if level is ImportanceLevel.TOKEN:
        return torch.exp(log_ratio)
    joined = tokens.means(log_ratio) if level is ImportanceLevel.SEQUENCE else tokens.sums(log_ratio)
    return torch.exp(joined)[tokens.sample_index]


def sampler_correction(inputs: LossInputs, config: LossConfig) -> SamplerCorrection:
    """Old policy / sampler, truncated or masked as `vllm_importance_sampling_mode` says.

    Where the sampler leaves tokens out (top-p, top-k, min-p) its log-probs are too high by the log of the mass it kept,
    so that ratios are too small by that mass.
    """
    tokens, mode = inputs.tokens, config.vllm_importance_sampling_mode
    if not config.corrects_for_sampler:
        return SamplerCorrection(ratio=torch.exp(inputs.logprobs.detach() - inputs.sampler_logprobs), weight=None)
    log_ratio = old_logprobs(inputs, config) - inputs.sampler_logprobs
    if mode in SEQUENCE_MODES:
        log_ratio = tokens.sums(log_ratio)[tokens.sample_index]
    ratio = torch.exp(log_ratio)
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if mode not in MASK_MODES:
        return SamplerCorrection(ratio=ratio, weight=ratio.clamp(min=low, max=high))
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside = outside | (ratio < low)
    if high is not None:
        outside = outside | (ratio > high)
    return SamplerCorrection(ratio=ratio, weight=ratio.masked_fill(outside, 0.0))


def off_policy(inputs: LossInputs, threshold: float) -> Tensor:
    """True [N] at the tokens of completions that are too far off to be learnt from.

    Those are the completions of negative advantage whose mean log-ratio sampler / policy exceeds the threshold, in
    nats per token (https://arxiv.org/abs/2512.02556, eq. 9). What was worth imitating stays, however it was sampled.
    """
    tokens = inputs.tokens
    means = tokens.means(inputs.sampler_logprobs - inputs.logprobs.detach())
    return (means > threshold)[tokens.sample_index] & (tokens.advantages < 0)
