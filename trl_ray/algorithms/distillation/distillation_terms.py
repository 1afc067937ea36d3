"""The losses of distillation: towards a teacher that another model is, and towards oneself with more to go by (SDPO).

    TeacherSignal + log-probs [N] --token loss--> L_t [N]      divergence.py: full, over a support, of one token

    distillation_loss   sum_t L_t / trained tokens of the update
                        L_t  (1 - w) D_t - w log pi_t, or D_t where the student has sampled the completion itself
    iw_opd              D_t  -w_t a_t log pi_t        a_t  sg(log teacher - log sampler)     https://arxiv.org/abs/2606.22600
                        w_t  1 + gamma (1 - sum_{s<t} |a_s| / max(sum_s |a_s|, epsilon))
    sdpo_loss           (1 - w) policy loss + w sum_i mean_t m_i r_t D_t / samples of the update
                        m_i  1 where the teacher knows more than the student did     r_t  min(policy / old policy, clip)

sg: without gradient. Denominators are totals of the whole optimizer update, over all micro-batches and ranks: how an
update is cut does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenMetrics, TokenSequences
from trl_ray.algorithms.distillation.teacher_signal import TeacherSignal
from trl_ray.algorithms.head.divergence import realised_reverse_kl, sampled_reverse_kl
from trl_ray.algorithms.loss import LossOutput
from trl_ray.config.losses.distillation_options import (
    DistillationLossConfig,
    DistillationMode,
    DistillationObjective,
    SDPOLossConfig,
    Support,
)
from trl_ray.types import Metric, Reduce

LARGEST_LOG_RATIO = 20.0
"""Nats beyond which an importance ratio is not followed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistillationInputs:
    """The N trained tokens of a micro-batch."""

    tokens: TokenSequences
    logprobs: Tensor
    """[N] of the student, with gradient, in nats; like the teacher's at the temperature of distillation."""
    teacher: TeacherSignal
    sampler_logprobs: Tensor | None = None
    """[N] of the policy that sampled the completions; None: the student's own. Only iw_opd reads them."""
    is_label: Tensor | None = None
    """[N] bool, False at tokens that the student has sampled, which are no example to follow; None: all True. Only the
    cross-entropy reads it."""
    entropy: Tensor | None = None
    """[N] nats, of the student; None: it is not reported."""
    num_valid_tokens: int
    """Trained tokens of the whole update, over all micro-batches and ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SDPOInputs:
    """The N trained tokens of the B samples of a micro-batch."""

    tokens: TokenSequences
    logprobs: Tensor
    """[N] of the policy, with gradient, in nats; like the teacher's at the temperature of the run."""
    teacher: TeacherSignal
    """Of the same completions after the teacher's prompts; anything finite where nothing is distilled."""
    is_distilled: Tensor
    """[B] bool: the teacher's prompt says more than the student's."""
    old_logprobs: Tensor | None = None
    """[N] before the first update on these samples; None: those of the policy, so that no ratio is taken."""
    policy_loss: Tensor | None = None
    """Scalar with gradient, this micro-batch's share of the update's policy loss; None only where it weighs nothing."""
    num_samples: int
    """Samples of the whole update, over all micro-batches and ranks, whether distilled or not."""


def distillation_loss(inputs: DistillationInputs, config: DistillationLossConfig) -> LossOutput:
    """The loss of a micro-batch of tokens, with every option of `DistillationLossConfig`.

    A micro-batch without trained tokens has loss 0, with a gradient of 0.

    Metrics, means over trained tokens: `distillation/loss`, before the cross-entropy; `distillation/log_ratio`, student
    to teacher at the completions' own tokens, which estimates the reverse KL where the student has sampled them;
    `distillation/cross_entropy` of labels where it has a weight; `entropy` where it is given. With iw_opd also
    `iw_opd/mean_advantage`, `iw_opd/mean_abs_advantage`, `iw_opd/mean_weight`, `iw_opd/min_weight` and
    `iw_opd/max_weight`, as TRL calls them.
    """
    metrics = TokenMetrics(inputs.tokens)
    further: dict[str, Metric] = {}
    if config.distillation_objective is DistillationObjective.IW_OPD:
        weighted = weighted_advantages(inputs, config)
        per_token = -inputs.logprobs * weighted.advantages
        further = weighted.metrics(metrics)
    else:
        per_token = _divergences(inputs, config)
    metrics.add("distillation/loss", per_token)
    if inputs.teacher.logprobs is not None:
        metrics.add("distillation/log_ratio", inputs.logprobs.detach() - inputs.teacher.logprobs)
    if inputs.entropy is not None:
        metrics.add("entropy", inputs.entropy)
    if config.cross_entropy_weight > 0:
        is_label = inputs.is_label if inputs.is_label is not None else torch.ones_like(per_token, dtype=torch.bool)
        metrics.add("distillation/cross_entropy", -inputs.logprobs, where=is_label)
        share = config.cross_entropy_weight
        per_token = torch.where(is_label, (1 - share) * per_token - share * inputs.logprobs, per_token)
    loss = per_token.sum() / max(inputs.num_valid_tokens, 1)
    return LossOutput(loss=loss, metrics={**metrics.metrics(), **further})


