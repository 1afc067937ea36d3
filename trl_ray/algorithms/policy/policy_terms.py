"""What the policy objective is made of beside its surrogate: ratios, KL, entropy bonus, and one number for all tokens.

*Ratios* of probabilities: policy / old policy, which is clipped, and old policy / sampler, which corrects for a stale
sampler.

    sampler log-probs --correction (no gradient)--> old log-probs --ratio--> policy log-probs
    over a token: e^x   over a sequence: e^(mean x) or e^(sum x), the same at all its tokens          x [N] log-ratio

The old policy is the one before the first update on the samples: with one update per sample it is the policy itself, so
the ratio is 1 and only its gradient counts; with several updates its log-probs come from a first pass. Together this is
decoupled PPO (https://arxiv.org/abs/2110.00641): clipping bounds how far the updates move, however stale the sampler.
With `old_logprobs=sampler` the two ratios are one, and clipping bounds the staleness too.

*KL(policy || reference)*, estimated from single tokens; x = log reference - log policy.

    k1 = -x     k2 = x^2 / 2     k3 = e^x - x - 1                                 http://joschu.net/blog/kl-approx.html

A loss asks for the right *gradient*, which is another matter than the right value
(https://arxiv.org/abs/2506.09477). For tokens drawn from the policy, the mean gradient of k2 is that of the KL, that of
k1 is 0, and that of k3 is the gradient of the other KL, reference || policy. What mends k1 and k3 is the ratio policy /
old policy: the mean of rho k is the KL whatever policy drew the tokens, so the mean of its gradient is that of the KL
(https://arxiv.org/abs/2512.02556, section 3.1). k2 needs the ratio as a mere weight.

*Entropy bonus*, fixed, or moved after each update by the entropy that the update met:

    entropy <= target: coefficient + delta, applied        entropy > target: coefficient - delta, not applied
                        within [min, max]; both from the next update on           https://arxiv.org/abs/2505.22312

*Aggregation* of token losses L_t of samples i; T and B count tokens and samples of the whole optimizer update:

    dapo cispo vespo   sum_t L_t / T                                        https://arxiv.org/abs/2503.14476
    grpo sapo          (1/B) sum_i mean_t L_t                               https://arxiv.org/abs/2402.03300
    dr_grpo            sum_t L_t / (B * max_completion_length)              https://arxiv.org/abs/2503.20783
    luspo              (1/B) sum_i sum_t L_t                                https://arxiv.org/abs/2602.05261
    bnpo               mean over micro-batches of their token means         depends on how the update is cut

Denominators count every trained token and every sample, also where a mask or a weight makes its loss 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from trl_ray.algorithms.loss import LossInputs, SampleTokens
from trl_ray.config.losses.policy_options import (
    MASK_MODES,
    SEQUENCE_MODES,
    ImportanceLevel,
    KLEstimator,
    LossConfig,
    LossType,
    OldLogprobs,
)


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

    The sampler's log-probs are those of its weights at the temperature, before anything that reshapes sampling
    (`engines.sampling`), so that this is 1 on fresh tokens also where it leaves some out (top-p, top-k, min-p).
    """
    tokens, mode = inputs.tokens, config.vllm_importance_sampling_mode
    if not config.corrects_for_sampler:
        # Nothing is corrected; how far sampler and policy are apart is still worth reporting.
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


def kl_estimate(logprobs: Tensor, other: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates [N] of KL(p || q) from log-probs under p and q of tokens drawn from p, in nats."""
    x = other - logprobs
    match estimator:
        case KLEstimator.K1:
            return -x
        case KLEstimator.K2:
            return x.square() / 2
        case KLEstimator.K3:
            # Most log-ratios are near 0, where e^x - 1 would lose all its digits.
            return torch.expm1(x) - x


def kl_penalty(kl: Tensor, ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates [N] times the ratio policy / old policy [N], so that their gradient is that of the KL itself."""
    return kl * (ratio.detach() if estimator is KLEstimator.K2 else ratio)


class EntropyBonus:
    """Follows the entropy of the policy; its state goes into checkpoints."""

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self.coefficient = config.entropy_coef
        # No bonus before the first measurement, as in TRL.
        self._last_entropy = math.inf

    @property
    def applied(self) -> float:
        """The weight of the mean entropy in the update at hand."""
        if self._config.use_adaptive_entropy and self._last_entropy > self._config.entropy_target:
            return 0.0
        return self.coefficient

    def adapt(self, entropy: float) -> None:
        """Move the coefficient by the mean entropy of an update, in nats per token; nothing where it is fixed."""
        config = self._config
        if not config.use_adaptive_entropy:
            return
        self._last_entropy = entropy
        if entropy <= config.entropy_target:
            self.coefficient = min(self.coefficient + config.entropy_coef_delta, config.entropy_coef_max)
        else:
            self.coefficient = max(self.coefficient - config.entropy_coef_delta, config.entropy_coef_min)

    def state_dict(self) -> dict[str, float]:
        """Empty where nothing adapts."""
        if not self._config.use_adaptive_entropy:
            return {}
        return {"entropy_coef": self.coefficient, "last_entropy": self._last_entropy}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state.

        Raises:
            KeyError: it was saved by a run whose coefficient was fixed.
        """
        if self._config.use_adaptive_entropy:
            self.coefficient, self._last_entropy = float(state["entropy_coef"]), float(state["last_entropy"])


def aggregate(
    per_token: Tensor, inputs: LossInputs, *, loss_type: LossType, max_completion_length: int | None
) -> Tensor:
    """Token losses [N] of a micro-batch to its share of the update's loss."""
    totals = inputs.totals
    # An update without anything to train on has a loss of 0, not of NaN.
    samples = max(totals.num_samples, 1)
    match loss_type:
        case LossType.DAPO | LossType.CISPO | LossType.VESPO:
            return per_token.sum() / max(totals.num_valid_tokens, 1)
        case LossType.GRPO | LossType.SAPO:
            return inputs.tokens.means(per_token).sum() / samples
        case LossType.DR_GRPO:
            assert max_completion_length is not None, "dr_grpo divides by the longest possible completion"
            return per_token.sum() / (samples * max_completion_length)
        case LossType.LUSPO:
            return per_token.sum() / samples
        # The one type that is defined by the micro-batch, so that its loss depends on how the update is cut.
        case LossType.BNPO:
            return per_token.sum() / max(inputs.micro_batch_tokens, 1) / max(totals.num_micro_batches, 1)
    assert_never(loss_type)
