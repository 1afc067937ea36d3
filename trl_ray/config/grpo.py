"""The configurations of the `grpo`, `rloo` and `async-grpo` pipelines.

flat, TRL's names: RunConfig + PromptConfig + GenerationConfig + LossConfig + AdvantageConfig
nested, ours:      rollout: RolloutConfig   reward: RewardConfig   reward_models: [RewardModelOptions]
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trl_ray.config.advantages import (
    AdvantageBaseline,
    AdvantageConfig,
    Aggregation,
    ScaleRewards,
    ScaleRewardsOption,
    ZeroVariance,
    explain_zero_variance,
)
from trl_ray.config.fields import FROM_STRING, Natural, Positive
from trl_ray.config.loss import (
    ImportanceLevel,
    KLEstimator,
    KLPlacement,
    LossConfig,
    LossType,
)
from trl_ray.config.reward_models import RewardModelOptions, check_reward_models
from trl_ray.config.run import RunConfig
from trl_ray.config.sections import (
    GenerationConfig,
    Isolation,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    RuntimeKind,
)


class GRPOConfig(RunConfig, PromptConfig, GenerationConfig, LossConfig, AdvantageConfig):
    """Synchronous GRPO: every step trains on completions of the weights it starts from."""

    pipeline: Literal["grpo", "rloo", "async-grpo"] = "grpo"
    """Which pipeline this configuration is for; written to config.yaml so that a run can be resumed by its folder."""
    reward_funcs: list[str] = Field(default_factory=list)
    """Registered names or dotted paths ``package.module:function``."""
    reward_weights: list[float] | None = None
    """One per reward function; None weighs all 1."""
    reward_model_name_or_path: str | None = None
    """A reward model with default options, before those of `reward_models`."""
    reward_models: list[RewardModelOptions] = Field(default_factory=list)
    """Reward models that score completions beside, or instead of, `reward_funcs`."""
    max_attempts: Positive = 3
    """Times a group is issued before it is dropped."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)

    @property
    def scoring_models(self) -> tuple[RewardModelOptions, ...]:
        """All reward models, in the order of their parts."""
        short = self.reward_model_name_or_path
        return (*([RewardModelOptions(model_name_or_path=short)] if short is not None else []), *self.reward_models)

    @property
    def part_weights(self) -> list[float] | None:
        """Weights of the reward's parts, functions before models; None weighs all 1."""
        models = self.scoring_models
        if not models:
            return self.reward_weights
        functions = self.reward_weights if self.reward_weights is not None else [1.0] * len(self.reward_funcs)
        return [*functions, *(model.weight for model in models)]

    @property
    def joins_groups(self) -> bool:
        """Whether reward models rate groups together unless they are told: a run without lag repeats itself exactly."""
        return self.runtime.kind is RuntimeKind.RAY and self.lag > 0

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
        return self.per_device_train_batch_size * self.micro_batches_per_rank * self.runtime.num_learners

    @property
    def micro_batches_per_rank(self) -> int:
        """Micro-batches that one rank makes of one generation batch."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def slices_per_step(self) -> int:
        """Parts of one generation batch that are each an optimizer update of their own."""
        return self.micro_batches_per_rank // self.gradient_accumulation_steps

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that one generation batch gives."""
        return self.slices_per_step * self.num_iterations

    @property
    def groups_per_step(self) -> int:
        """Prompt groups P of one optimizer step."""
        return self.completions_per_step // self.num_generations

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.completions_per_step % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size * gradient_accumulation_steps (or steps_per_generation) * "
                "runtime.num_learners must be a multiple of num_generations, got "
                f"{self.per_device_train_batch_size} * {self.micro_batches_per_rank} * {self.runtime.num_learners} = "
                f"{self.completions_per_step} and num_generations={self.num_generations}. Change one of them."
            )
        if self.micro_batches_per_rank % self.gradient_accumulation_steps:
            raise ValueError(
                "steps_per_generation must be a multiple of gradient_accumulation_steps, got "
                f"{self.steps_per_generation} and {self.gradient_accumulation_steps}. Change one of the two."
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
        check_reward_models(self.scoring_models, self.reward_funcs)
        return self

    @model_validator(mode="after")
    def _check_shaping(self) -> Self:
        if self.overlong_buffer_len >= self.max_completion_length:
            raise ValueError(
                "overlong_buffer_len must be less than max_completion_length, got "
                f"{self.overlong_buffer_len} and {self.max_completion_length}: every completion would be too long. "
                "Lower it."
            )
        if self.kl_in_reward:
            if self.zero_variance_groups is ZeroVariance.DROP:
                raise ValueError(explain_zero_variance("kl_placement=reward"))
            if self.multi_objective_aggregation is Aggregation.NORMALIZE_THEN_SUM:
                raise ValueError(
                    "kl_placement must be loss with multi_objective_aggregation=normalize_then_sum, got reward and "
                    f"beta={self.beta}: there is no total reward to take the KL from. Set kl_placement=loss, or beta=0."
                )
        return self

    @model_validator(mode="after")
    def _check_sampler_distribution(self) -> Self:
        # An engine's log-probs are those of the distribution it sampled from: with tokens left out, each is too high by
        # the log of the mass that was kept, and policy / sampler too small by that mass (huggingface/trl#6789). One
        # token's ratio is off by a bounded factor, which is accepted; over a completion these factors multiply.
        truncated = self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1
        culprit = self.sums_sampler_ratios
        if truncated and culprit is not None:
            raise ValueError(
                f"{culprit} must not be combined with a sampler that does not draw from the whole distribution, got "
                f"top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}, repetition_penalty="
                f"{self.repetition_penalty}: ratios policy / sampler are each too small by the mass it keeps, which "
                "adds up over a completion. Remove the option, correct token by token, or sample from the whole "
                "distribution."
            )
        return self

    @model_validator(mode="after")
    def _check_adapter_reference(self) -> Self:
        if self.sync_ref_model and self.use_peft:
            raise ValueError(
                "sync_ref_model must be false with use_peft=true, got true: the reference of an adapter is the frozen "
                "model beneath it, of which there is no copy to move. Set sync_ref_model=false, or train all weights."
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


class RLOOConfig(GRPOConfig):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740), synchronous, as TRL trains it.

    The defaults make the objective that of TRL's RLOOTrainer. A reward is compared with the mean of the others of its
    group and not scaled; the KL to the reference (k1, summed over the completion) is taken from the reward; one
    clipped ratio for the whole completion, the product of its tokens' ratios, is averaged over completions
    (`loss_type=grpo` of a loss that is the same at all tokens of a completion is exactly that mean). Nothing corrects
    for the sampler: TRL's RLOO has no such correction.
    """

    pipeline: Literal["grpo", "rloo", "async-grpo"] = "rloo"
    num_generations: Annotated[int, Field(ge=2)] = 2
    max_completion_length: Positive = 512
    advantage_baseline: Annotated[AdvantageBaseline, FROM_STRING] = AdvantageBaseline.LEAVE_ONE_OUT
    scale_rewards: ScaleRewardsOption = ScaleRewards.NONE
    loss_type: Annotated[LossType, FROM_STRING] = LossType.GRPO
    importance_sampling_level: Annotated[ImportanceLevel, FROM_STRING] = ImportanceLevel.SEQUENCE_PRODUCT
    vllm_importance_sampling_correction: bool = False
    beta: Annotated[float, Field(ge=0)] = 0.05
    kl_estimator: Annotated[KLEstimator, FROM_STRING] = KLEstimator.K1
    kl_placement: Annotated[KLPlacement, FROM_STRING] = KLPlacement.REWARD


class AsyncGRPOConfig(GRPOConfig):
    """Asynchronous GRPO: generation, rewards and training overlap, at most `max_staleness` steps apart."""

    pipeline: Literal["grpo", "rloo", "async-grpo"] = "async-grpo"
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
