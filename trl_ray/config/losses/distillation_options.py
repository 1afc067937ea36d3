"""The options of distillation's losses, under the names that TRL has given them; those of teachers: teachers.py.

DivergenceConfig         how far the student is from the teacher, and on which tokens of the vocabulary
DistillationLossConfig   the same, or the importance-weighted objective, and the share of cross-entropy
SDPOLossConfig           the blend of policy and self-distillation, diagnostics
SDPOObjective            the same with the policy objective that it is blended with
RepromptConfig           what the self-teacher is shown
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from trl_ray.config.base import FROM_STRING, Fraction, Natural, Positive, Section, rule
from trl_ray.config.losses.literal_templates import fill
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.policy_options import LossConfig


class Support(enum.StrEnum):
    """Which tokens of the vocabulary a divergence is taken over."""

    FULL = "full"
    """All of them; teacher and student must stand in one place."""
    TEACHER = "teacher"
    """The teacher's K most probable ones."""
    STUDENT = "student"
    """The student's K most probable ones."""
    UNION = "union"
    """Both, each token once."""
    REALISED = "realised"
    """The completion's own token, beside the teacher's K most probable ones unless beta is 1: what a server that
    answers with its K most probable tokens knows for certain."""
    SAMPLED = "sampled"
    """The completion's own token, alone: the score-function form of the reverse KL."""


def _refuse_zero(value: Any) -> Any:
    """TRL's 0 is the whole vocabulary."""
    if value == 0 and isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("it must be at least 1, got 0. For the whole vocabulary set loss_support=full.")
    return value


class DivergenceConfig(Section):
    """The generalised Jensen-Shannon divergence between teacher and student."""

    beta: Fraction = 1.0
    """0 is KL(teacher || student), 1 is KL(student || teacher); in between the mixture is (1 - beta) student + beta
    teacher (https://arxiv.org/abs/2306.13649)."""
    loss_support: Annotated[Support, FROM_STRING] = Support.TEACHER
    loss_top_k: Annotated[Positive, BeforeValidator(_refuse_zero)] = 20
    """Tokens of the support on each side; full, sampled and realised with beta=1 take none."""
    loss_add_tail: bool = True
    """One more outcome for all the mass that the support leaves out; else both sides are normalised over it."""

    @property
    def teacher_top_k(self) -> int:
        """How many of its most probable tokens the teacher must name; 0: none."""
        if self.loss_support in (Support.TEACHER, Support.UNION):
            return self.loss_top_k
        return self.loss_top_k if self.loss_support is Support.REALISED and self.beta < 1 else 0

    @property
    def student_top_k(self) -> int:
        """How many of the student's most probable tokens the teacher must score; 0: none."""
        return self.loss_top_k if self.loss_support in (Support.STUDENT, Support.UNION) else 0

    @rule
    def _check_width(self) -> None:
        lone = self.loss_top_k == 1 and self.loss_support in (Support.TEACHER, Support.STUDENT)
        lone = lone or (self.loss_support is Support.REALISED and self.beta == 1)
        if lone and not self.loss_add_tail:
            raise ValueError(
                f"loss_add_tail must be true with loss_support={self.loss_support.value}, loss_top_k={self.loss_top_k} "
                f"and beta={self.beta}, got false: normalised over one token, student and teacher never differ. Set "
                "loss_add_tail=true, or a larger support."
            )

    @rule
    def _check_sampled(self) -> None:
        if self.loss_support is Support.SAMPLED and self.beta != 1:
            raise ValueError(
                f"beta must be 1 with loss_support=sampled, got {self.beta}: one sampled token estimates the reverse "
                "KL only. Set beta=1, or another support."
            )


class DistillationObjective(enum.StrEnum):
    """What a token loses; the values are TRL's."""

    JSD = "jsd"
    """The divergence."""
    IW_OPD = "iw_opd"
    """Importance-weighted on-policy distillation: a policy gradient whose advantage is the teacher's log-prob above the
    sampler's, weighted more the earlier in the completion it stands."""


class DistillationLossConfig(DivergenceConfig, LossSection):
    """The loss of distillation; `trl_ray.algorithms.distillation.distillation_loss` has the formulas."""

    built_in: ClassVar[str] = "trl_ray.algorithms.distillation.distillation_loss:DistillationLoss"

    distillation_objective: Annotated[DistillationObjective, FROM_STRING] = DistillationObjective.JSD
    iw_opd_gamma: Annotated[float, Field(ge=0)] = 0.5
    """How much more the first token weighs than the last; iw_opd only."""
    iw_opd_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Least sum of absolute advantages of a completion, by which they are divided, in nats; iw_opd only."""
    cross_entropy_weight: Fraction = 0.0
    """Where a completion comes from the dataset, tokens lose (1 - weight) divergence - weight log-prob."""

    @property
    def needs_both_sides(self) -> bool:
        """Whether only who holds both the student and the teacher can compute it."""
        both = self.loss_support in (Support.FULL, Support.STUDENT, Support.UNION)
        return both and self.distillation_objective is DistillationObjective.JSD

    @property
    def teacher_top_k(self) -> int:
        """As without the objective; iw_opd asks for the completions' own tokens alone."""
        return 0 if self.distillation_objective is DistillationObjective.IW_OPD else super().teacher_top_k

    @property
    def student_top_k(self) -> int:
        """As without the objective; iw_opd asks for the completions' own tokens alone."""
        return 0 if self.distillation_objective is DistillationObjective.IW_OPD else super().student_top_k

    @rule
    def _check_objective(self) -> None:
        if self.distillation_objective is DistillationObjective.IW_OPD and self.beta != 1:
            raise ValueError(
                f"beta must be 1 with distillation_objective=iw_opd, got {self.beta}: it estimates the reverse KL "
                "only. Remove one of the two."
            )


