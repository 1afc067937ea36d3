"""Checks everything that can be wrong before anything is started or written, and resolves it.

args, model, reward_funcs, datasets --> tokenizer, prompts, reward specs, lengths, steps --> Preparation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_ray.algorithms.micro_batches import CutRules
from trl_ray.config.advantages import ZeroVariance
from trl_ray.config.grpo import GRPOConfig
from trl_ray.config.loss import LossConfig
from trl_ray.config.sections import Dtype, GenerationConfig, ModelConfig, PromptConfig, TrainingConfig
from trl_ray.data.prompts import PromptSource, load_prompts
from trl_ray.errors import ConfigError
from trl_ray.models.load import count_parameters, load_model_config, load_tokenizer, max_positions
from trl_ray.pipelines.crew import ActorArguments
from trl_ray.pipelines.memory import GIB, PROCESS, dtype_bytes, learner_memory
from trl_ray.pipelines.planning import cut_rules, total_steps
from trl_ray.pipelines.reward_models import PreparedRewardModel, prepare_reward_models, reward_model_arguments
from trl_ray.rewards.registry import RewardSpec, make_specs
from trl_ray.runtime.runtime import Role
from trl_ray.types import IntArray, Prompt

if TYPE_CHECKING:
    from trl_ray.runtime.remote import ActorPlan

RewardFunction = Callable[..., Any]
FROM_PYTHON = "python:"
"""Stands in config.yaml before the name of a reward function that was given as an object."""
_CANARY_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What a user gives in Python beside the configuration; None takes it from the configuration."""

    train_dataset: Any = None
    eval_dataset: Any = None
    reward_funcs: Sequence[str | RewardFunction] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preparation:
    """A run that is ready to start."""

    config: GRPOConfig
    prompts: PromptSource
    eval_prompts: tuple[Prompt, ...]
    rewards: tuple[RewardSpec, ...]
    max_model_len: int
    """Tokens of prompt and completion together."""
    total_steps: int
    canary_ids: IntArray
    """[T] a prompt of the training set, fixed for the whole run."""
    canary_tolerance: float
    """Nats."""
    cut: CutRules
    """How the samples of an update become micro-batches."""
    reward_models: tuple[PreparedRewardModel, ...] = ()

    @property
    def loss(self) -> LossConfig:
        """The policy objective."""
        return self.config.part(LossConfig)

    def arguments(
        self, *, journal: str, checkpoint: str | None, resume_from: int | None, incarnation: str
    ) -> ActorArguments:
        """Constructor arguments of every actor."""
        config = self.config
        return ActorArguments(
            learner={
                "model": config.part(ModelConfig),
                "training": config.part(TrainingConfig),
                "loss": self.loss,
                "temperature": config.temperature,
                "total_updates": self.total_steps * config.updates_per_step,
                "max_completion_length": config.max_completion_length,
                "checkpoint": checkpoint,
                "threads": config.runtime.threads_of_learner,
            },
            queue={
                "name": "queue",
                "journal_path": journal,
                "groups_per_step": config.groups_per_step,
                "max_staleness": config.lag,
                "window": config.window,
                "max_attempts": config.max_attempts,
                "lease_s": config.rollout.lease_s,
                "drop_zero_variance": config.zero_variance_groups is ZeroVariance.DROP,
                "mask_truncated": config.mask_truncated_completions,
                "adaptive_slots": config.adapts_slots,
                "resume_from_step": resume_from,
                "resume_version": resume_from,
                "incarnation": incarnation,
            },
            rollout={
                "model": config.part(ModelConfig),
                "rollout": config.rollout,
                "generation": config.part(GenerationConfig),
                "seed": config.seed,
                "max_model_len": self.max_model_len,
                "canary_tolerance": self.canary_tolerance,
            },
            reward={
                "functions": self.rewards,
                "weights": config.reward_weights,
                "timeout_s": config.reward.timeout_s,
                "isolation": config.reward.isolation,
            },
            reward_models=reward_model_arguments(config),
        )

    def actors(self) -> dict[str, ActorPlan]:
        """See `trl_ray.pipelines.pipeline.Plan`."""
        # Imported here so that runtime.kind=local starts without Ray's import.
        from trl_ray.runtime.remote import plan_actors

        config = self.config
        return plan_actors(
            runtime=config.runtime, rollout=config.rollout, reward=config.reward, reward_models=config.scoring_models
        )

    def describe(self) -> Mapping[str, Any]:
        """The plan in numbers, for the dry run."""
        config = self.config
        models = ", ".join(f"{model.options.label} ({model.facts.kind})" for model in self.reward_models)
        return {
            "optimizer steps": self.total_steps,
            "updates per step": config.updates_per_step,
            "learner ranks": config.runtime.num_learners,
            "prompt groups per step": config.groups_per_step,
            "completions per step": config.completions_per_step,
            "training prompts": len(self.prompts),
            "staleness bound (steps)": config.staleness_bound,
            "admission slots": (config.lag + 1) * config.groups_per_step,
            "tokens per sequence": self.max_model_len,
            "reward functions": ", ".join(spec.name for spec in self.rewards) or "none",
            **({"reward models": models} if models else {}),
        }

    def expected_memory(self) -> Mapping[str, float]:
        """Bytes that one actor of each role is expected to hold: weights, optimizer, caches, and its Python."""
        config, model = self.config, self.config.part(ModelConfig)
        parameters = count_parameters(model).base
        engine = parameters * dtype_bytes(config.rollout.dtype or config.dtype)
        return {
            Role.LEARNER: learner_memory(model, has_reference=config.beta > 0),
            Role.QUEUE: 0.2 * GIB,
            Role.ROLLOUT: engine + config.rollout.kv_cache_memory_gib * GIB + PROCESS,
            Role.REWARD: 0.2 * GIB,
            **{model.plan: model.memory for model in self.reward_models},
        }


