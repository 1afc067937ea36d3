"""The configurations of the `grpo` and `async-grpo` pipelines.

ModelConfig + DataConfig + TrainingConfig + GenerationConfig + LossConfig + ReportConfig   (flat, TRL's names)
runtime: RuntimeConfig   rollout: RolloutConfig   reward: RewardConfig                     (nested, ours)
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trl_ray.config.sections import (
    DataConfig,
    GenerationConfig,
    ImportanceMode,
    Isolation,
    LossConfig,
    ModelConfig,
    Natural,
    OldLogprobs,
    Positive,
    ReportConfig,
    RewardConfig,
    RolloutConfig,
    RuntimeConfig,
    RuntimeKind,
    TrainingConfig,
)


class GRPOConfig(ModelConfig, DataConfig, TrainingConfig, GenerationConfig, LossConfig, ReportConfig):
    """Synchronous GRPO: every step trains on completions of the weights it starts from."""

    pipeline: Literal["grpo", "async-grpo"] = "grpo"
    """Which pipeline this configuration is for; written to config.yaml so that a run can be resumed by its folder."""
    reward_funcs: list[str] = Field(default_factory=list)
    """Registered names or dotted paths ``package.module:function``."""
    reward_weights: list[float] | None = None
    """One per reward function; None weighs all 1."""
    max_attempts: Positive = 3
    """Times a group is issued before it is dropped."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)

    @property
    def staleness_bound(self) -> int:
        """Optimizer steps a trained token's weights may lie behind: 0."""
        return 0

    @property
    def lag(self) -> int:
        """Optimizer steps S that generation may run ahead of training: 0."""
        return 0

    @property
    def window(self) -> int:
        """Look-ahead window W of the queue; 1 is strict first in, first out."""
        return 1

    @property
    def adapts_slots(self) -> bool:
        """Whether the number of admission slots in use follows the learner's waiting."""
        return False

    @property
    def completions_per_step(self) -> int:
        """Completions of one optimizer step over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def groups_per_step(self) -> int:
        """Prompt groups P of one optimizer step."""
        return self.completions_per_step // self.num_generations

    @model_validator(mode="after")
    def _check_pipeline(self) -> Self:
        own = type(self).model_fields["pipeline"].default
        if self.pipeline != own:
            raise ValueError(
                f"pipeline must be {own} here, got {self.pipeline}. Run it with: trl-ray {self.pipeline} --config FILE"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.completions_per_step % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size * gradient_accumulation_steps must be a multiple of num_generations, "
                f"got {self.per_device_train_batch_size} * {self.gradient_accumulation_steps} = "
                f"{self.completions_per_step} and num_generations={self.num_generations}. Change one of the three."
            )
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        weights = self.reward_weights
        if weights is not None and self.reward_funcs and len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one weight per reward function, got {len(weights)} weights for "
                f"{len(self.reward_funcs)} functions {self.reward_funcs}. Add or remove weights."
            )
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError(
                f"epsilon_high must be at least epsilon, got epsilon_high={self.epsilon_high} and "
                f"epsilon={self.epsilon}. Raise epsilon_high or leave it out."
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and low > high:
            raise ValueError(
                "vllm_importance_sampling_clip_min must not exceed vllm_importance_sampling_clip_max, "
                f"got {low} and {high}. Lower the minimum."
            )
        if (
            self.old_logprobs is OldLogprobs.SAMPLER
            and self.vllm_importance_sampling_mode is not ImportanceMode.TOKEN_TRUNCATE
            and self.vllm_importance_sampling_correction
        ):
            raise ValueError(
                "vllm_importance_sampling_mode must be left out with old_logprobs=sampler, got "
                f"{self.vllm_importance_sampling_mode.value}: that ratio already is policy / sampler, so there is "
                "nothing left to correct. Remove one of the two."
            )
        return self

    @model_validator(mode="after")
    def _check_sampler_distribution(self) -> Self:
        truncated = self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1
        masks = self.vllm_importance_sampling_mode in {ImportanceMode.SEQUENCE_MASK, ImportanceMode.SEQUENCE_TRUNCATE}
        corrected = self.vllm_importance_sampling_correction and self.old_logprobs is OldLogprobs.POLICY
        if truncated and corrected and masks:
            raise ValueError(
                "vllm_importance_sampling_mode must be token_truncate or token_mask when top_p, top_k, min_p or "
                "repetition_penalty change the sampler's distribution: the product over a sequence of ratios that "
                f"are each too small is meaningless, got {self.vllm_importance_sampling_mode.value}. "
                "Sample from the whole distribution, or correct per token."
            )
        return self

    @model_validator(mode="after")
    def _check_runtime(self) -> Self:
        if self.runtime.kind is RuntimeKind.LOCAL and self.rollout.num_workers > 1:
            raise ValueError(
                f"rollout.num_workers must be 1 with runtime.kind=local, got {self.rollout.num_workers}: one process "
                "holds one engine. Use runtime.kind=ray for more."
            )
        if self.runtime.kind is RuntimeKind.RAY and self.reward.isolation is Isolation.INLINE:
            raise ValueError(
                "reward.isolation must be process with runtime.kind=ray, got inline: a hanging function would hold "
                "its actor. inline is for runtime.kind=local and a debugger."
            )
        return self


class AsyncGRPOConfig(GRPOConfig):
    """Asynchronous GRPO: generation, rewards and training overlap, at most `max_staleness` steps apart."""

    pipeline: Literal["grpo", "async-grpo"] = "async-grpo"
    max_staleness: Natural = 4
    """Optimizer steps S between the weights that sampled a token and the weights that train on it."""
    max_look_ahead: Positive = 1
    """Window W: up to W-1 younger groups may overtake a straggler. Raises the worst age; see `staleness_bound`."""
    adaptive_slots: bool = True
    """Charge fewer slots while the learner never waits: fresher samples at the same speed."""

    @property
    def slots(self) -> int:
        """B = (S + 1) * P: groups that may exist between admission and the weight pull after their step."""
        return (self.max_staleness + 1) * self.groups_per_step

    @property
    def staleness_bound(self) -> int:
        """Worst age at use, ``(B + W - 2) // P``: S while W is 1."""
        return (self.slots + self.max_look_ahead - 2) // self.groups_per_step

    @property
    def lag(self) -> int:
        """Optimizer steps S that generation may run ahead of training."""
        return self.max_staleness

    @property
    def window(self) -> int:
        """Look-ahead window W of the queue."""
        return self.max_look_ahead

    @property
    def adapts_slots(self) -> bool:
        """Whether the number of admission slots in use follows the learner's waiting."""
        return self.adaptive_slots and self.max_staleness > 0

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.max_look_ahead > 1 and self.max_staleness == 0:
            raise ValueError(
                f"max_look_ahead must be 1 with max_staleness=0, got {self.max_look_ahead}: a synchronous step waits "
                "for all its groups. Raise max_staleness or remove max_look_ahead."
            )
        return self
