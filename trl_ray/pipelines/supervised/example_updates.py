"""From the examples of one step to the learner's update, made on a thread while the learner trains the step before.

feed --thread: take, cut--> ReadyStep --with_kl (the learner's scores, where the loss asks for a KL)--> TrainBatch
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from trl_ray.algorithms.batches.example_batches import example_batch, mismatched_batch, mismatched_kl
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.pipelines.supervised.dataset_preparation import SupervisedPlan
from trl_ray.pipelines.supervised.example_feed import Fed, Feed
from trl_ray.types import Example, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExampleUpdate:
    """Examples as the learner takes them."""

    batch: TrainBatch
    mismatched: TrainBatch | None
    """What the KL of the update is estimated on, where its loss asks for one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadyStep:
    """A step that can be trained."""

    fed: Fed
    update: ExampleUpdate


def example_update(plan: SupervisedPlan, examples: Sequence[Example], *, step: int, is_training: bool) -> ExampleUpdate:
    """Examples, cut into micro-batches by the rules of training or of evaluation."""
    rules = plan.cut if is_training else plan.eval_cut
    totals = plan.totals_of([sample for example in examples for sample in example.samples])
    asks_kl = plan.task is ExampleTask.UNPAIRED_WITH_KL
    return ExampleUpdate(
        batch=example_batch(examples, step=step, rules=rules, totals=totals),
        mismatched=mismatched_batch(examples, step=step, rules=rules) if asks_kl else None,
    )


async def with_kl(update: ExampleUpdate, ask_learner: Callable[..., Awaitable[Any]]) -> TrainBatch:
    """The batch, with the KL under the weights as they are where its loss asks for it."""
    if update.mismatched is None:
        return update.batch
    kl = mismatched_kl(update.mismatched, await ask_learner("score", update.mismatched))
    return replace(update.batch, totals={**update.batch.totals, "kl": kl})


class StepsAhead:
    """Makes steps on a thread, at most one ahead of who takes them.

    consumes: examples of the feed.  produces: steps that can be trained.  waits for: nobody.  unblocked by: `begin`.

    Args:
        plan: of the run.
        feed: of the examples.
    """

    def __init__(self, plan: SupervisedPlan, feed: Feed) -> None:
        self._plan, self._feed = plan, feed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")
        self._coming: asyncio.Future[ReadyStep] | None = None

    def begin(self, step: int, *, place: int) -> None:
        """Make a step from now on; `place` is its number in the dataset's order."""
        self._coming = asyncio.get_running_loop().run_in_executor(self._thread, self._make, step, place)

    def forget(self) -> None:
        """The step that was begun is not taken."""
        self._coming = None

    async def take(self, step: int, *, place: int) -> ReadyStep:
        """The step that was begun, or this one, begun now.

        Raises:
            InputError: a row of a stream cannot be used.
        """
        if self._coming is None:
            self.begin(step, place=place)
        assert self._coming is not None, "it was begun"
        coming, self._coming = self._coming, None
        return await coming

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int, place: int) -> ReadyStep:
        fed = self._feed.take(place)
        return ReadyStep(fed=fed, update=example_update(self._plan, fed.examples, step=step, is_training=True))
