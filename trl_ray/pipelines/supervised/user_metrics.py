"""Metrics of the user's own on held-out rows: TRL's `compute_metrics` and `preprocess_logits_for_metrics`.

examples --prediction_batches--> learner.predict, a batch for each rank --joined--> compute_metrics --> numbers

The learner runs `preprocess_logits_for_metrics` and forgets the logits batch by batch; what is left of them is gathered
here, where `compute_metrics` runs beside the program that it came from.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import numpy as np

from trl_ray.algorithms.batches.prediction_batches import prediction_batches
from trl_ray.config.example_options import PackingStrategy
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.config.sections import RuntimeKind
from trl_ray.errors import ConfigError
from trl_ray.models.scoring.predictor import (
    as_tensors,
    eval_prediction,
    joined,
    plain_numbers,
    prediction_output,
)
from trl_ray.pipelines.run.own_metrics import computed_metrics
from trl_ray.types import Example, PredictedBatch, PredictionBatch, PredictionForm

AskLearner = Callable[..., Awaitable[Any]]
LossOf = Callable[[Sequence[Example]], Awaitable[float]]
"""The loss of some examples alone."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MetricFunctions:
    """What a user gave to measure held-out rows with."""

    form: PredictionForm
    """Of the pipeline."""
    compute: Callable[..., Any] | None = None
    preprocess: Callable[..., Any] | None = None

    def check(self, config: SupervisedRunConfig) -> None:
        """See that they can be called where they are needed.

        Raises:
            ConfigError: one is no function, or cannot travel to the learner.
        """
        names = {"compute_metrics": self.compute, "preprocess_logits_for_metrics": self.preprocess}
        for name, function in names.items():
            if function is not None and not callable(function):
                raise ConfigError(f"{name} must be a function, got a {type(function).__name__}. Pass a function.")
        if self.preprocess is None or config.runtime.kind is not RuntimeKind.RAY:
            return
        try:
            cloudpickle.dumps(self.preprocess)
        except (TypeError, AttributeError, ValueError, ImportError, RecursionError) as error:
            raise ConfigError(
                f"preprocess_logits_for_metrics must be picklable because it runs in the learner's process, but: "
                f"{error}. Create locks, clients and models inside the function, not around it."
            ) from error

    def check_size(self, examples: Sequence[Example], *, vocab_size: int, name: str) -> None:
        """See that all logits of a held-out set fit into memory, where nothing makes less of them.

        Raises:
            ConfigError: they do not.
        """
        whole = self.form not in (PredictionForm.MEANS, PredictionForm.SHIFTED_MEANS, PredictionForm.SCORED)
        if self.compute is None or self.preprocess is not None or not whole or not examples:
            return
        lengths = [len(one.prompt_ids) + len(one.completion_ids) for each in examples for one in each.samples]
        classes = 2 if self.form is PredictionForm.STEPPED else vocab_size
        needed, there = 4.0 * len(lengths) * max(lengths) * classes, _memory()
        if needed > there:
            raise ConfigError(
                f"compute_metrics would be given {needed / 2**30:.0f} GiB of logits of {name or 'eval_dataset'}, but "
                f"this machine has {there / 2**30:.0f} GiB. Pass preprocess_logits_for_metrics=lambda logits, labels: "
                "logits.argmax(-1), or set batch_eval_metrics=true."
            )


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """Everything that is known of a held-out set, as `compute_metrics` takes it."""

    predictions: Any
    label_ids: Any
    inputs: Any
    losses: Any


