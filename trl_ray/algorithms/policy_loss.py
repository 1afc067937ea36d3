"""The clipped policy objective of GRPO and its relatives, over the trained tokens of a micro-batch.

    L_t = -min(rho A, clip(rho, 1-eps, 1+eps_high) A) * w  +  beta * rho * k3
    rho = pi / pi_old    w = importance weight pi_old / sampler    k3 = e^(ref-pi) - (ref-pi) - 1

Aggregation over tokens t of samples i; T and B count tokens and samples of the whole optimizer step:
    dapo     sum_t L_t / T                                    https://arxiv.org/abs/2503.14476
    grpo     (1/B) sum_i mean_t L_t                           https://arxiv.org/abs/2402.03300
    dr_grpo  sum_t L_t / (B * max_completion_length)          https://arxiv.org/abs/2503.20783
    bnpo     mean over micro-batches of their token means     depends on how the step is cut, by definition
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ray.algorithms.loss import LossInputs, LossOutput, sum_per_sample
from trl_ray.algorithms.metrics import token_mean
from trl_ray.config.sections import ImportanceMode, LossConfig, LossType, OldLogprobs
from trl_ray.types import Metric, Reduce, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The clipped surrogate with every option of `LossConfig`; implements the `Loss` protocol."""

    config: LossConfig
    max_completion_length: int
    """The fixed length dr_grpo divides by."""

    @property
    def needs_reference(self) -> bool:
        """True while the KL to the initial policy has weight."""
        return self.config.beta > 0

    def has_gradient(self, sample: TrainingSample) -> bool:
        """A sample of advantage 0 moves nothing unless the KL does."""
        return self.needs_reference or sample.advantage != 0.0

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        config, tokens = self.config, inputs.tokens
        current = inputs.logprobs.detach()
        old = current if config.old_logprobs is OldLogprobs.POLICY else tokens.sampler_logprobs
        ratio = torch.exp(inputs.logprobs - old)
        per_token = clipped_surrogate(ratio, tokens.advantages, low=config.epsilon, high=self._epsilon_high)
        raw_weight, weight = importance_weights(inputs, config)
        if weight is not None:
            per_token = per_token * weight
        metrics = self._metrics(inputs, ratio.detach(), raw_weight)
        if inputs.reference_logprobs is not None and self.needs_reference:
            kl = k3(inputs.logprobs, inputs.reference_logprobs)
            metrics["kl/ref"] = _mean(kl)
            # The ratio makes the gradient that of the KL itself (https://arxiv.org/abs/2512.02556, section 3.1);
            # k3 alone would ignore that the tokens were drawn from the policy. Neither clipped nor corrected.
            per_token = per_token + config.beta * kl * ratio
        return LossOutput(loss=self.aggregate(per_token, inputs), metrics=metrics)

    @property
    def _epsilon_high(self) -> float:
        return self.config.epsilon if self.config.epsilon_high is None else self.config.epsilon_high

    def aggregate(self, per_token: Tensor, inputs: LossInputs) -> Tensor:
        """Token losses [N] to this micro-batch's share of the step's loss."""
        totals = inputs.totals
        match self.config.loss_type:
            case LossType.DAPO:
                return per_token.sum() / max(totals.num_valid_tokens, 1)
            case LossType.GRPO:
                means = sum_per_sample(per_token, inputs.tokens) / inputs.tokens.counts.clamp(min=1.0)
                return means.sum() / max(totals.num_samples, 1)
            case LossType.DR_GRPO:
                return per_token.sum() / (max(totals.num_samples, 1) * self.max_completion_length)
            case LossType.BNPO:
                return per_token.sum() / max(inputs.micro_batch_tokens, 1) / max(totals.num_micro_batches, 1)

    def _metrics(self, inputs: LossInputs, ratio: Tensor, raw_weight: Tensor) -> dict[str, Metric]:
        advantages = inputs.tokens.advantages
        low = (ratio < 1 - self.config.epsilon) & (advantages < 0)
        high = (ratio > 1 + self._epsilon_high) & (advantages > 0)
        metrics = {
            "entropy": _mean(inputs.entropy),
            "clip/low": _mean(low),
            "clip/high": _mean(high),
            # k3 of tokens drawn from the sampler: the estimate of KL(sampler || policy) that is never negative.
            "kl/sampler": _mean(k3(inputs.tokens.sampler_logprobs, inputs.logprobs)),
        }
        return metrics | importance_metrics(raw_weight)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """Token losses [N]: -min(rho A, clip(rho, 1-low, 1+high) A) (https://arxiv.org/abs/1707.06347, eq. 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """Estimate [N] of KL(p || q) from tokens drawn from p: e^x - x - 1 with x = log q - log p, never negative."""
    difference = other - logprobs
    return torch.exp(difference) - difference - 1


def importance_weights(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor | None]:
    """How far the sampler was off, and the factor on each token's loss that corrects for it.

    Returns:
        The plain ratio policy / sampler [N] (of the token, or of its whole sequence), without gradient; and the
        ratio truncated or masked [N], or None where the loss is not corrected. With `old_logprobs=sampler` the
        clipped ratio already is policy / sampler, so there is nothing left to correct.
    """
    tokens, mode = inputs.tokens, config.vllm_importance_sampling_mode
    corrects = config.vllm_importance_sampling_correction and config.old_logprobs is OldLogprobs.POLICY
    log_ratio = inputs.logprobs.detach() - tokens.sampler_logprobs
    if corrects and mode in {ImportanceMode.SEQUENCE_TRUNCATE, ImportanceMode.SEQUENCE_MASK}:
        log_ratio = sum_per_sample(log_ratio, tokens)[tokens.sample_index]
    ratio = torch.exp(log_ratio)
    if not corrects:
        return ratio, None
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if mode in {ImportanceMode.TOKEN_TRUNCATE, ImportanceMode.SEQUENCE_TRUNCATE}:
        return ratio, ratio.clamp(min=low, max=high)
    outside = (ratio > high) | (ratio < (0.0 if low is None else low))
    return ratio, ratio.masked_fill(outside, 0.0)


def importance_metrics(ratio: Tensor) -> dict[str, Metric]:
    """Mean, largest and effective sample size (share of the tokens) of importance ratios [N]."""
    count = ratio.numel()
    if count == 0:
        return {}
    total, squares = float(ratio.sum()), float(ratio.square().sum())
    return {
        "importance/mean": token_mean(total, count),
        "importance/max": Metric(value=float(ratio.max()), reduce=Reduce.MAX),
        "importance/ess": Metric(value=total**2 / (count * squares) if squares else 0.0, weight=count),
    }


def _mean(values: Tensor) -> Metric:
    return token_mean(float(values.detach().float().sum()), values.numel())