class RepromptConfig(Section):
    """How the self-teacher's prompt is made of successes and feedback; names and defaults are TRL's."""

    use_successful_as_teacher: bool = True
    """Show the teacher a sibling's successful completion."""
    success_reward_threshold: float = 1.0
    """Total reward from which a completion is a success."""
    dont_reprompt_on_self_success: bool = True
    """A completion is not its own demonstration."""
    max_reprompt_len: Positive = 10240
    """Tokens of the teacher's prompt; the last ones are kept."""
    reprompt_template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution_template: str = "\nCorrect solution:\n\n{successful_previous_attempt}\n\n"
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n"
    include_environment_feedback: bool = False
    """Show the teacher the row's privileged context, or what rewards and environments had to say."""
    environment_feedback_only_without_solution: bool = False
    remove_thinking_from_demonstration: bool = False
    """Take ``<think>...</think>`` out of demonstrations."""

    @rule
    def _check_templates(self) -> None:
        wanted = {
            "reprompt_template": {"prompt": "", "solution": "", "feedback": ""},
            "solution_template": {"successful_previous_attempt": ""},
            "feedback_template": {"feedback_raw": ""},
        }
        for name, values in wanted.items():
            try:
                fill(getattr(self, name), values)
            except ValueError as error:
                raise ValueError(
                    f"{name} must have no other fields than {', '.join('{' + key + '}' for key in values)}, got "
                    f"{getattr(self, name)!r} ({error}). Write braces of the text twice."
                ) from error


class DistillationMode(enum.StrEnum):
    """What SDPO distils; the values are TRL's."""

    SAMPLED_TOKEN = "sampled_token"
    FULL_LOGITS = "full_logits"
    TOPK_LOGITS = "topk_logits"


class SDPOLossConfig(Section):
    """Self-distillation's part of the loss; names and defaults are those of TRL's SDPOConfig."""

    distillation_weight: Fraction = 1.0
    """The loss is (1 - weight) policy + weight distillation."""
    distillation_mode: Annotated[DistillationMode, FROM_STRING] = DistillationMode.SAMPLED_TOKEN
    distillation_alpha: Fraction = 1.0
    """The beta of the divergence: 1 is the reverse KL."""
    distillation_topk: Positive | None = None
    distillation_add_tail: bool = False
    distillation_is_clip: Annotated[float, Field(gt=0)] | None = 2.0
    """Largest weight policy / old policy of a token, where samples are trained on again; None weighs all alike."""
    diagnostics_warning_interval: Natural = 10
    """Degenerate steps in a row between two warnings; 0 never warns."""
    diagnostics_flat_tolerance: Annotated[float, Field(ge=0)] = 1e-8

    @rule
    def _check_mode(self) -> None:
        mode = self.distillation_mode
        if mode is DistillationMode.SAMPLED_TOKEN and self.distillation_alpha != 1:
            raise ValueError(
                f"distillation_alpha must be 1 with distillation_mode=sampled_token, got {self.distillation_alpha}: "
                "one token estimates the reverse KL only. Set it to 1, or distillation_mode=topk_logits."
            )
        if (mode is DistillationMode.TOPK_LOGITS) != (self.distillation_topk is not None):
            raise ValueError(
                "distillation_topk must be set with distillation_mode=topk_logits and left out otherwise, got "
                f"{self.distillation_topk} and {mode.value}. Change one of the two."
            )
        if self.distillation_topk == 1 and not self.distillation_add_tail:
            raise ValueError(
                "distillation_add_tail must be true with distillation_topk=1, got false: normalised over one token, "
                "student and teacher never differ. Set it to true, or distillation_topk to 2 or more."
            )
        if self.distillation_add_tail and mode is not DistillationMode.TOPK_LOGITS:
            raise ValueError(
                f"distillation_add_tail must be false with distillation_mode={mode.value}, got true: only topk_logits "
                "leaves mass out. Remove it."
            )


class SDPOObjective(LossConfig, SDPOLossConfig):
    """All that SDPO's loss reads."""

    built_in: ClassVar[str] = "trl_ray.algorithms.distillation.sdpo_loss:SDPOLoss"

    @rule
    def _check_policy_part(self) -> None:
        if self.beta > 0 and self.distillation_weight == 1:
            raise ValueError(
                f"beta must be 0 with distillation_weight=1, got {self.beta}: the KL belongs to the policy loss, which "
                "weighs nothing. Lower distillation_weight, or remove beta."
            )
