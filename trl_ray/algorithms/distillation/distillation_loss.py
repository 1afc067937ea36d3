"""Distillation: the loss of tokens towards a teacher that another model is.

    TeacherSignal + log-probs [N] --token loss--> L_t [N]      divergence.py: full, over a support, of one token

    distillation_loss   sum_t L_t / trained tokens of the update
                        L_t  (1 - w) D_t - w log pi_t, or D_t where the student has sampled the completion itself
    iw_opd              D_t  -w_t a_t log pi_t        a_t  sg(log teacher - log sampler)     https://arxiv.org/abs/2606.22600
                        w_t  1 + gamma (1 - sum_{s<t} |a_s| / max(sum_s |a_s|, epsilon))

sg: without gradient. The denominator is that of the whole optimizer update, over all micro-batches and ranks: how an
update is cut does not matter. Towards oneself with more to go by: `sdpo_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenMetrics, TokenSequences
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds, TeacherSignal
from trl_ray.algorithms.head.divergence import realised_reverse_kl, sampled_reverse_kl
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.distillation_options import DistillationLossConfig, DistillationObjective, Support
from trl_ray.types import Metric, Reduce, TrainingSample


class DistillationLoss(FixedLoss):
    """`distillation_loss` over samples that a teacher has scored, or a learner's own teacher scores; a `Loss`.

    Denominator: the trained tokens of the whole update. What the dataset gave (`TrainingSample.is_label`) is an example
    to follow for the cross-entropy, and has no sampler whose log-probs count.

    Args:
        config: the options.
    """

    def __init__(self, config: DistillationLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(teacher=_teacher_needs(self.config))

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """A teacher is asked about every sample that has a trained token."""
        left_out = [each.group_id for each in inputs.samples if not each.is_distilled and each.loss_mask.any()]
        assert not left_out, f"only self-distillation leaves samples out, but those of groups {left_out} are"
        is_label, sampler = label_tokens(inputs.samples, inputs.tokens), inputs.tokens.sampler_logprobs
        if sampler is not None:
            sampler = torch.where(is_label, inputs.logprobs.detach(), sampler)
        return distillation_loss(
            inputs.tokens,
            inputs.language,
            inputs.taught,
            self.config,
            num_valid_tokens=inputs.totals.num_valid_tokens,
            sampler_logprobs=sampler,
            is_label=is_label,
        )


def label_tokens(samples: Sequence[TrainingSample], tokens: TokenSequences) -> Tensor:
    """[N] bool: tokens of examples to follow."""
    is_label = [sample.is_label for sample in samples]
    return torch.tensor(is_label, dtype=torch.bool, device=tokens.sample_index.device)[tokens.sample_index]


def _teacher_needs(config: DistillationLossConfig) -> TeacherNeeds:
    if config.distillation_objective is DistillationObjective.IW_OPD:
        return TeacherNeeds()
    support = config.loss_support
    return TeacherNeeds(
        teacher_top_k=config.teacher_top_k,
        student_top_k=config.student_top_k,
        own_token=support is Support.REALISED and config.beta < 1,
        beta=config.beta if support is Support.FULL else None,
        resident=config.needs_both_sides,
    )


def distillation_loss(
    tokens: TokenSequences,
    scores: TokenLogprobs,
    teacher: TeacherSignal,
    config: DistillationLossConfig,
    *,
    num_valid_tokens: int,
    sampler_logprobs: Tensor | None = None,
    is_label: Tensor | None = None,
) -> LossOutput:
    """The loss of a micro-batch of tokens, with every option of `DistillationLossConfig`.

    A micro-batch without trained tokens has loss 0, with a gradient of 0.

    Metrics, means over trained tokens: `distillation/loss`, before the cross-entropy; `distillation/log_ratio`, student
    to teacher at the completions' own tokens, which estimates the reverse KL where the student has sampled them;
    `distillation/cross_entropy` of labels where it has a weight; `entropy`. With iw_opd also `iw_opd/mean_advantage`,
    `iw_opd/mean_abs_advantage`, `iw_opd/mean_weight`, `iw_opd/min_weight` and `iw_opd/max_weight`, as TRL calls them.

    Args:
        tokens: the N trained tokens of a micro-batch.
        scores: [N] of the student, with gradient; like the teacher's at the temperature of distillation.
        teacher: [N] what is known of it.
        config: the options.
        num_valid_tokens: trained tokens of the whole update, over all micro-batches and ranks.
        sampler_logprobs: [N] of the policy that sampled the completions; None: the student's own. Only iw_opd reads
            them.
        is_label: [N] bool, False at tokens that the student has sampled, which are no example to follow; None: all
            True. Only the cross-entropy reads it.
    """
    logprobs, metrics = scores.logprobs, TokenMetrics(tokens)
    further: dict[str, Metric] = {}
    if config.distillation_objective is DistillationObjective.IW_OPD:
        sampler = logprobs if sampler_logprobs is None else sampler_logprobs
        weighted = weighted_advantages(tokens, teacher.of_tokens, sampler, config)
        per_token = -logprobs * weighted.advantages
        further = weighted.metrics(metrics)
    else:
        per_token = _divergences(logprobs, teacher, config)
    metrics.add("distillation/loss", per_token)
    if teacher.logprobs is not None:
        metrics.add("distillation/log_ratio", logprobs.detach() - teacher.logprobs)
    metrics.add("entropy", scores.entropy)
    if config.cross_entropy_weight > 0:
        is_label = is_label if is_label is not None else torch.ones_like(per_token, dtype=torch.bool)
        metrics.add("distillation/cross_entropy", -logprobs, where=is_label)
        share = config.cross_entropy_weight
        per_token = torch.where(is_label, (1 - share) * per_token - share * logprobs, per_token)
    loss = per_token.sum() / max(num_valid_tokens, 1)
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


def weighted_advantages(
    tokens: TokenSequences, teacher: Tensor, sampler: Tensor, config: DistillationLossConfig
) -> WeightedAdvantages:
    """Importance-weighted on-policy distillation's advantages: the earlier a token, the more hangs on it.

    Args:
        tokens: the N trained tokens of a micro-batch.
        teacher: [N] its log-probs of them.
        sampler: [N] those of whoever sampled them.
        config: the options.
    """
    plain = (teacher - sampler).detach()
    # One running sum over all completions, from which each one's start is taken: too much for float32's digits.
    sizes = plain.abs().double()
    before = sizes.cumsum(0) - sizes
    counts = tokens.counts()
    starts = (counts.cumsum(0) - counts)[tokens.sample_index]
    totals = tokens.sums(sizes).clamp_min(config.iw_opd_epsilon)[tokens.sample_index]
    weights = 1 + config.iw_opd_gamma * (1 - (before - before[starts]) / totals)
    return WeightedAdvantages(plain=plain, weights=weights.to(plain.dtype))


def _divergences(logprobs: Tensor, teacher: TeacherSignal, config: DistillationLossConfig) -> Tensor:
    """[N]"""
    match config.loss_support:
        case Support.FULL:
            return teacher.over_vocabulary
        case Support.SAMPLED:
            return sampled_reverse_kl(logprobs, teacher.of_tokens)
        case Support.REALISED if config.beta == 1:
            assert config.loss_add_tail, "one token without a tail is no distribution"
            return realised_reverse_kl(logprobs, teacher.of_tokens)
        case _:
            return teacher.over_support(beta=config.beta, add_tail=config.loss_add_tail)
