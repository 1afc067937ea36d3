"""Self-distillation policy optimisation (SDPO): towards oneself with more to go by, beside the policy loss.

    LossInputs --PolicyLoss (unless it weighs nothing)--> policy loss --.
               --TeacherSignal, TrainingSample.is_distilled ------------+--sdpo_loss--> LossOutput

    sdpo_loss   (1 - w) policy loss + w sum_i mean_t m_i r_t D_t / samples of the update
                m_i  1 where the teacher knows more than the student did     r_t  min(policy / old policy, clip)

Denominators are totals of the whole optimizer update, over all micro-batches and ranks: how an update is cut does not
matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenMetrics, TokenSequences
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds, TeacherSignal
from trl_ray.algorithms.head.divergence import sampled_reverse_kl
from trl_ray.algorithms.loss import LossInputs, LossNeeds, LossOutput
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.algorithms.policy.policy_terms import kl_estimate
from trl_ray.config.losses.distillation_options import DistillationMode, SDPOLossConfig, SDPOObjective
from trl_ray.config.losses.policy_options import KLEstimator, OldLogprobs
from trl_ray.types import Metric, Reduce, TrainingSample

LARGEST_LOG_RATIO = 20.0
"""Nats beyond which an importance ratio is not followed."""


class SDPOLoss:
    """(1 - weight) `PolicyLoss` + weight self-distillation; implements the `Loss` protocol.

    A part that weighs nothing is neither computed nor asks for anything. Denominators: for self-distillation the
    samples of the whole update, distilled or not; for the policy its own.

    The weight policy / old policy of a distilled token is taken against the first pass's log-probs where there are some
    (`TrainingSample.old_logprobs`), with `old_logprobs=sampler` against the sampler's; otherwise it is 1.

    Metrics: those of `sdpo_loss` and of `PolicyLoss`; of the latter, where the policy weighs nothing, `entropy` and
    `kl/sampler` alone.

    Args:
        config: the options of both parts.
        max_completion_length: the fixed length dr_grpo divides by, in tokens.
    """

    def __init__(self, config: SDPOObjective, *, max_completion_length: int | None = None) -> None:
        self.config = config
        self._policy = PolicyLoss(config=config, max_completion_length=max_completion_length)
        self._distils, self._has_policy = config.distillation_weight > 0, config.distillation_weight < 1

    @property
    def needs(self) -> LossNeeds:
        needs = self._policy.needs if self._has_policy else LossNeeds()
        return replace(needs, teacher=self._teacher_needs() if self._distils else None)

    def _teacher_needs(self) -> TeacherNeeds:
        config = self.config
        match config.distillation_mode:
            case DistillationMode.SAMPLED_TOKEN:
                return TeacherNeeds()
            case DistillationMode.FULL_LOGITS:
                return TeacherNeeds(beta=config.distillation_alpha, resident=True)
            case DistillationMode.TOPK_LOGITS:
                assert config.distillation_topk is not None, "the options say how many"
                return TeacherNeeds(student_top_k=config.distillation_topk)

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        """Those that every batch has are enough."""
        return self._policy.totals(samples)

    def has_gradient(self, sample: TrainingSample) -> bool:
        """Where something is distilled, or the policy loss has one."""
        if self._distils and sample.is_distilled and bool(sample.loss_mask.any()):
            return True
        return self._has_policy and self._policy.has_gradient(sample)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        policy = self._policy(inputs) if self._has_policy else None
        output = sdpo_loss(
            inputs.tokens,
            inputs.logprobs,
            inputs.taught if self._distils else TeacherSignal(),
            self.config,
            is_distilled=torch.tensor(
                [sample.is_distilled for sample in inputs.samples], device=inputs.logprobs.device
            ),
            num_samples=inputs.totals.num_samples,
            old_logprobs=self._old_logprobs(inputs),
            policy_loss=None if policy is None else policy.loss,
        )
        further = _plain_metrics(inputs) if policy is None else policy.metrics
        return LossOutput(loss=output.loss, metrics={**further, **output.metrics})

    def _old_logprobs(self, inputs: LossInputs) -> Tensor | None:
        """[N]; None: the policy's own."""
        if inputs.tokens.old_logprobs is None and self.config.old_logprobs is OldLogprobs.SAMPLER:
            return inputs.sampler_logprobs
        return inputs.tokens.old_logprobs

    def joined(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Nothing."""
        return self._policy.joined(metrics)

    def after_update(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        return self._policy.after_update(metrics) if self._has_policy else {}

    def state_dict(self) -> dict[str, float]:
        """That of the policy loss."""
        return self._policy.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state.

        Raises:
            KeyError: it was saved by a run whose entropy bonus did not adapt.
        """
        self._policy.load_state_dict(state)


def _plain_metrics(inputs: LossInputs) -> Mapping[str, Metric]:
    metrics = TokenMetrics(inputs.tokens)
    metrics.add("entropy", inputs.entropy)
    metrics.add("kl/sampler", kl_estimate(inputs.sampler_logprobs, inputs.logprobs.detach(), KLEstimator.K3))
    return metrics.metrics()


def sdpo_loss(
    tokens: TokenSequences,
    logprobs: Tensor,
    teacher: TeacherSignal,
    config: SDPOLossConfig,
    *,
    is_distilled: Tensor,
    num_samples: int,
    old_logprobs: Tensor | None = None,
    policy_loss: Tensor | None = None,
) -> LossOutput:
    """The loss of a micro-batch of samples, with every option of `SDPOLossConfig` (https://arxiv.org/abs/2601.20802).

    Samples that are not distilled add nothing and count in the mean over samples all the same.

    Metrics: `self_distillation/distillation_loss`, a mean over the tokens that are distilled;
    `self_distillation/policy_loss`, of the update; `self_distillation/logprob_abs_diff`, between student and teacher at
    the distilled tokens, where the teacher's log-probs are given; `self_distillation/is_ratio` and
    `self_distillation/is_clipped`, the mean weight of a distilled token and the share of those held by the clip.

    Args:
        tokens: the N trained tokens of the B samples of a micro-batch.
        logprobs: [N] of the policy, with gradient, in nats; like the teacher's at the temperature of the run.
        teacher: [N] of the same completions after the teacher's prompts; anything finite where nothing is distilled.
        config: the options.
        is_distilled: [B] bool: the teacher's prompt says more than the student's.
        num_samples: of the whole update, over all micro-batches and ranks, whether distilled or not.
        old_logprobs: [N] before the first update on these samples; None: those of the policy, so that no ratio is
            taken.
        policy_loss: scalar with gradient, this micro-batch's share of the update's; None only where it weighs nothing.
    """
    metrics = TokenMetrics(tokens)
    weight = config.distillation_weight
    loss = logprobs.new_zeros(())
    further: dict[str, Metric] = {}
    if weight > 0:
        distilled = is_distilled[tokens.sample_index]
        per_token = _divergences(logprobs, teacher, config)
        if config.distillation_is_clip is not None and old_logprobs is not None:
            ratio = clipped_ratio(logprobs, old_logprobs, config.distillation_is_clip)
            per_token = per_token * ratio
            metrics.add("self_distillation/is_ratio", ratio, where=distilled)
            metrics.add("self_distillation/is_clipped", ratio == config.distillation_is_clip, where=distilled)
        per_token = per_token.masked_fill(~distilled, 0.0)
        metrics.add("self_distillation/distillation_loss", per_token, where=distilled)
        if teacher.logprobs is not None:
            gap = (logprobs.detach() - teacher.logprobs).abs()
            metrics.add("self_distillation/logprob_abs_diff", gap, where=distilled)
        loss = loss + weight * (tokens.means(per_token).sum() / max(num_samples, 1))
    if weight < 1:
        assert policy_loss is not None, f"a policy loss of weight {1 - weight} must be given"
        loss = loss + (1 - weight) * policy_loss
        value = float(policy_loss.detach())
        further["self_distillation/policy_loss"] = Metric(value=value, reduce=Reduce.SUM)
    return LossOutput(loss=loss, metrics={**metrics.metrics(), **further})


def clipped_ratio(logprobs: Tensor, old_logprobs: Tensor, clip: float) -> Tensor:
    """Importance ratios [N] policy / old policy, at most `clip`; without gradient."""
    log_ratio = (logprobs - old_logprobs).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.exp().clamp(max=clip)


def _divergences(logprobs: Tensor, teacher: TeacherSignal, config: SDPOLossConfig) -> Tensor:
    """[N]"""
    match config.distillation_mode:
        case DistillationMode.SAMPLED_TOKEN:
            return sampled_reverse_kl(logprobs, teacher.of_tokens)
        case DistillationMode.FULL_LOGITS:
            return teacher.over_vocabulary
        case DistillationMode.TOPK_LOGITS:
            return teacher.over_support(beta=config.distillation_alpha, add_tail=config.distillation_add_tail)