def sdpo_loss(inputs: SDPOInputs, config: SDPOLossConfig) -> LossOutput:
    """The loss of a micro-batch of samples, with every option of `SDPOLossConfig` (https://arxiv.org/abs/2601.20802).

    Samples that are not distilled add nothing and count in the mean over samples all the same.

    Metrics: `self_distillation/distillation_loss`, a mean over the tokens that are distilled;
    `self_distillation/policy_loss`, of the update; `self_distillation/logprob_abs_diff`, between student and teacher at
    the distilled tokens, where the teacher's log-probs are given; `self_distillation/is_ratio` and
    `self_distillation/is_clipped`, the mean weight of a distilled token and the share of those held by the clip.
    """
    metrics = TokenMetrics(inputs.tokens)
    weight = config.distillation_weight
    loss = inputs.logprobs.new_zeros(())
    further: dict[str, Metric] = {}
    if weight > 0:
        loss = loss + weight * _self_distillation(inputs, config, metrics)
    if weight < 1:
        assert inputs.policy_loss is not None, f"a policy loss of weight {1 - weight} must be given"
        loss = loss + (1 - weight) * inputs.policy_loss
        value = float(inputs.policy_loss.detach())
        further["self_distillation/policy_loss"] = Metric(value=value, reduce=Reduce.SUM)
    return LossOutput(loss=loss, metrics={**metrics.metrics(), **further})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedAdvantages:
    """What importance-weighted distillation multiplies log-probs with; without gradient."""

    plain: Tensor
    """[N] nats by which the teacher's log-prob is above the sampler's."""
    weights: Tensor
    """[N] from 1 to 1 + gamma, falling along a completion."""

    @property
    def advantages(self) -> Tensor:
        """[N]"""
        return self.weights * self.plain

    def metrics(self, means: TokenMetrics) -> dict[str, Metric]:
        """Add means; what is no mean is returned."""
        means.add("iw_opd/mean_advantage", self.advantages)
        means.add("iw_opd/mean_abs_advantage", self.plain.abs())
        means.add("iw_opd/mean_weight", self.weights)
        if not len(self.weights):
            return {}
        least, largest = torch.stack(torch.aminmax(self.weights)).tolist()
        return {
            "iw_opd/min_weight": Metric(value=least, reduce=Reduce.MIN),
            "iw_opd/max_weight": Metric(value=largest, reduce=Reduce.MAX),
        }


def weighted_advantages(inputs: DistillationInputs, config: DistillationLossConfig) -> WeightedAdvantages:
    """Importance-weighted on-policy distillation's advantages: the earlier a token, the more hangs on it."""
    tokens = inputs.tokens
    sampler = inputs.logprobs if inputs.sampler_logprobs is None else inputs.sampler_logprobs
    plain = (inputs.teacher.of_tokens - sampler).detach()
    # One running sum over all completions, from which each one's start is taken: too much for float32's digits.
    sizes = plain.abs().double()
    before = sizes.cumsum(0) - sizes
    counts = tokens.counts()
    starts = (counts.cumsum(0) - counts)[tokens.sample_index]
    totals = tokens.sums(sizes).clamp_min(config.iw_opd_epsilon)[tokens.sample_index]
    weights = 1 + config.iw_opd_gamma * (1 - (before - before[starts]) / totals)
    return WeightedAdvantages(plain=plain, weights=weights.to(plain.dtype))


def clipped_ratio(logprobs: Tensor, old_logprobs: Tensor, clip: float) -> Tensor:
    """Importance ratios [N] policy / old policy, at most `clip`; without gradient."""
    log_ratio = (logprobs - old_logprobs).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.exp().clamp(max=clip)


def _divergences(inputs: DistillationInputs, config: DistillationLossConfig) -> Tensor:
    """[N]"""
    teacher = inputs.teacher
    match config.loss_support:
        case Support.FULL:
            return teacher.over_vocabulary
        case Support.SAMPLED:
            return sampled_reverse_kl(inputs.logprobs, teacher.of_tokens)
        case Support.REALISED if config.beta == 1:
            assert config.loss_add_tail, "one token without a tail is no distribution"
            return realised_reverse_kl(inputs.logprobs, teacher.of_tokens)
        case _:
            return teacher.over_support(beta=config.beta, add_tail=config.loss_add_tail)


def _self_distillation(inputs: SDPOInputs, config: SDPOLossConfig, metrics: TokenMetrics) -> Tensor:
    """This micro-batch's share of the update's self-distillation loss."""
    tokens, teacher = inputs.tokens, inputs.teacher
    distilled = inputs.is_distilled[tokens.sample_index]
    match config.distillation_mode:
        case DistillationMode.SAMPLED_TOKEN:
            per_token = sampled_reverse_kl(inputs.logprobs, teacher.of_tokens)
        case DistillationMode.FULL_LOGITS:
            per_token = teacher.over_vocabulary
        case DistillationMode.TOPK_LOGITS:
            per_token = teacher.over_support(beta=config.distillation_alpha, add_tail=config.distillation_add_tail)
    clip = config.distillation_is_clip
    if clip is not None and inputs.old_logprobs is not None:
        ratio = clipped_ratio(inputs.logprobs, inputs.old_logprobs, clip)
        per_token = per_token * ratio
        metrics.add("self_distillation/is_ratio", ratio, where=distilled)
        metrics.add("self_distillation/is_clipped", ratio == clip, where=distilled)
    per_token = per_token.masked_fill(~distilled, 0.0)
    metrics.add("self_distillation/distillation_loss", per_token, where=distilled)
    if teacher.logprobs is not None:
        gap = (inputs.logprobs.detach() - teacher.logprobs).abs()
        metrics.add("self_distillation/logprob_abs_diff", gap, where=distilled)
    return tokens.means(per_token).sum() / max(inputs.num_samples, 1)
