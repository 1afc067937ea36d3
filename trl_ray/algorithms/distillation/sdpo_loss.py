"""Self-distillation policy optimisation as the learner calls it: `distillation.sdpo_loss` and the policy loss.

LossInputs --PolicyLoss (unless it weighs nothing)--> policy loss --.
           --TeacherSignal, TrainingSample.is_distilled ------------+--sdpo_loss--> LossOutput
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenMetrics
from trl_ray.algorithms.distillation.distillation_terms import SDPOInputs, sdpo_loss
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds, TeacherSignal
from trl_ray.algorithms.loss import LossInputs, LossNeeds, LossOutput
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.algorithms.policy.policy_terms import kl_estimate
from trl_ray.config.losses.distillation_options import DistillationMode, SDPOObjective
from trl_ray.config.losses.policy_options import KLEstimator, OldLogprobs
from trl_ray.types import Metric, TrainingSample


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
        given = SDPOInputs(
            tokens=inputs.tokens,
            logprobs=inputs.logprobs,
            teacher=inputs.taught if self._distils else TeacherSignal(),
            is_distilled=torch.tensor(
                [sample.is_distilled for sample in inputs.samples], device=inputs.logprobs.device
            ),
            old_logprobs=self._old_logprobs(inputs),
            policy_loss=None if policy is None else policy.loss,
            num_samples=inputs.totals.num_samples,
        )
        output = sdpo_loss(given, self.config)
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
