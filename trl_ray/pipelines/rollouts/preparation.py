"""Checks everything that can be wrong before anything is started or written, and resolves it.

args, model, reward_funcs, datasets --> tokenizer, prompts, reward specs, lengths, steps --> Preparation
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_ray.algorithms.batches.micro_batches import CutRules
from trl_ray.algorithms.loss_registry import build_loss, resolve_options
from trl_ray.config.example_options import StreamConfig
from trl_ray.config.object_paths import FROM_PYTHON
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.runs.run_environment import learner_threads
from trl_ray.config.sections import GenerationConfig, ModelConfig, PromptConfig, TrainingConfig
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.data.prompts.prompt_making import PromptRules
from trl_ray.data.prompts.prompt_source import PromptSource, load_prompts
from trl_ray.data.prompts.prompt_stream import PromptStream, open_prompts
from trl_ray.engines.factory import resolve_engine_kind
from trl_ray.errors import ConfigError, DataError
from trl_ray.models.backends.optimizer import check_optimizer
from trl_ray.models.companions.reference import check_reference
from trl_ray.models.loadable import check_loadable
from trl_ray.models.policy_loading import (
    count_parameters,
    load_model_config,
    load_shape,
    load_tokenizer,
    max_positions,
    unscaled_positions,
)
from trl_ray.models.runnable import check_runnable, unproved_notes
from trl_ray.models.scoring.router_loss import aux_loss_coefficient
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.reward_model_actors import (
    PreparedRewardModel,
    prepare_reward_models,
    reward_model_arguments,
)
from trl_ray.pipelines.rollouts.reward_model_notes import reward_model_notes
from trl_ray.pipelines.rollouts.rollout_actors import ActorArguments
from trl_ray.pipelines.rollouts.teacher_plans import PreparedTeachers, prepare_teachers
from trl_ray.pipelines.run.end_of_turn import end_of_turn_warning
from trl_ray.pipelines.run.given_rows import check_stream, is_stream
from trl_ray.pipelines.run.model_notes import model_notes, precision_notes, sampling_notes
from trl_ray.pipelines.run.own_metrics import ComputeMetrics, found_metrics
from trl_ray.pipelines.run.planning import (
    GIB,
    PROCESS,
    cut_rules,
    dtype_bytes,
    learner_memory,
    teacher_memory,
    total_steps,
)
from trl_ray.pipelines.run.run_date import with_date
from trl_ray.rewards.reward_registry import (
    RewardSpec,
    load_function,
    make_specs,
    required_columns,
    row_check,
    wants_raw_texts,
)
from trl_ray.rewards.scoring import TrainingCourse
from trl_ray.runtime.runtime import Role
from trl_ray.types import IntArray, Prompt

if TYPE_CHECKING:
    from trl_ray.runtime.remote import ActorPlan

RewardFunction = Callable[..., Any]
OBJECTIVE_STATE = "objective.json"
"""The file of a checkpoint with what the objective remembers."""
PROMPTS = "prompts.json"
"""The file of a checkpoint that tells its rows from others."""
_HELD_OUT_WINDOW = 32
"""Rows of a held-out stream that are read together, at least."""
_WEIGHT_CHECK_TOKENS = 32
_LONG_CHECK_TOKENS = 160
"""More than one block of any engine's KV cache: those have 16 to 128 tokens."""
_BEYOND_TOKENS = 64
"""Beyond the context that rope was made for before it was scaled."""
_LONGEST_CHECK_TOKENS = 8192
"""An engine may hold log-probs [T, V] of what it scores."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What a user gives in Python beside the configuration; None takes it from the configuration."""

    train_dataset: Any = None
    eval_dataset: Any = None
    reward_funcs: Sequence[str | RewardFunction] | None = None
    compute_metrics: ComputeMetrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preparation:
    """A run that is ready to start."""

    config: RolloutRunConfig
    prompts: PromptSource | PromptStream
    eval_sets: Mapping[str, tuple[Prompt, ...]]
    """Held-out prompts by the names of their sets; one alone has the empty name."""
    rewards: tuple[RewardSpec, ...]
    max_model_len: int
    """Tokens of prompt and completion together."""
    total_steps: int
    weight_check_ids: IntArray
    """[T] of the training set's first prompts, fixed for the whole run."""
    first_check_ids: tuple[IntArray, ...]
    """[T] each; longer ones, for what only long rows meet."""
    cut: CutRules
    """How the samples of an update become micro-batches."""
    objective: Objective[Any]
    pad_token_id: int
    """For callbacks that are shown rectangles of token ids."""
    reward_models: tuple[PreparedRewardModel, ...] = ()
    teachers: PreparedTeachers | None = None
    end_of_turn: str | None = None
    """What to know of a template whose end of turn generation does not stop at."""
    model_notes: tuple[str, ...] = ()
    compute_metrics: ComputeMetrics | None = None
    """The user's own measure of answers to held-out prompts."""

    def check_prompts(self, checkpoint: str | None) -> None:
        """See that the run goes on with the rows that it began with; a stream goes on where the checkpoint left it.

        Raises:
            DataError: the checkpoint was made with other rows.
        """
        file = None if checkpoint is None else Path(checkpoint) / PROMPTS
        if file is None or not file.is_file():
            return
        try:
            self.prompts.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        except DataError as error:
            raise DataError(
                f"A run must go on with the rows that it began with, those of {self.prompts.name} are other ones now: "
                f"{error}. Give the same rows in the same order, or begin a new run from the checkpoint: "
                f"model_name_or_path={checkpoint}."
            ) from error

    def prompts_state(self) -> dict[str, Any]:
        """What `check_prompts` goes by, as JSON values."""
        return self.prompts.state_dict()

    def restore_objective(self, checkpoint: str | None) -> None:
        """Have the objective go on from what it had remembered at a checkpoint; None: from the beginning."""
        file = None if checkpoint is None else Path(checkpoint) / OBJECTIVE_STATE
        known = file is not None and file.is_file()
        self.objective.load_state_dict(json.loads(file.read_text()) if file is not None and known else {})

    def arguments(
        self,
        *,
        journal: str,
        checkpoint: str | None,
        resume_from: int | None,
        incarnation: str,
        ledger_copy: str | None = None,
    ) -> ActorArguments:
        """Constructor arguments of every actor."""
        config, teachers, bounds = self.config, self.teachers, self.config.slot_bounds
        return ActorArguments(
            learner={
                "model": config.part(ModelConfig),
                "training": config.part(TrainingConfig),
                "loss": self.objective.loss,
                "teacher": None if teachers is None else teachers.in_learner,
                "temperature": config.temperature,
                "total_updates": self.total_steps * config.updates_per_step,
                "max_completion_length": config.max_completion_length,
                "checkpoint": checkpoint,
                "threads": learner_threads(config.runtime),
            },
            queue={
                "name": "queue",
                "journal_path": journal,
                "groups_per_step": bounds.groups_per_step,
                "max_staleness": bounds.max_staleness,
                "max_look_ahead": bounds.max_look_ahead,
                "max_attempts": config.max_attempts,
                "lease_s": config.rollout.lease_s,
                "drop_zero_variance": config.drops_zero_variance,
                "reward_clip_range": config.clip_range,
                "max_resampled_groups": config.resampled_limit,
                "mask_truncated": config.masks_truncated,
                "adaptive_slots": config.adapts_slots,
                "resume_from_step": resume_from,
                "resume_version": resume_from,
                "ledger_copy": ledger_copy,
                "incarnation": incarnation,
            },
            rollout={
                "model": config.part(ModelConfig),
                "rollout": config.rollout,
                "generation": config.part(GenerationConfig),
                "seed": config.seed,
                "max_model_len": self.max_model_len,
                "agreement": AgreementRule.of(config),
                "teaching": None if teachers is None else teachers.plan,
                "scores_raw_texts": any(wants_raw_texts(load_function(spec)) for spec in self.rewards),
                "evaluates_with_policy": self.objective.evaluates_with_sampler,
            },
            reward=self._reward_arguments() if config.has_rewards else None,
            reward_models=reward_model_arguments(config),
            teachers=() if teachers is None else teachers.acting,
        )

    def _reward_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "functions": self.rewards,
            "weights": config.reward_weights,
            "timeout_s": config.reward.timeout_s,
            "isolation": config.reward.isolation,
            "course": TrainingCourse(max_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch or math.inf),
        }

    def actors(self) -> dict[str, ActorPlan]:
        # Imported here so that runtime.kind=local starts without Ray's import.
        from trl_ray.runtime.remote import plan_actors

        config = self.config
        return plan_actors(
            runtime=config.runtime,
            rollout=config.rollout,
            reward=config.reward if config.has_rewards else None,
            reward_models=config.scoring_models,
            teachers=config.acting_teachers,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the rows, a sentence each."""
        turns = () if self.end_of_turn is None else (self.end_of_turn,)
        kwargs = self.config.chat_template_kwargs
        rated = reward_model_notes(self.reward_models, self.prompts.head, template_kwargs=kwargs)
        return (*self.prompts.notes, *turns, *self.model_notes, *self._missing_values(), *rated)

    def _missing_values(self) -> Iterator[str]:
        name, total = self.prompts.name, len(self.prompts.head)
        for spec in self.rewards:
            for column in sorted(required_columns(load_function(spec))):
                missing = self.prompts.head.count_missing(column)
                if missing:
                    yield (
                        f"{missing} of {total} prompts of {name} have no {column!r}: the reward function {spec.name} "
                        "is given None there."
                    )

    def describe(self) -> Mapping[str, Any]:
        """The plan in numbers, for the dry run."""
        config, prompts = self.config, self.prompts
        models = ", ".join(f"{model.options.label} ({model.facts.kind})" for model in self.reward_models)
        return {
            "optimizer steps": self.total_steps,
            "updates per step": config.updates_per_step,
            "learner ranks": config.runtime.num_learners,
            "learner computes in": config.computes_in,
            "engines compute in": (config.rollout.dtype or config.dtype).value,
            "prompt groups per step": config.groups_per_step,
            "completions per step": config.completions_per_step,
            "training prompts": "a stream" if isinstance(prompts, PromptStream) else len(prompts),
            **({"rows left out": prompts.num_left_out} if prompts.num_left_out else {}),
            **({"prompts cut to max_prompt_length": prompts.head.num_cut} if prompts.head.num_cut else {}),
            "staleness bound (steps)": config.max_age_at_use,
            "admission slots": config.slots,
            "tokens per sequence": self.max_model_len,
            "reward functions": ", ".join(spec.name for spec in self.rewards) or "none",
            **({"reward models": models} if models else {}),
            **({"teachers": self._describe_teachers()} if self.teachers is not None else {}),
        }

    def _describe_teachers(self) -> str:
        where = "the learner" if self.config.teacher_in_learner else "actors"
        where = "the rollout engines" if self.config.teacher_on_engines else where
        return f"{', '.join(_named(source) for source in self.config.teacher_sources)}, held by {where}"

    @property
    def steps_per_epoch(self) -> float | None:
        prompts = self.prompts
        return None if isinstance(prompts, PromptStream) else len(prompts) / self.config.groups_per_step

    def expected_memory(self) -> Mapping[str, float]:
        """Bytes that one actor of each role is expected to hold: weights, optimizer, caches, and its Python."""
        config, model = self.config, self.config.part(ModelConfig)
        parameters = count_parameters(model).base
        engine = parameters * dtype_bytes(config.rollout.dtype or config.dtype)
        return {
            Role.LEARNER: self._resident_memory()
            + learner_memory(
                model,
                has_reference=self._has_reference,
                optim=config.optim,
                float32_master_weights=config.float32_master_weights,
            ),
            Role.QUEUE: 0.2 * GIB,
            Role.ROLLOUT: engine + config.rollout.kv_cache_memory_gib * GIB + PROCESS,
            Role.REWARD: 0.2 * GIB,
            **{model.plan: model.memory for model in self.reward_models},
            **(self.teachers.memory if self.teachers is not None else {}),
        }

    @property
    def _has_reference(self) -> bool:
        return resolve_options(self.objective.loss).compares_with_reference

    def _resident_memory(self) -> float:
        """Bytes of the teacher that the learner holds."""
        source = None if self.teachers is None else self.teachers.in_learner
        if source is None or source.is_policy or (source.follows_policy and source.model.use_peft):
            return 0.0
        return teacher_memory(source)


def _named(source: TeacherSource) -> str:
    """A teacher as the dry run calls it, with where its weights come from unless that is its name."""
    if source.external is None:
        return source.name
    return f"{source.name} ({source.model.model_name_or_path if source.server is None else source.server.url})"


def prepare(config: RolloutRunConfig, inputs: Inputs, *, objective: Objective[Any]) -> Preparation:
    """Resolve a configuration.

    Raises:
        InputError: anything that is wrong with the configuration, the model, the data or the reward functions.
    """
    functions = inputs.reward_funcs or config.reward_funcs
    _check_given(functions)
    compute_metrics = found_metrics(inputs.compute_metrics, config.compute_metrics)
    build_loss(objective.loss)
    check_optimizer(config.part(TrainingConfig))
    _check_weights(config, functions)
    model = config.part(ModelConfig)
    check_loadable(model)
    _check_runnable(config, model)
    check_reference(model, resolve_options(objective.loss))
    drawn = sampling_notes(config.part(GenerationConfig), config.rollout)
    tokenizer = load_tokenizer(model)
    if (dated := with_date(config, tokenizer)) is not config:
        config, objective = dated, type(objective)(dated)
    shape = load_shape(model, tokenizer)
    max_model_len = _max_model_len(config, max_positions(model), unscaled=unscaled_positions(model))
    if is_stream(inputs.train_dataset):
        check_stream(config, inputs.train_dataset)
    rules = PromptRules(
        config=config.part(PromptConfig),
        tokenizer=tokenizer,
        max_prompt_tokens=max_model_len - config.max_completion_length,
        max_prompt_length=objective.max_prompt_length,
        check_columns=row_check(functions),
    )
    prompts = _training_prompts(objective, inputs, rules)
    head = prompts.head
    held_out = _held_out(objective, inputs, rules) if config.evaluates else {}
    rewarded = config.has_rewards and (functions or not config.scoring_models)
    specs = make_specs(functions, columns=prompts.columns) if rewarded else ()
    models = prepare_reward_models(config, functions=[spec.name for spec in specs], prompt=head.prompt(0))
    teachers = prepare_teachers(
        objective, tokenizer=tokenizer, vocab_size=shape.vocab_size, max_model_len=max_model_len
    )
    talks = head.prompt(0).messages is not None
    return Preparation(
        config=config,
        objective=objective,
        compute_metrics=compute_metrics,
        end_of_turn=end_of_turn_warning(model, tokenizer) if talks else None,
        model_notes=(
            *model_notes(model, tokenizer),
            *unproved_notes(model, resolve_engine_kind(config.rollout.engine)),
            *precision_notes(config),
            *drawn,
        ),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        teachers=teachers,
        prompts=prompts,
        eval_sets=held_out,
        rewards=specs,
        reward_models=models,
        max_model_len=max_model_len,
        total_steps=total_steps(config, len(head), per_step=config.groups_per_step),
        weight_check_ids=_check_text(head, min(_WEIGHT_CHECK_TOKENS, max_model_len)),
        first_check_ids=tuple(_check_text(head, length) for length in _first_lengths(model, max_model_len)),
        cut=cut_rules(config, shape, max_samples=config.per_device_train_batch_size),
    )


def _check_runnable(config: RolloutRunConfig, model: ModelConfig) -> None:
    rollout = config.rollout
    aux_loss_coefficient(load_model_config(model), config.router_aux_loss_coef)
    check_runnable(
        model,
        resolve_engine_kind(rollout.engine),
        on_gpu=rollout.num_gpus > 0,
        dtype=(rollout.dtype or model.dtype).value,
    )


def _check_given(functions: Sequence[str | RewardFunction]) -> None:
    missing = [name for name in functions if isinstance(name, str) and name.startswith(FROM_PYTHON)]
    if missing:
        raise ConfigError(
            f"reward_funcs must name functions that can be found again, got {missing}: they were given as objects, in "
            "Python. Resume there too: Pipeline.from_run(run_dir, reward_funcs=..., train_dataset=...).train()"
        )


def _check_weights(config: RolloutRunConfig, functions: Sequence[str | RewardFunction]) -> None:
    weights = config.reward_weights
    if weights is not None and len(weights) != len(functions):
        raise ConfigError(
            f"reward_weights must have one weight per reward function, got {len(weights)} weights for "
            f"{len(functions)} functions. Add or remove weights."
        )


def _max_model_len(config: RolloutRunConfig, positions: int | None, *, unscaled: int | None) -> int:
    if unscaled is not None and (config.rollout.max_model_len or 0) > unscaled:
        raise ConfigError(
            f"rollout.max_model_len must be at most {unscaled} with this model, whose rotary positions are scaled by "
            f"length beyond {unscaled + 1} tokens, where engines and learner compute differently; got "
            f"{config.rollout.max_model_len}. Lower it."
        )
    wanted = config.rollout.max_model_len or unscaled or positions
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


def _training_prompts(objective: Objective[Any], inputs: Inputs, rules: PromptRules) -> PromptSource | PromptStream:
    config, rules = objective.config, replace(rules, completions=objective.dataset_completions())
    if config.dataset_streaming:
        return _opened(objective, inputs.train_dataset, rules, seed=config.seed_of_rows)
    return _loaded(objective, inputs.train_dataset, rules, seed=config.seed_of_rows)


def _held_out(objective: Objective[Any], inputs: Inputs, rules: PromptRules) -> dict[str, tuple[Prompt, ...]]:
    """The first prompts of each set; of a stream no more are read."""
    config, given = objective.config, inputs.eval_dataset
    if inputs.eval_dataset is None and config.dataset_name is None and not config.datasets:
        raise ConfigError(
            f"{config.evaluation_asked_by} needs held-out prompts, but there are none. Pass eval_dataset, name a "
            "dataset with dataset_test_split, or set eval_steps=0."
        )
    if isinstance(given, Mapping) and not given:
        raise ConfigError("eval_dataset must have at least one set, got an empty mapping. Give one, or None.")
    named = isinstance(given, Mapping) and config.dataset_test_split not in given
    return {str(name): _first(objective, rows, rules) for name, rows in (given if named else {"": given}).items()}


def _first(objective: Objective[Any], rows: Any, rules: PromptRules) -> tuple[Prompt, ...]:
    config = objective.config
    streams = config.dataset_streaming if rows is None else is_stream(rows)
    if not streams:
        source = _loaded(objective, rows, rules, seed=config.seed, evaluation=True)
        return tuple(source.take(0, min(config.eval_num_prompts, len(source))))
    few = max(_HELD_OUT_WINDOW, config.eval_num_prompts)
    stream = _opened(objective, rows, rules, seed=config.seed, evaluation=True, at_most=few)
    return tuple(stream.first(config.eval_num_prompts))


def _loaded(objective: Objective[Any], rows: Any, rules: PromptRules, **options: Any) -> PromptSource:
    source = load_prompts(
        rules.config,
        rules.tokenizer,
        max_prompt_tokens=rules.max_prompt_tokens,
        max_prompt_length=rules.max_prompt_length,
        completions=rules.completions,
        check_columns=rules.check_columns,
        dataset=rows,
        **options,
    )
    objective.check_prompts(source)
    return source


def _opened(
    objective: Objective[Any], rows: Any, rules: PromptRules, *, at_most: int | None = None, **options: Any
) -> PromptStream:
    """Windows of `stream_window` rows, or of `at_most` so many."""
    stream = objective.config.part(StreamConfig)
    if at_most is not None:
        stream = stream.replace(stream_window=min(at_most, stream.stream_window))
    return open_prompts(rules, stream, dataset=rows, check=objective.check_prompts, **options)


def _check_text(prompts: PromptSource, length: int) -> IntArray:
    """The first prompts one after the other, from the start again where there are too few; [length] int32."""
    texts: list[IntArray] = []
    while sum(map(len, texts)) < length:
        texts.append(prompts.prompt(len(texts) % len(prompts)).token_ids)
    return np.concatenate(texts)[:length].astype(np.int32)


def _first_lengths(model: ModelConfig, max_model_len: int) -> list[int]:
    """Tokens of the texts that show what does not depend on weights: blocks of a KV cache, scaled rope, a window."""
    config = load_model_config(model).get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    before = getattr(config, "original_max_position_embeddings", None)
    if isinstance(scaling, Mapping):
        before = scaling.get("original_max_position_embeddings") or before
    lengths = [min(_LONG_CHECK_TOKENS, max_model_len)]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for end in (before, window):
        if end and end + _BEYOND_TOKENS <= min(max_model_len, _LONGEST_CHECK_TOKENS):
            lengths.append(int(end) + _BEYOND_TOKENS)
    return sorted({length for length in lengths if length > _WEIGHT_CHECK_TOKENS})
