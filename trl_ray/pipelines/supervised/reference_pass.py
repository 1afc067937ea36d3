"""Asks the reference once, before training, and keeps its answers on disk for runs to come.

examples --missing in the cache--> learner at version 0 (the reference is what training starts from) --> ReferenceCache
                                                                                                            |
examples with label.reference, one number per completion  <-------------------------------------------------+

Nothing holds a second model then. Answers are written as they come, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trl_ray.algorithms.batches.example_batches import asked_of, example_references, reference_batch
from trl_ray.algorithms.batches.example_batches import with_references as labelled
from trl_ray.config.sections import ModelConfig
from trl_ray.data.examples.example_set import ExampleSet
from trl_ray.data.examples.made_examples import MadeExamples
from trl_ray.errors import InterruptedRun
from trl_ray.models.companions.reference_cache import ReferenceCache, reference_key, token_digest
from trl_ray.pipelines.run.learner_actors import LearnerActors
from trl_ray.pipelines.run.signals import heed_signals
from trl_ray.pipelines.supervised.dataset_preparation import SupervisedPlan
from trl_ray.types import EventKind, Example, FloatArray, TrainingSample, steady_time

Say = Callable[..., None]
_EXAMPLES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledSets:
    """The examples of a run; with what the reference says of them, where that is asked before training."""

    train: ExampleSet | None
    held_out: Mapping[str, ExampleSet]
    """By their names."""


async def with_references(
    plan: SupervisedPlan, *, actors: LearnerActors, say: Say, stop: asyncio.Event
) -> LabelledSets:
    """The run's examples, with the reference's log-probs where the loss wants them precomputed.

    Args:
        plan: of the run.
        actors: a learner at the initial weights, which are the reference's; started only if there is something to ask.
        say: writes down an event.
        stop: ends it in order once it is set.

    Raises:
        InterruptedRun: the stop event was set; what was answered is kept.
        LearnerLostError: the learner died or hung; what was answered is kept.
        NumericsError: an answer is not finite.
    """
    if not plan.precomputes_reference:
        return LabelledSets(train=plan.train, held_out=plan.held_out)
    assert plan.train is not None, "a stream has no precomputed reference"
    oracle = _Oracle(plan=plan, actors=actors, say=say, stop=stop)
    train = replace(plan.train, examples=await oracle.label(plan.train.examples, what="training"))
    held_out = {
        name: replace(found, examples=await oracle.label(found.examples, what=f"held-out {name}".rstrip()))
        for name, found in plan.held_out.items()
    }
    return LabelledSets(train=train, held_out=held_out)


class LabelledExamples(MadeExamples):
    """Examples with what the reference says of them, put together when they are asked for.

    Args:
        examples: [N]
        starts: [N+1] where the values of each begin.
        values: log-probs in nats.
    """

    def __init__(self, examples: Sequence[Example], starts: NDArray[np.int64], values: FloatArray) -> None:
        self._examples, self._starts, self._values = examples, starts, values

    def __len__(self) -> int:
        return len(self._examples)

    def make(self, index: int) -> Example:
        known = self._values[self._starts[index] : self._starts[index + 1]]
        return labelled(self._examples[index], known.tolist())


def _noted(examples: Iterable[Example], widths: NDArray[np.int64]) -> Iterator[TrainingSample]:
    """All that a reference is asked of examples, one by one; how much it is of each is written into `widths`."""
    for index, example in enumerate(examples):
        samples = asked_of(example)
        widths[index] = len(samples)
        yield from samples


class _Oracle:
    """The reference policy, asked only about what no earlier run has asked."""

    def __init__(self, *, plan: SupervisedPlan, actors: LearnerActors, say: Say, stop: asyncio.Event) -> None:
        self._plan, self._actors, self._say, self._stop = plan, actors, say, stop

    async def label(self, examples: Sequence[Example], *, what: str) -> LabelledExamples:
        config, ld_alpha = self._plan.config, getattr(self._plan.loss, "ld_alpha", None)
        widths = np.zeros(len(examples), np.int64)
        tokens = token_digest(_noted(examples, widths))
        starts = np.concatenate([[0], np.cumsum(widths)])
        folder = config.ref_log_probs_cache_dir
        key = reference_key(config.part(ModelConfig), tokens=tokens, ld_alpha=ld_alpha, directory=folder)
        cache = ReferenceCache.open(folder, key=key, size=int(starts[-1]))
        if cache.problem is not None:
            self._say(EventKind.WARNING, "driver", detail=cache.problem)
        asked = np.unique(np.searchsorted(starts, cache.missing(), side="right") - 1)
        begin = steady_time()
        for first in range(0, len(asked), _EXAMPLES_AT_ONCE):
            places = asked[first : first + _EXAMPLES_AT_ONCE].tolist()
            chosen = [examples[place] for place in places]
            values = await self._ask(chosen, ld_alpha)
            indices = [index for place in places for index in range(int(starts[place]), int(starts[place + 1]))]
            cache.put(indices, [value for row in values for value in row])
            await self._heed(f"{first + len(places)} of {len(asked)} {what} examples")
        self._say(
            EventKind.SLOTS,
            "learner",
            detail=f"log-probs of the reference for {what} examples",
            asked=len(asked),
            from_cache=len(examples) - len(asked),
            seconds=round(steady_time() - begin, 3),
        )
        return LabelledExamples(examples, starts, cache.values())

    async def _heed(self, done: str) -> None:
        await heed_signals()
        if self._stop.is_set():
            raise InterruptedRun(
                f"interrupted after the reference was asked about {done}, whose answers are kept; go on with: trl-ray "
                f"resume {self._plan.config.output_dir}"
            )

    async def _ask(self, examples: Sequence[Example], ld_alpha: float | None) -> list[tuple[float, ...]]:
        if not self._actors.is_started:
            await self._actors.start()
        batch = reference_batch(examples, rules=self._plan.eval_cut)
        answers = await self._actors.ask("reference_logprobs", batch)
        return example_references(examples, batch, answers, ld_alpha=ld_alpha)
