"""On-policy distillation: the loop with teachers instead of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.pipelines.rollouts.preparation import RewardFunction
from trl_ray.pipelines.rollouts.rollout_pipeline import PolicyOptimizationPipeline


class DistillPipeline(PolicyOptimizationPipeline):
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
    name: ClassVar[str] = "distill"

    def __init__(
        self,
        model: str | None = None,
        teacher_model: str | None = None,
        args: DistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        peft_config: object | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        """Take what TRL's trainer takes; what is None comes from `args`. Rewards are only measured.

        Raises:
            ConfigError: `args` is of another pipeline.
            ModelError: `peft_config` is no `peft.LoraConfig`, or asks for what engines cannot be given.
        """
        if teacher_model is not None:
            args = (args or DistillConfig()).replace(teacher_model_name_or_path=teacher_model)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
        )
