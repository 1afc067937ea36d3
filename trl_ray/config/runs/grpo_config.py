"""The configurations of the `grpo`, `rloo` and `async-grpo` pipelines.

RolloutRunConfig + LossConfig + AdvantageConfig, and AheadConfig where generation runs ahead of training
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trl_ray.config.base import FROM_STRING, Natural, Positive, rule
from trl_ray.config.losses.advantage_options import (
    AdvantageBaseline,
    AdvantageConfig,
    Aggregation,
    ScaleRewards,
    ScaleRewardsOption,
    ZeroVariance,
    explain_zero_variance,
)
from trl_ray.config.losses.policy_options import (
    ImportanceLevel,
    KLEstimator,
    KLPlacement,
    LossConfig,
    LossType,
)
from trl_ray.config.runs.rollout_config import AheadConfig, RolloutRunConfig
from trl_ray.config.sections import Schedule
from trl_ray.config.step_counts import PositiveStepCount


class GRPOConfig(RolloutRunConfig, LossConfig, AdvantageConfig):
    """Synchronous GRPO: every step trains on completions of the weights it starts from."""

    pipeline: str = "grpo"
    """Which pipeline this configuration is for; written to config.yaml so that a run can be resumed by its folder."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt: the group size G; one alone cannot be compared with anything."""
    max_prompt_length: Positive | None = None
    """Longer prompts lose their head, as in past versions of TRL. None refuses what the model does not hold."""

    @property
    def passes_per_step(self) -> int:
        """Passes over the completions of one generation batch."""
        return self.num_iterations

    @property
    def drops_zero_variance(self) -> bool:
        """Whether groups whose rewards are all equal are dropped."""
        return self.zero_variance_groups is ZeroVariance.DROP

    @property
    def resampled_limit(self) -> int | None:
        return 10 * self.groups_per_step if self.max_resampled_groups is None else self.max_resampled_groups

    @property
    def clip_range(self) -> tuple[float, float] | None:
        return self.reward_clip_range

    @property
    def masks_truncated(self) -> bool:
        """Whether completions that were cut off are left out of the loss."""
        return self.mask_truncated_completions

    @rule
    def _check_shaping(self) -> None:
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

    @rule
    def _check_adapter_reference(self) -> None:
        if self.sync_ref_model and self.use_peft:
            raise ValueError(
                "sync_ref_model must be false with use_peft=true, got true: the reference of an adapter is the frozen "
                "model beneath it, of which there is no copy to move. Set sync_ref_model=false, or train all weights."
            )


class RLOOConfig(GRPOConfig):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740), synchronous, as TRL trains it.

    The defaults make the objective that of TRL's RLOOTrainer. A reward is compared with the mean of the others of its
    group and not scaled; the KL to the reference (k1, summed over the completion) is taken from the reward; one
    clipped ratio for the whole completion, the product of its tokens' ratios, is averaged over completions
    (`loss_type=grpo` of a loss that is the same at all tokens of a completion is exactly that mean). Nothing corrects
    for the sampler: TRL's RLOO has no such correction.
    """

    pipeline: str = "rloo"
    num_generations: Annotated[int, Field(ge=2)] = 2
    advantage_baseline: Annotated[AdvantageBaseline, FROM_STRING] = AdvantageBaseline.LEAVE_ONE_OUT
    scale_rewards: ScaleRewardsOption = ScaleRewards.NONE
    loss_type: Annotated[LossType, FROM_STRING] = LossType.GRPO
    importance_sampling_level: Annotated[ImportanceLevel, FROM_STRING] = ImportanceLevel.SEQUENCE_PRODUCT
    vllm_importance_sampling_correction: bool = False
    beta: Annotated[float, Field(ge=0)] = 0.05
    kl_estimator: Annotated[KLEstimator, FROM_STRING] = KLEstimator.K1
    kl_placement: Annotated[KLPlacement, FROM_STRING] = KLPlacement.REWARD


class AsyncGRPOConfig(GRPOConfig, AheadConfig):
    """Asynchronous GRPO: generation, rewards and training overlap, at most `max_staleness` steps apart."""

    pipeline: str = "async-grpo"
    max_completion_length: Positive = 2048
    """Tokens."""
    lr_scheduler_type: Annotated[Schedule, FROM_STRING] = Schedule.CONSTANT
    logging_steps: PositiveStepCount = 1
    """Steps between lines of the console, or a fraction of the run below 1; metrics.jsonl has every step."""
    max_staleness: Natural = 4
