"""Distillation as the learner calls it: `distillation.distillation_loss` behind the `Loss` protocol.

LossInputs: student's scores [N], TeacherSignal [N] --> DistillationInputs --distillation_loss--> LossOutput
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.distillation.distillation_terms import DistillationInputs, distillation_loss
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.distillation_options import DistillationLossConfig, DistillationObjective, Support
from trl_ray.types import TrainingSample


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
        tokens, is_label = inputs.tokens, label_tokens(inputs.samples, inputs.tokens)
        sampler = tokens.sampler_logprobs
        if sampler is not None:
            sampler = torch.where(is_label, inputs.logprobs.detach(), sampler)
        given = DistillationInputs(
            tokens=tokens,
            logprobs=inputs.logprobs,
            teacher=inputs.taught,
            sampler_logprobs=sampler,
            is_label=is_label,
            entropy=inputs.entropy,
            num_valid_tokens=inputs.totals.num_valid_tokens,
        )
        return distillation_loss(given, self.config)


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
