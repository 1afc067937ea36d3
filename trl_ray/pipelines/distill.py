"""On-policy distillation: a student learns from what teachers say of its own completions, or of the dataset's.

    group --Teacher.score--> teachings [G] --Distillation--> samples --DistillationLoss--> learner

Rewards are measured where there are some, and train nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from trl_ray.algorithms.policy.group_samples import BuiltStep, build_distillation_step
from trl_ray.config.losses.distillation_options import DistillationLossConfig, DistillationObjective
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.data.prompts.given_completions import GivenCompletions
from trl_ray.data.prompts.prompt_source import PromptSource
from trl_ray.errors import ConfigError
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.preparation import RewardFunction
from trl_ray.pipelines.rollouts.rollout_pipeline import RolloutPipeline
from trl_ray.types import RolloutGroup, SampleScores, TeacherQuestion


class Distillation(Objective[DistillConfig]):
    """Completions are what teachers are asked about, and nothing else."""

    evaluates_loss = True

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        self.evaluates_with_sampler = config.distillation_objective is DistillationObjective.IW_OPD

    @property
    def loss(self) -> LossSection:
        return self.config.part(DistillationLossConfig)

    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        del scores
        return build_distillation_step(groups)

    @property
    def max_prompt_length(self) -> int | None:
        return self.config.max_prompt_length

    def dataset_completions(self) -> GivenCompletions | None:
        config = self.config
        if config.lmbda == 1:
            return None
        return GivenCompletions(
            column=config.dataset_completion_column,
            share=1 - config.lmbda,
            seed=config.seed,
            max_tokens=config.max_completion_length,
        )

    def check_prompts(self, prompts: PromptSource) -> None:
        if self.teacher_column is not None:
            names = [source.name for source in self.config.teacher_sources]
            prompts.require_values(self.teacher_column, names, option="teacher_column")

    @property
    def teacher_column(self) -> str | None:
        return self.config.teacher_column

    def check_teachers(self) -> None:
        if not self.config.teacher_sources:
            raise ConfigError("there must be a teacher. Set teacher_model_name_or_path, or list teachers.")

    def teacher_question(self, *, vocab_size: int) -> TeacherQuestion:
        config = self.config
        return TeacherQuestion(
            vocab_size=vocab_size,
            temperature=config.temperature,
            top_k=config.teacher_top_k,
            tail=config.loss_add_tail and config.teacher_top_k > 0,
        )


class DistillPipeline(RolloutPipeline):
    """Teaches a student what teachers say of its own completions; with max_staleness > 0 asynchronously.

    Example::

        pipeline = DistillPipeline(
            model="Qwen/Qwen2.5-0.5B-Instruct",
            teacher_model="Qwen/Qwen2.5-7B-Instruct",
            args=DistillConfig(lmbda=1.0, beta=1.0, max_steps=100),
            train_dataset=dataset,
        )
        output = pipeline.train()
    """

    config_class: ClassVar[type[RunConfig]] = DistillConfig
    objective_class: ClassVar[type[Objective[Any]]] = Distillation
    name: ClassVar[str] = "distill"

    def __init__(
        self,
        model: object | None = None,
        teacher_model: object | None = None,
        args: DistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        peft_config: object | None = None,
        callbacks: Sequence[Any] | None = None,
        **objects: Any,
    ) -> None:
        """Take what TRL's trainer takes; what is None comes from `args`. Rewards are only measured.

        Raises:
            ConfigError: `args` is of another pipeline.
            ModelError: `peft_config` is no `peft.LoraConfig`, or asks for what engines cannot be given.
        """
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            teacher_model=teacher_model,
            **objects,
        )
