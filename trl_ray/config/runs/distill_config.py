"""The configuration of the `distill` pipeline.

AheadConfig + DistillationLossConfig + where completions come from + teachers: [TeacherOptions]
"""

from __future__ import annotations

from pydantic import Field

from trl_ray.config.base import Fraction, Positive, rule
from trl_ray.config.losses.distillation_options import DistillationLossConfig, DistillationObjective, Support
from trl_ray.config.runs.rollout_config import AheadConfig
from trl_ray.config.sections import Dtype, StatedDtype
from trl_ray.config.teacher_options import TeacherKind, TeacherOptions, TeacherPlacement, TeacherSource


class DistillConfig(AheadConfig, DistillationLossConfig):
    """On-policy distillation (https://arxiv.org/abs/2306.13649): a student learns from what a teacher says of its own
    completions, or of the dataset's."""

    pipeline: str = "distill"
    """Which pipeline this configuration is for; written to config.yaml so that a run can be resumed by its folder."""
    max_prompt_length: Positive | None = None
    """Longer prompts lose their head, for the student and its teachers. None refuses what the model does not hold."""
    num_generations: Positive = 1
    """Completions per prompt."""
    lmbda: Fraction = 1.0
    """Share of prompts that the student answers itself; the others are trained on with the dataset's completions."""
    dataset_completion_column: str = "completion"
    """The column with those: text, or messages where prompts are conversations. Not read with lmbda=1."""
    teacher_model_name_or_path: str | None = None
    """One teacher with default options, before those of `teachers`; its name is ``teacher``."""
    teacher_model_revision: str | None = None
    """Of that one; None takes ``main``."""
    teacher_dtype: StatedDtype = Dtype.FLOAT32
    teachers: list[TeacherOptions] = Field(default_factory=list)
    teacher_column: str | None = None
    """Dataset column that names each row's teacher; None gives all rows to the first."""

    @property
    def all_teachers(self) -> tuple[TeacherOptions, ...]:
        """Every teacher, the default one first."""
        short = self.teacher_model_name_or_path
        if short is None:
            return tuple(self.teachers)
        revision = self.teacher_model_revision or "main"
        first = TeacherOptions(model_name_or_path=short, model_revision=revision, dtype=self.teacher_dtype)
        return (first, *self.teachers)

    @property
    def teacher_sources(self) -> tuple[TeacherSource, ...]:
        """The same, as whoever holds them is told."""
        return tuple(
            TeacherSource(name=each.name, kind=TeacherKind.EXTERNAL, model=each.model, options=each)
            for each in self.all_teachers
        )

    @property
    def teacher_in_learner(self) -> bool:
        """Whether the learner holds the teacher."""
        wanted = {each.placement for each in self.all_teachers}
        if wanted == {TeacherPlacement.AUTO}:
            return self.needs_both_sides
        return TeacherPlacement.LEARNER in wanted

    @property
    def has_rewards(self) -> bool:
        """Whether completions are rewarded, which nothing but metrics and evaluations looks at."""
        return bool(self.reward_funcs or self.scoring_models)

    @rule
    def _check_default_teacher(self) -> None:
        if self.teacher_model_revision is not None and self.teacher_model_name_or_path is None:
            raise ValueError(
                "teacher_model_name_or_path must be set with teacher_model_revision="
                f"{self.teacher_model_revision}, got None. Set it, or model_revision in teachers."
            )

    @rule
    def _check_teachers(self) -> None:
        names = [each.name for each in self.all_teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers must have different names, got {names}. Set name for each of them.")
        if self.teacher_column is None and len(names) > 1:
            raise ValueError(
                f"teacher_column must be set with several teachers, got {names} and no column that says which row is "
                "whose. Set it, or remove all teachers but one."
            )

    @rule
    def _check_placement(self) -> None:
        if self.teacher_in_learner:
            names = [each.name for each in self.all_teachers]
            if len(names) > 1 and any(each.placement is TeacherPlacement.LEARNER for each in self.all_teachers):
                raise ValueError(
                    f"placement must not be learner with several teachers, got {names}: the learner holds one. Remove "
                    "placement, or all teachers but one."
                )
            if len(names) > 1 or any(each.server for each in self.all_teachers):
                raise ValueError(
                    f"loss_support must be teacher, realised or sampled with several teachers or a server, got "
                    f"{self.loss_support.value}: the learner must hold the teacher for it, and holds one. Change "
                    "loss_support, or name one model."
                )
        elif self.needs_both_sides:
            raise ValueError(
                f"placement must be learner with loss_support={self.loss_support.value}, got actor: only who holds "
                "both models knows both sides. Remove placement, or set loss_support=teacher."
            )

    @rule
    def _check_source(self) -> None:
        if self.lmbda < 1 and self.distillation_objective is DistillationObjective.IW_OPD:
            raise ValueError(
                f"lmbda must be 1 with distillation_objective=iw_opd, got {self.lmbda}: the dataset's completions were "
                "not sampled, so they have no importance weights. Remove one of the two."
            )
        if self.lmbda < 1 and self.loss_support is Support.SAMPLED:
            raise ValueError(
                f"lmbda must be 1 with loss_support=sampled, got {self.lmbda}: that estimate holds for the student's "
                "own samples only. Set loss_support=teacher, or lmbda=1."
            )
        if self.cross_entropy_weight > 0 and self.lmbda == 1:
            raise ValueError(
                f"lmbda must be below 1 with cross_entropy_weight={self.cross_entropy_weight}, got 1.0: only the "
                "dataset's completions are examples to follow. Lower lmbda, or remove cross_entropy_weight."
            )