def prepare(config: GRPOConfig, inputs: Inputs) -> Preparation:
    """Resolve a configuration.

    Raises:
        InputError: anything that is wrong with the configuration, the model, the data or the reward functions.
    """
    functions = inputs.reward_funcs or config.reward_funcs
    _check_given(functions)
    _check_weights(config, functions)
    model = config.part(ModelConfig)
    tokenizer, shape = load_tokenizer(model), load_model_config(model).get_text_config()
    max_model_len = _max_model_len(config, max_positions(model))
    data, limit = config.part(PromptConfig), max_model_len - config.max_completion_length
    prompts = load_prompts(data, tokenizer, seed=config.seed, max_prompt_tokens=limit, dataset=inputs.train_dataset)
    eval_prompts = _eval_prompts(config, inputs, tokenizer, limit) if config.eval_steps else ()
    specs = make_specs(functions, columns=prompts.columns) if functions or not config.scoring_models else ()
    models = prepare_reward_models(config, functions=[spec.name for spec in specs], prompt=prompts.prompt(0))
    return Preparation(
        config=config,
        prompts=prompts,
        eval_prompts=eval_prompts,
        rewards=specs,
        reward_models=models,
        max_model_len=max_model_len,
        total_steps=total_steps(config, len(prompts), per_step=config.groups_per_step),
        canary_ids=_canary(prompts, max_model_len),
        canary_tolerance=_canary_tolerance(config),
        cut=cut_rules(config, shape, max_samples=config.per_device_train_batch_size),
    )


def _check_given(functions: Sequence[str | RewardFunction]) -> None:
    missing = [name for name in functions if isinstance(name, str) and name.startswith(FROM_PYTHON)]
    if missing:
        raise ConfigError(
            f"reward_funcs must name functions that can be found again, got {missing}: they were given as objects, in "
            "Python. Resume there too: Pipeline.from_run(run_dir, reward_funcs=..., train_dataset=...).train()"
        )


def _check_weights(config: GRPOConfig, functions: Sequence[str | RewardFunction]) -> None:
    weights = config.reward_weights
    if weights is not None and len(weights) != len(functions):
        raise ConfigError(
            f"reward_weights must have one weight per reward function, got {len(weights)} weights for "
            f"{len(functions)} functions. Add or remove weights."
        )


def _max_model_len(config: GRPOConfig, positions: int | None) -> int:
    wanted = config.rollout.max_model_len or positions
    if wanted is None:
        raise ConfigError(
            "rollout.max_model_len must be set, as the model's configuration does not say how long its context is."
        )
    if positions is not None and wanted > positions:
        raise ConfigError(
            f"rollout.max_model_len must be at most the model's {positions} positions, got {wanted}. Lower it."
        )
    if config.max_completion_length >= wanted:
        raise ConfigError(
            f"max_completion_length must leave room for a prompt within {wanted} tokens (rollout.max_model_len or the "
            f"model's own limit), got {config.max_completion_length}. Lower it."
        )
    return wanted


def _eval_prompts(config: GRPOConfig, inputs: Inputs, tokenizer: Any, limit: int) -> tuple[Prompt, ...]:
    if inputs.eval_dataset is None and config.dataset_name is None:
        raise ConfigError(
            f"eval_steps={config.eval_steps} needs held-out prompts, but there are none. Pass eval_dataset, name a "
            "dataset with dataset_test_split, or set eval_steps=0."
        )
    source = load_prompts(
        config.part(PromptConfig),
        tokenizer,
        seed=config.seed,
        max_prompt_tokens=limit,
        dataset=inputs.eval_dataset,
        evaluation=True,
    )
    return tuple(source.prompt(ordinal) for ordinal in range(min(config.eval_num_prompts, len(source))))


def _canary(prompts: PromptSource, max_model_len: int) -> IntArray:
    """The first prompt, repeated when it is too short to say anything, cut to what an engine can score."""
    ids = prompts.prompt(0).token_ids
    repeats = max(1, -(-8 // max(1, len(ids))))
    return np.tile(ids, repeats)[: min(_CANARY_TOKENS, max_model_len)].astype(np.int32)


def _canary_tolerance(config: GRPOConfig) -> float:
    if config.rollout.canary_tolerance is not None:
        return config.rollout.canary_tolerance
    exact = config.dtype is Dtype.FLOAT32 and config.rollout.dtype in (None, Dtype.FLOAT32) and not config.bf16
    return 1e-3 if exact else 0.2
