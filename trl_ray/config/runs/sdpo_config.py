"""The configuration of the `sdpo` pipeline: policy optimisation with the policy as its own, better informed teacher.

AsyncGRPOConfig + SDPOObjective + TeacherWeights + RepromptConfig + teacher: TeacherConfig
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from trl_ray.config.base import FROM_STRING, Natural, Positive, rule
from trl_ray.config.losses.distillation_options import DistillationMode, RepromptConfig, SDPOObjective
from trl_ray.config.losses.policy_options import OldLogprobs
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig
from trl_ray.config.sections import ModelConfig, Schedule
from trl_ray.config.step_counts import PositiveStepCount
from trl_ray.config.teacher_options import (
    AdapterAverage,
    TeacherConfig,
    TeacherKind,
    TeacherPlacement,
    TeacherSource,
    TeacherWeights,
)


class SDPOConfig(AsyncGRPOConfig, SDPOObjective, TeacherWeights, RepromptConfig):
    """Self-distillation policy optimisation (https://arxiv.org/abs/2601.20802); names and defaults are those of TRL's
    SDPOConfig."""

    pipeline: str = "sdpo"
    """Which pipeline this configuration is for; written to config.yaml so that a run can be resumed by its folder."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    lr_scheduler_type: Annotated[Schedule, FROM_STRING] = Schedule.LINEAR
    logging_steps: PositiveStepCount = 10
    """Steps between lines of the console, or a fraction of the run below 1; metrics.jsonl has every step."""
    max_completion_length: Positive = 256
    """Tokens."""
    disable_dropout: bool = True
    num_generations: Positive = 8
    """Completions per prompt: the group size G; one alone has no siblings and learns from feedback only."""
    use_liger_kernel: bool = False
    """Liger's kernels in the model's layers (GPUs only), under TRL's constraints. The divergence needs none: it is
    taken tile by tile in every mode."""
    max_staleness: Natural = 0
    """Optimizer steps S between the weights that sampled a token and the weights that train on it; 0 waits."""
    old_logprobs: Annotated[OldLogprobs, FROM_STRING] = OldLogprobs.POLICY
    """Whose probabilities ratios are taken against; where generation runs ahead and nothing is said, the sampler's:
    its weights' before top-p and the like, so that the ratio of a fresh token is 1 whatever sampling leaves out."""
    max_prompt_length: Positive | None = 512
    """Longer prompts of the student lose their head; the teacher's are made of the whole. None refuses what the model
    does not hold."""
    use_teacher_server: bool = False
    """The teacher is scored on the rollout workers' engines, which hold the weights of a live one anyway."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)

    @model_validator(mode="before")
    @classmethod
    def _choose_old(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("max_staleness") and "old_logprobs" not in values:
            return {**values, "old_logprobs": OldLogprobs.SAMPLER}
        return values

    @property
    def teacher_sources(self) -> tuple[TeacherSource, ...]:
        """The one teacher, as whoever holds it is told; none where it has no weight."""
        if not self.distils:
            return ()
        return (
            TeacherSource(
                name=self.kind_name,
                kind=self.teacher_model_kind,
                model=self.part(ModelConfig),
                options=self.teacher,
                weights=self.part(TeacherWeights),
            ),
        )

    @property
    def distils(self) -> bool:
        """Whether the teacher has any weight."""
        return self.distillation_weight > 0

    @property
    def teacher_on_engines(self) -> bool:
        """Whether the rollout workers' engines stand in for the teacher."""
        return self.use_teacher_server

    @property
    def teacher_in_learner(self) -> bool:
        """Whether the learner holds the teacher."""
        if not self.distils or self.use_teacher_server:
            return False
        if self.teacher.placement is TeacherPlacement.AUTO:
            return self.distillation_mode is not DistillationMode.SAMPLED_TOKEN or self._averages_factors
        return self.teacher.placement is TeacherPlacement.LEARNER

    @property
    def _averages_factors(self) -> bool:
        """Whether the average is one of A and B, which are not published."""
        is_average = self.use_peft and self.teacher_model_kind == TeacherKind.EMA
        return is_average and self.teacher_adapter_average is AdapterAverage.FACTORS

    @rule
    def _check_teacher(self) -> None:
        if self.teacher_model_kind == TeacherKind.EXTERNAL:
            raise ValueError(
                "teacher_model_kind must be ema, live or base, got external: the policy is its own teacher. For "
                "another model's lessons use the pipeline distill."
            )
        if self.has_outside_kind and self.use_peft and self.teacher_in_learner:
            raise ValueError(
                f"teacher_model_kind must be ema, live or base with use_peft=true where the learner holds the teacher, "
                f"got {self.teacher_model_kind}: it is told adapters there, and a rule from outside moves whole "
                "weights. Train the whole model, or set distillation_mode=sampled_token, which asks actors."
            )
        if self.teacher_kind_kwargs and not self.has_outside_kind:
            raise ValueError(
                f"teacher_kind_kwargs must be left out with teacher_model_kind={self.kind_name}, got "
                f"{sorted(self.teacher_kind_kwargs)}: they are options of a rule from outside. Remove them."
            )
        if self.teacher.placement is not TeacherPlacement.ACTOR or not self.distils:
            return
        if self.distillation_mode is not DistillationMode.SAMPLED_TOKEN:
            raise ValueError(
                f"teacher.placement must not be actor with distillation_mode={self.distillation_mode.value}, got "
                "actor: the student's most probable tokens are known to the learner only. Remove placement, or set "
                "distillation_mode=sampled_token."
            )
        if self._averages_factors:
            raise ValueError(
                "teacher_adapter_average must be product with teacher.placement=actor, got factors: weights are "
                "published with the adapter merged. Set product, or remove placement."
            )

    @rule
    def _check_lone_completions(self) -> None:
        if self.num_generations > 1:
            return
        if self.distillation_weight < 1:
            raise ValueError(
                f"num_generations must be at least 2 with distillation_weight={self.distillation_weight}, got 1: the "
                "policy loss compares completions of one prompt. Raise it, or set distillation_weight=1."
            )
        if not self.include_environment_feedback and self.dont_reprompt_on_self_success:
            raise ValueError(
                "num_generations must be at least 2 with include_environment_feedback=false, got 1: a lone completion "
                "has no sibling to learn from. Raise it, or set include_environment_feedback=true."
            )

    @rule
    def _check_liger(self) -> None:
        if not self.use_liger_kernel:
            return
        wanted: list[tuple[str, object, object]] = [
            ("use_teacher_server", self.use_teacher_server, False),
            ("distillation_weight", self.distillation_weight, 1.0),
            ("distillation_mode", self.distillation_mode.value, DistillationMode.FULL_LOGITS.value),
            ("distillation_is_clip", self.distillation_is_clip, None),
        ]
        for name, value, needed in wanted:
            if value != needed:
                asked, given = ("null" if each is None else str(each).lower() for each in (needed, value))
                raise ValueError(
                    f"{name} must be {asked} with use_liger_kernel=true, got {given}: TRL's kernel computes nothing "
                    f"else. Set use_liger_kernel=false, which saves memory in every mode, or {name}={asked}."
                )

    @rule
    def _check_teacher_server(self) -> None:
        if not self.use_teacher_server:
            return
        wanted: list[tuple[str, object, object, str]] = [
            ("teacher_model_kind", str(self.teacher_model_kind), "live", "the engines hold the policy's weights"),
            ("distillation_weight", self.distillation_weight, 1.0, "a blend has its passes in the learner anyway"),
            ("temperature", self.temperature, 1.0, "engines score given tokens at temperature 1"),
        ]
        for name, value, needed, why in wanted:
            if value != needed:
                raise ValueError(
                    f"{name} must be {needed} with use_teacher_server=true, got {value}: {why}. Set {name}={needed}, "
                    "or use_teacher_server=false."
                )
        if self.distillation_mode is DistillationMode.FULL_LOGITS:
            raise ValueError(
                "distillation_mode must be sampled_token or topk_logits with use_teacher_server=true, got "
                "full_logits: engines name their most probable tokens, not the vocabulary. Choose one of the two."
            )
