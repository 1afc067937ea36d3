"""The options of distillation's losses and of its teachers, under the names that TRL has given them.

DivergenceConfig         how far the student is from the teacher, and on which tokens of the vocabulary
DistillationLossConfig   the same, or the importance-weighted objective, and the share of cross-entropy
SDPOLossConfig           the blend of policy and self-distillation, diagnostics
TeacherConfig            nested, ours: where teachers run
TeacherServerConfig      nested, ours: one that is asked over HTTP
"""

from __future__ import annotations

import enum
from typing import Annotated, Self

from pydantic import Field, model_validator

from trl_ray.config.base import Section
from trl_ray.config.fields import FROM_STRING, Fraction, Natural, Positive, Seconds


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


class DivergenceConfig(Section):
    """The generalised Jensen-Shannon divergence between teacher and student."""

    beta: Fraction = 1.0
    """0 is KL(teacher || student), 1 is KL(student || teacher); in between the mixture is (1 - beta) student + beta
    teacher (https://arxiv.org/abs/2306.13649)."""
    distillation_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both sides' logits are divided by it."""
    support: Annotated[Support, FROM_STRING] = Support.TEACHER
    top_k: Positive = 20
    """Tokens of the support on each side; full, sampled and realised with beta=1 take none."""
    add_tail: bool = True
    """One more outcome for all the mass that the support leaves out; else both sides are normalised over it."""

    @property
    def teacher_top_k(self) -> int:
        """How many of its most probable tokens the teacher must name; 0: none."""
        if self.support in (Support.TEACHER, Support.UNION):
            return self.top_k
        return self.top_k if self.support is Support.REALISED and self.beta < 1 else 0

    @property
    def student_top_k(self) -> int:
        """How many of the student's most probable tokens the teacher must score; 0: none."""
        return self.top_k if self.support in (Support.STUDENT, Support.UNION) else 0

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        lone = self.top_k == 1 and self.support in (Support.TEACHER, Support.STUDENT)
        lone = lone or (self.support is Support.REALISED and self.beta == 1)
        if lone and not self.add_tail:
            raise ValueError(
                f"add_tail must be true with support={self.support.value}, top_k={self.top_k} and beta={self.beta}, "
                "got false: normalised over one token, student and teacher never differ. Set add_tail=true, or a "
                "larger support."
            )
        return self

    @model_validator(mode="after")
    def _check_sampled(self) -> Self:
        if self.support is Support.SAMPLED and self.beta != 1:
            raise ValueError(
                f"beta must be 1 with support=sampled, got {self.beta}: one sampled token estimates the reverse KL "
                "only. Set beta=1, or another support."
            )
        return self


class DistillationObjective(enum.StrEnum):
    """What a token loses; the values are TRL's."""

    JSD = "jsd"
    """The divergence."""
    IW_OPD = "iw_opd"
    """Importance-weighted on-policy distillation: a policy gradient whose advantage is the teacher's log-prob above the
    sampler's, weighted more the earlier in the completion it stands."""


class DistillationLossConfig(DivergenceConfig):
    """The loss of distillation; `trl_ray.algorithms.distillation` has the formulas."""

    distillation_objective: Annotated[DistillationObjective, FROM_STRING] = DistillationObjective.JSD
    iw_opd_gamma: Annotated[float, Field(ge=0)] = 0.5
    """How much more the first token weighs than the last; iw_opd only."""
    iw_opd_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Least sum of absolute advantages of a completion, by which they are divided, in nats; iw_opd only."""
    cross_entropy_weight: Fraction = 0.0
    """Where a completion comes from the dataset, tokens lose (1 - weight) divergence - weight log-prob."""

    @property
    def teacher_top_k(self) -> int:
        """As without the objective; iw_opd asks for the completions' own tokens alone."""
        return 0 if self.distillation_objective is DistillationObjective.IW_OPD else super().teacher_top_k

    @property
    def student_top_k(self) -> int:
        """As without the objective; iw_opd asks for the completions' own tokens alone."""
        return 0 if self.distillation_objective is DistillationObjective.IW_OPD else super().student_top_k

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.distillation_objective is DistillationObjective.IW_OPD and self.beta != 1:
            raise ValueError(
                f"beta must be 1 with distillation_objective=iw_opd, got {self.beta}: it estimates the reverse KL "
                "only. Remove one of the two."
            )
        return self


