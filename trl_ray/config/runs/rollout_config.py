"""What the configurations of all pipelines that train on sampled completions have in common.

flat, TRL's names: StreamedRunConfig + PromptConfig + GenerationConfig
nested, ours:      rollout: RolloutConfig   reward: RewardConfig   reward_models: [RewardModelOptions]

RolloutRunConfig   every step trains on completions of the weights it starts from
AheadConfig        generation may run ahead of training, at most `max_staleness` steps
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from trl_ray.config.base import Natural, Positive, rule
from trl_ray.config.reward_model_options import RewardModelOptions, check_reward_models
from trl_ray.config.runs.streamed_config import StreamedRunConfig
from trl_ray.config.sections import (
    GenerationConfig,
    Isolation,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    RuntimeKind,
)
from trl_ray.config.slot_bounds import SlotBounds
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.config.trl_options.reward_names import read_reward_names


class RolloutRunConfig(StreamedRunConfig, PromptConfig, GenerationConfig):
    """A run with rollout workers, whatever is learnt from their completions."""

    disable_dropout: bool = False
    """Set every dropout probability of the model and its adapter to 0."""
    reward_funcs: Annotated[list[str], BeforeValidator(read_reward_names)] = Field(default_factory=list)
    """Registered names (TRL's too) or dotted paths ``package.module:function``."""
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
    def has_rewards(self) -> bool:
        """Whether completions are rewarded."""
        return True

    @property
    def _default_metric(self) -> str:
        return "reward" if self.has_rewards else "loss"

    @property
    def teacher_sources(self) -> tuple[TeacherSource, ...]:
        """Every teacher that is asked, as whoever holds it is told."""
        return ()

    @property
    def teacher_in_learner(self) -> bool:
        """Whether the learner holds the teacher; then there is one."""
        return False

    @property
    def teacher_on_engines(self) -> bool:
        """Whether the rollout workers' engines stand in for the teacher; then there is one."""
        return False

    @property
    def acting_teachers(self) -> tuple[TeacherSource, ...]:
        """Teachers that have actors of their own."""
        return () if self.teacher_in_learner or self.teacher_on_engines else self.teacher_sources

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
        """Whether reward models rate groups together unless they are told; a run that waits repeats itself exactly."""
        return self.runtime.kind is RuntimeKind.RAY and self.slot_bounds.max_staleness > 0

    # Named unlike the options of `AheadConfig`: pydantic warns of a field that hides a base's attribute.
    @property
    def slot_bounds(self) -> SlotBounds:
        """How far generation may run ahead of training: not at all, groups in the order of their prompts."""
        return SlotBounds(groups_per_step=self.groups_per_step, max_staleness=0)

    @property
    def slots(self) -> int:
        """Groups that may exist between admission and the weight pull after their step."""
        return self.slot_bounds.capacity

    @property
    def max_age_at_use(self) -> int:
        """Optimizer steps that the weights of a trained token may lie behind: `max_staleness` while W is 1."""
        return self.slot_bounds.max_age_at_use

    @property
    def adapts_slots(self) -> bool:
        """Whether the number of admission slots in use follows the learner's waiting."""
        return False

    @property
    def drops_zero_variance(self) -> bool:
        """Whether groups whose rewards are all equal are dropped."""
        return False

    @property
    def resampled_limit(self) -> int | None:
        """Groups of one step that may be replaced because there is nothing to learn of them; None: any number."""
        return None

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """Bounds of a total reward, where there are any."""
        return None

    @property
    def masks_truncated(self) -> bool:
        """Whether completions that were cut off are left out of the loss."""
        return False

    @property
    def completions_per_step(self) -> int:
        """Completions of one generation batch over all ranks."""
        return self.per_device_train_batch_size * self.micro_batches_per_rank * self.runtime.num_learners

    @property
    def micro_batches_per_rank(self) -> int:
        """Micro-batches that one rank makes of one generation batch."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size // (self.per_device_train_batch_size * self.runtime.num_learners)
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def slices_per_step(self) -> int:
        """Parts of one generation batch that are each an optimizer update of their own."""
        return self.micro_batches_per_rank // self.gradient_accumulation_steps

    @property
    def passes_per_step(self) -> int:
        """Passes over the completions of one generation batch."""
        return 1

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that one generation batch gives."""
        return self.slices_per_step * self.passes_per_step

    @property
    def groups_per_step(self) -> int:
        """Prompt groups P of one generation batch."""
        return self.completions_per_step // self.num_generations

    @rule
    def _check_generation_batch(self) -> None:
        size, unit = self.generation_batch_size, self.per_device_train_batch_size * self.runtime.num_learners
        if size is not None and self.steps_per_generation is not None:
            raise ValueError(
                f"generation_batch_size and steps_per_generation say the same in two ways, got {size} and "
                f"{self.steps_per_generation}. Remove one of the two."
            )
        if size is not None and (size % unit or size < unit):
            raise ValueError(
                "generation_batch_size must be a multiple of per_device_train_batch_size * runtime.num_learners, got "
                f"{size} and {unit}. Change one of them."
            )

    @rule
    def _check_batch(self) -> None:
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
                f"{self.micro_batches_per_rank} and {self.gradient_accumulation_steps}. Change one of the two."
            )

    @rule
    def _check_rewards(self) -> None:
        weights = self.reward_weights
        if weights is not None and self.reward_funcs and len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one weight per reward function, got {len(weights)} weights for "
                f"{len(self.reward_funcs)} functions {self.reward_funcs}. Add or remove weights."
            )
        check_reward_models(self.scoring_models, self.reward_funcs)

    @rule
    def _check_lease(self) -> None:
        if self.reward.timeout_s > self.rollout.lease_s:
            raise ValueError(
                "rollout.lease_s must be at least reward.timeout_s, got "
                f"{self.rollout.lease_s:g} and {self.reward.timeout_s:g}: a group may be with its reward function that "
                "long. Raise rollout.lease_s, or lower reward.timeout_s."
            )

    @rule
    def _check_runtime(self) -> None:
        if self.runtime.kind is RuntimeKind.LOCAL and self.rollout.most_workers > 1:
            raise ValueError(
                "rollout.num_workers and rollout.max_workers must be 1 with runtime.kind=local, got "
                f"{self.rollout.num_workers} and {self.rollout.most_workers}: one process holds one engine. Use "
                "runtime.kind=ray for more."
            )
        if self.runtime.kind is RuntimeKind.RAY and self.reward.isolation is Isolation.INLINE:
            raise ValueError(
                "reward.isolation must be process or sandbox with runtime.kind=ray, got inline: a hanging function "
                "would hold its actor. inline is for runtime.kind=local and a debugger."
            )