class HeldOutPredictions:
    """Asks the learner for predictions, and the user's function for numbers.

    Args:
        config: of the run.
        functions: of the user's.
        ask: calls a method of the learner.
        loss_of: asked only where `include_for_metrics` has ``loss``.
    """

    def __init__(
        self, config: SupervisedRunConfig, functions: MetricFunctions, *, ask: AskLearner, loss_of: LossOf
    ) -> None:
        self._config, self._functions, self._ask, self._loss_of = config, functions, ask, loss_of

    async def measure(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What `compute_metrics` says of a held-out set; nothing without one.

        Raises:
            CallbackError: it raised, or gave no dict.
        """
        if self._functions.compute is None:
            return {}
        if self._config.batch_eval_metrics:
            return await self._measure_batches(examples)
        found = await self.predict(examples)
        return await self._computed(
            eval_prediction(found.predictions, found.label_ids, inputs=found.inputs, losses=found.losses)
        )

    async def predict(self, examples: Sequence[Example]) -> Predicted:
        """Predictions, labels and what else is asked for, in the order of the examples."""
        whole = self._config.eval_do_concat_batches
        parts = [part async for part in self._rounds(examples)]
        answers = [answer for found, _ in parts for answer in found]
        losses = [array for _, arrays in parts for array in arrays]
        join: Callable[[list[Any]], Any] = joined if whole else list
        return Predicted(
            predictions=join([answer.predictions for answer in answers]),
            label_ids=join([answer.label_ids for answer in answers]),
            inputs=join([answer.inputs for answer in answers]) if self._wants("inputs") else None,
            losses=join(losses) if self._wants("loss") else None,
        )

    async def _measure_batches(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Batch by batch, so that nothing is gathered; the last call is asked for the result."""
        numbers: dict[str, Any] = {}
        left = len(self._batches(examples))
        async for answers, losses in self._rounds(examples):
            left -= len(answers)
            numbers = await self._computed(
                eval_prediction(
                    as_tensors(joined([answer.predictions for answer in answers])),
                    as_tensors(joined([answer.label_ids for answer in answers])),
                    inputs={"input_ids": as_tensors(joined([answer.inputs for answer in answers]))}
                    if self._wants("inputs")
                    else None,
                    losses=as_tensors(joined(losses)) if losses else None,
                ),
                is_last=left == 0,
            )
        return numbers

    def _batches(self, examples: Sequence[Example]) -> list[PredictionBatch]:
        config = self._config
        packing = getattr(config, "packing", False) and config.packing_strategy is not PackingStrategy.WRAPPED  # type: ignore[attr-defined]
        return prediction_batches(
            examples, self._functions.form, per_batch=config.per_device_eval_batch_size, is_flat=packing
        )

    async def _rounds(self, examples: Sequence[Example]) -> Any:
        """One batch of every rank at a time, with its losses where they are wanted."""
        ranks, size = self._config.runtime.num_learners, self._config.per_device_eval_batch_size
        batches = self._batches(examples)
        for first in range(0, len(batches), ranks):
            chosen = batches[first : first + ranks]
            answers: list[PredictedBatch] = await self._ask("predict", chosen)
            losses = []
            for place, batch in enumerate(chosen, start=first) if self._wants("loss") else ():
                loss = await self._loss_of(examples[place * size : (place + 1) * size])
                losses.append(np.full(batch.num_examples, loss, np.float32))
            yield answers, losses

    def _wants(self, what: str) -> bool:
        return what in self._config.include_for_metrics

    async def _computed(self, prediction: Any, *, is_last: bool | None = None) -> dict[str, Any]:
        assert self._functions.compute is not None, "there is a function to ask"
        return await computed_metrics(self._functions.compute, prediction, self._config, is_last=is_last)


class KeptPredictions:
    """Keeps what `compute_metrics` is given, for `predict`.

    Args:
        given: the user's functions.
        config: of the run.
        prefix: begins the names of the metrics; it is not put before those that begin with it.
    """

    def __init__(self, given: MetricFunctions | None, config: SupervisedRunConfig, *, prefix: str) -> None:
        self._prefix = f"{prefix}_"
        given = given or MetricFunctions(form=PredictionForm.LABELLED)
        self._compute, self._by_batch = given.compute, config.batch_eval_metrics
        self._kept = eval_prediction(None, None)
        self.functions = replace(given, compute=self._keep)

    def _keep(self, prediction: Any) -> Any:
        self._kept = prediction
        if self._compute is None:
            return {}
        if self._by_batch:
            whole = eval_prediction(as_tensors(prediction.predictions), as_tensors(prediction.label_ids))
            found = plain_numbers(self._compute(whole, compute_result=True))
        else:
            found = plain_numbers(self._compute(prediction))
        # Evaluations take `eval_` off, so that a name which begins with it keeps its own.
        return {f"eval_{name.removeprefix(self._prefix)}": value for name, value in found.items()}

    def output(self, metrics: Mapping[str, float]) -> Any:
        """transformers' `PredictionOutput`."""
        return prediction_output(self._kept.predictions, self._kept.label_ids, metrics)