class TeacherKind(enum.StrEnum):
    """Whose weights a teacher holds."""

    EMA = "ema"
    """A moving average of the policy's."""
    LIVE = "live"
    """The policy's, as they were last published."""
    BASE = "base"
    """Those that training started from."""
    EXTERNAL = "external"
    """Another model's."""


class AdapterAverage(enum.StrEnum):
    """What of a low-rank adapter is averaged."""

    FACTORS = "factors"
    """A and B each, from zero: TRL's convention, whose product is no average of the products."""
    PRODUCT = "product"
    """The weights they amount to."""


class TeacherWeights(Section):
    """How a teacher of the policy's own weights follows them; the names are those of TRL's SDPOConfig."""

    teacher_model_kind: Annotated[TeacherKind, FROM_STRING] = TeacherKind.EMA
    teacher_update_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """teacher <- (1 - rate) teacher + rate policy."""
    teacher_sync_steps: Positive = 1
    """Optimizer steps between two updates."""
    teacher_adapter_average: Annotated[AdapterAverage, FROM_STRING] = AdapterAverage.FACTORS


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

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        wanted = {
            "reprompt_template": {"prompt": "", "solution": "", "feedback": ""},
            "solution_template": {"successful_previous_attempt": ""},
            "feedback_template": {"feedback_raw": ""},
        }
        for name, values in wanted.items():
            try:
                getattr(self, name).format(**values)
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{name} must have no other fields than {', '.join('{' + key + '}' for key in values)}, got "
                    f"{getattr(self, name)!r} ({error}). Write braces of the text twice."
                ) from error
        return self


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

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
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
        return self


class PayloadDtype(enum.StrEnum):
    """Number format of log-probs on their way."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class PayloadIds(enum.StrEnum):
    """Number format of token ids on their way."""

    INT32 = "int32"
    """Read where they lie."""
    COMPACT = "compact"
    """The low 16 bits and, in vocabularies beyond 65536, 8 more: fewer bytes on a network, unpacked on arrival."""


class TeacherConfig(Section):
    """Teachers as actors."""

    num_workers: Positive = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    payload_dtype: Annotated[PayloadDtype, FROM_STRING] = PayloadDtype.FLOAT32
    payload_ids: Annotated[PayloadIds, FROM_STRING] = PayloadIds.INT32
    max_tokens_per_batch: Positive = 4096
    """Tokens of one forward pass; requests that wait together share it."""
    timeout_s: Seconds = 120.0
    """For one request, at the teacher and on the way."""
    max_attempts: Positive = 3
    """Times a request is sent before its group is dropped."""


class TeacherProtocol(enum.StrEnum):
    """What a teacher's server speaks."""

    TRL_RAY = "trl_ray"
    """``trl-ray teacher-serve``."""
    VLLM = "vllm"
    """vLLM's OpenAI server: ``/v1/completions`` with ``prompt_logprobs``."""
    TRL = "trl"
    """TRL v1.1's ``/get_sequence_logprobs/``."""


class TeacherServerConfig(Section):
    """A teacher behind HTTP; `TeacherConfig` says how long and how often it is asked."""

    url: str
    """Scheme, host, port and, where there is one, a path in front: ``http://10.0.0.5:8000``."""
    protocol: Annotated[TeacherProtocol, FROM_STRING] = TeacherProtocol.TRL_RAY
    model: str | None = None
    """The name under which a vLLM server serves it."""
    token_variable: str | None = None
    """Environment variable with the server's token; the token itself stands in no file."""
    chunk_size: Positive = 8
    """Completions of one HTTP request."""
    max_tokens_per_request: Positive = 32768
    """Prompts and completions of one HTTP request, unless one alone has more."""
    max_concurrent_requests: Positive = 4
    retry_delay_s: Seconds = 0.5
    """Before the second attempt; doubled before each further one, up to 10 s."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.protocol is TeacherProtocol.VLLM) != (self.model is not None):
            raise ValueError(
                f"model must be set with protocol=vllm and left out otherwise, got {self.model} and "
                f"{self.protocol.value}. Change one of the two."
            )
        return self