class AheadConfig(RolloutRunConfig):
    """Generation, rewards, teachers and training may overlap, at most `max_staleness` steps apart."""

    max_staleness: Natural = 0
    """Optimizer steps S between the weights that sampled a token and the weights that train on it; 0 waits."""
    max_look_ahead: Positive = 1
    """W: up to W-1 younger groups may overtake a straggler. Raises the worst age; see `max_age_at_use`."""
    adaptive_slots: bool = True
    """Charge fewer slots while the learner never waits: fresher samples at the same speed."""

    @property
    def slot_bounds(self) -> SlotBounds:
        """How far generation may run ahead of training."""
        return SlotBounds(
            groups_per_step=self.groups_per_step,
            max_staleness=self.max_staleness,
            max_look_ahead=self.max_look_ahead,
        )

    @property
    def adapts_slots(self) -> bool:
        """Whether the number of admission slots in use follows the learner's waiting."""
        return self.adaptive_slots and self.max_staleness > 0

    @rule
    def _check_determinism(self) -> None:
        if self.full_determinism and self.max_staleness > 0:
            raise ValueError(
                f"full_determinism must be false with max_staleness={self.max_staleness}, got true: what a step is "
                "trained on depends on who is done first. Set max_staleness=0, or leave it out."
            )

    @rule
    def _check_look_ahead(self) -> None:
        if self.max_look_ahead > 1 and self.max_staleness == 0:
            raise ValueError(
                f"max_look_ahead must be 1 with max_staleness=0, got {self.max_look_ahead}: a synchronous step waits "
                "for all its groups. Raise max_staleness or remove max_look_ahead."
            )
