"""Checks everything that can be wrong with a run on a dataset, and tokenises it, before anything is started or written.

args, model, datasets --> tokenizer, examples or stream, held-out examples, steps --> SupervisedPlan
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ray.algorithms.batches.micro_batches import TotalsOf
from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.algorithms.loss import HeadKind, Loss
from trl_ray.algorithms.loss_registry import build_loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.config.runs.run_environment import learner_threads
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.data.examples.example_set import (
    TOLD_ONCE,
    ExampleSet,
    ExampleTask,
    load_examples,
    stream_examples,
    stream_windows,
)
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.data.sources.formatting import formatted_rows
from trl_ray.errors import ConfigError
from trl_ray.models.backends.optimizer import check_optimizer
from trl_ray.models.companions.reference import check_reference
from trl_ray.models.companions.reference_cache import default_cache_dir
from trl_ray.models.loadable import check_loadable
from trl_ray.models.policy_loading import load_model_config, load_shape, load_tokenizer, max_positions
from trl_ray.models.scoring.router_loss import aux_loss_coefficient
from trl_ray.pipelines.run.end_of_turn import end_of_turn_warning
from trl_ray.pipelines.run.given_rows import check_stream
from trl_ray.pipelines.run.model_notes import model_notes
from trl_ray.pipelines.run.planning import cut_rules, learner_memory, total_steps
from trl_ray.pipelines.run.run_date import with_date
from trl_ray.pipelines.supervised.example_feed import Feed, ShuffledFeed, StreamFeed, StreamPlace
from trl_ray.pipelines.supervised.user_metrics import MetricFunctions
from trl_ray.runtime.runtime import Role

if TYPE_CHECKING:
    from trl_ray.runtime.remote import ActorPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DatasetInputs:
    """What a user gives in Python beside the configuration; None takes it from the configuration."""

    train_dataset: Any = None
    eval_dataset: Any = None
    formatting_func: Callable[[Any], str] | None = None
    """Makes the text of a row."""
    metrics: MetricFunctions | None = None
    """What a user gave to measure held-out rows with."""

    def formatted(self, config: SupervisedRunConfig) -> DatasetInputs:
        """The same with the texts in place of the rows they are made of.

        Raises:
            DataError: the function raised, or gave no text.
            ConfigError: the rows are a stream that the configuration names.
        """
        make = self.formatting_func
        if make is None:
            return self
        if self.train_dataset is None and config.dataset_streaming:
            raise ConfigError(
                "formatting_func needs train_dataset with dataset_streaming=true, got a stream by name. Pass the "
                "stream."
            )

        def texts(rows: Any, *, evaluation: bool) -> Any:
            if evaluation and is_named_sets(rows, config.dataset_test_split):
                return {name: texts(each, evaluation=False) for name, each in rows.items()}
            if rows is None:
                if evaluation and not config.evaluates:
                    return None
                rows = load_rows(config, seed=config.seed, evaluation=evaluation, in_memory=False).rows
            return formatted_rows(rows, make, column=config.text_column)

        return replace(
            self,
            train_dataset=texts(self.train_dataset, evaluation=False),
            eval_dataset=texts(self.eval_dataset, evaluation=True),
        )

    def after_formatting(self, config: SupervisedRunConfig, rows: object) -> SupervisedRunConfig:
        """How to read what `formatted` made of `rows`: of named ones (None), columns are renamed and parts held out."""
        if self.formatting_func is None or rows is not None:
            return config
        return config.replace(column_mapping={}, test_split_size=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupervisedPlan:
    """A run on a dataset that is ready to start."""

    config: SupervisedRunConfig
    task: ExampleTask
    loss: LossSection
    built: Loss
    """The loss itself."""
    inputs: DatasetInputs
    tokenizer: Any
    train: ExampleSet | None
    """None where it is streamed."""
    head: ExampleSet | None = None
    """The first window of a stream."""
    told: set[str] = field(default_factory=set)
    """What the user knows of the rows of a stream, and is not told again."""
    held_out: Mapping[str, ExampleSet]
    """Sets that are evaluated by their names; one alone has the empty name."""
    total_steps: int
    cut: CutRules
    """How the examples of a step become micro-batches."""
    eval_cut: CutRules

    @property
    def known(self) -> ExampleSet | None:
        """The examples that are known before training: all, or those of the first window of a stream."""
        return self.head if self.train is None else self.train

    @property
    def totals_of(self) -> TotalsOf:
        """What the loss divides an update by."""
        return self.built.totals

    @property
    def steps_per_epoch(self) -> float | None:
        return None if self.train is None else math.ceil(len(self.train.examples) / self.config.examples_per_step)

    @property
    def precomputes_reference(self) -> bool:
        """Whether the reference is asked once, before training."""
        return bool(getattr(self.loss, "precompute_ref_log_probs", False))

    def feed(self, place: StreamPlace, train: ExampleSet | None) -> Feed:
        """Where steps take their examples from; `train` stands in for the plan's own, with references filled in."""
        config = self.config
        if train is not None:
            return ShuffledFeed(
                train.examples,
                per_step=config.examples_per_step,
                seed=config.seed_of_rows,
                shuffle=config.shuffle_dataset,
            )
        return StreamFeed(self._open_stream, per_step=config.examples_per_step, place=place)

    def check_stream(self) -> None:
        """Look for an example in a stream whose first window has none.

        Raises:
            InputError: it has no example, or a row before the first one cannot be used.
        """
        if self.head is not None and not self.head.examples:
            self.feed(StreamPlace(), None).take(1)

    def _open_stream(self, epoch: int, start_window: int) -> Any:
        return stream_examples(
            self.config,
            self.tokenizer,
            task=self.task,
            dataset=self.inputs.train_dataset,
            start_window=start_window,
            seed=self.config.seed_of_rows + epoch,
            told=self.told,
        )

    def arguments(self, *, checkpoint: str | None) -> dict[str, Any]:
        """Constructor arguments of the learner."""
        return {
            "model": self.config.part(ModelConfig),
            "training": self.config.part(TrainingConfig),
            "loss": self.loss,
            "temperature": 1.0,
            "total_updates": self.total_steps,
            "checkpoint": checkpoint,
            "threads": learner_threads(self.config.runtime),
            "preprocess_logits": None if self.inputs.metrics is None else self.inputs.metrics.preprocess,
        }

    def actors(self) -> dict[str, ActorPlan]:
        # Imported here so that runtime.kind=local starts without Ray's import.
        from trl_ray.runtime.remote import plan_learner

        return {Role.LEARNER: plan_learner(self.config.runtime)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the rows, a sentence each."""
        sets = (self.train, *self.held_out.values())
        rows = tuple(note for found in sets if found is not None for note in found.report())
        if self.head is not None:
            rows = (*(f"{note} {TOLD_ONCE}" for note in self.head.report()), *rows)
        turns = self._end_of_turn_warning()
        model = model_notes(self.config.part(ModelConfig), self.tokenizer)
        return (*rows, *(() if turns is None else (turns,)), *model)

    def describe(self) -> Mapping[str, Any]:
        """The plan in numbers, for the dry run."""
        config, train = self.config, self.train
        numbers: dict[str, Any] = {
            "optimizer steps": self.total_steps,
            "learner ranks": config.runtime.num_learners,
            "learner computes in": config.computes_in,
            "examples per step": config.examples_per_step,
        }
        if train is not None:
            rows = {"training rows": train.num_rows, "rows left out": len(train.untrained)}
            numbers |= {**rows, "training examples": len(train.examples), "tokens per epoch": train.num_tokens}
            numbers |= train.losses()
            if train.kept_in is not None:
                numbers["tokenised rows"] = train.kept_in
        for name, held_out in self.held_out.items():
            numbers[f"held-out examples of {name}" if name else "held-out examples"] = len(held_out.examples)
        return numbers

    def _end_of_turn_warning(self) -> str | None:
        """What to know of a template whose end of turn generation does not stop at; None where nothing is generated."""
        rows = self.head if self.train is None else self.train
        talks = rows is not None and rows.is_conversational
        if not talks or self.task in (ExampleTask.REWARD_PAIRS, ExampleTask.STEPS):
            return None
        return end_of_turn_warning(self.config.part(ModelConfig), self.tokenizer)

    def expected_memory(self) -> Mapping[str, float]:
        has_reference = self.built.needs.reference
        config = self.config
        memory = learner_memory(
            config.part(ModelConfig),
            has_reference=has_reference,
            optim=config.optim,
            float32_master_weights=config.float32_master_weights,
        )
        return {Role.LEARNER: memory}


def prepare_supervised(
    config: SupervisedRunConfig, inputs: DatasetInputs, *, task: ExampleTask, loss: LossSection
) -> SupervisedPlan:
    """Resolve a configuration.

    Raises:
        InputError: anything that is wrong with the configuration, the model or the data.
    """
    check_optimizer(config.part(TrainingConfig))
    model = config.part(ModelConfig)
    built = build_loss(loss)
    head = built.needs.head
    check_loadable(model, num_labels=None if head is HeadKind.LANGUAGE else head.num_labels)
    aux_loss_coefficient(load_model_config(model), config.router_aux_loss_coef)
    check_reference(model, loss)
    if inputs.metrics is not None:
        inputs.metrics.check(config)
    given, inputs = inputs, inputs.formatted(config)
    tokenizer = load_tokenizer(model)
    config = with_date(config, tokenizer)
    shape = load_shape(model, tokenizer)
    _check_length(config, max_positions(model))
    if getattr(loss, "precompute_ref_log_probs", False):
        _check_cache_dir(config.ref_log_probs_cache_dir)
    check_stream(config, inputs.train_dataset)
    load = partial(load_examples, tokenizer=tokenizer, task=task)
    rows_of = partial(given.after_formatting, config)
    train = None if config.dataset_streaming else load(rows_of(given.train_dataset), dataset=inputs.train_dataset)
    if train is not None:
        train.require_examples()
    first = _first_window(config, tokenizer, task, inputs.train_dataset) if train is None else None
    plan = SupervisedPlan(
        config=config,
        task=task,
        loss=loss,
        built=built,
        inputs=inputs,
        tokenizer=tokenizer,
        train=train,
        head=first,
        told=set() if first is None else _kinds(first),
        held_out=_held_out(config, inputs, partial(load, rows_of(given.eval_dataset))),
        total_steps=_total_steps(config, train),
        cut=cut_rules(config, shape, max_examples=config.per_device_train_batch_size),
        eval_cut=cut_rules(config, shape, max_examples=config.per_device_eval_batch_size),
    )
    plan.check_stream()
    if inputs.metrics is not None and not config.batch_eval_metrics:
        for name, found in plan.held_out.items():
            inputs.metrics.check_size(found.examples, vocab_size=shape.vocab_size, name=name)
    return plan


def _first_window(config: SupervisedRunConfig, tokenizer: Any, task: ExampleTask, dataset: object) -> ExampleSet | None:
    """The first window of a stream, so that one of another kind is refused before anything starts.

    Raises:
        InputError: there is no such stream, or a row of the window cannot be used.
    """
    return next(stream_windows(config, tokenizer, task=task, dataset=dataset), None)


def _kinds(head: ExampleSet) -> set[str]:
    told = set[str]()
    head.news(told)
    return told


def is_named_sets(given: object, split: str | None) -> bool:
    """Whether rows are given as several sets by their names, and not as splits of which one is meant."""
    return isinstance(given, Mapping) and split not in given


def _held_out(config: SupervisedRunConfig, inputs: DatasetInputs, load: Any) -> dict[str, ExampleSet]:
    if not config.evaluates:
        return {}
    if inputs.eval_dataset is None and config.dataset_name is None and not config.datasets:
        raise ConfigError(
            f"{config.evaluation_asked_by} needs held-out rows, but there are none. Pass eval_dataset, name a "
            "dataset with dataset_test_split, or set eval_steps=0."
        )
    given = inputs.eval_dataset
    named = given if is_named_sets(given, config.dataset_test_split) else {"": given}
    found: dict[str, ExampleSet] = {str(name): load(dataset=rows, evaluation=True) for name, rows in named.items()}
    if not found:
        raise ConfigError("eval_dataset must have at least one set, got an empty mapping. Give one, or None.")
    for each in found.values():
        each.require_examples()
    return found


def _check_length(config: SupervisedRunConfig, positions: int | None) -> None:
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ConfigError(
            f"max_length must be at most the model's {positions} positions, got {config.max_length}. Lower it."
        )


def _check_cache_dir(given: str | None) -> None:
    folder = default_cache_dir() if given is None else Path(given).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"ref_log_probs_cache_dir must be a folder that can be written, got {folder}: {there} is none. Give "
            "another, or set precompute_ref_log_probs=false."
        )


def _total_steps(config: SupervisedRunConfig, train: ExampleSet | None) -> int:
    # The last step of an epoch may have fewer examples. A stream has no epochs, and its `max_steps` is set.
    epoch = 0 if train is None else math.ceil(len(train.examples) / config.examples_per_step)
    return total_steps(config, epoch, per_step=1)
