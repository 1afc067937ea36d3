"""From the finished groups of one step to the learner's updates.

groups --Objective.build--> samples --(first pass: score)--> with old, reference, mask --slices--> learner.step x U
                 ^------------------ KL in the reward ------------'
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.algorithms.batches.micro_batches import CutRules, split_updates, train_batch
from trl_ray.algorithms.metric_merging import merge_metrics
from trl_ray.algorithms.policy.first_pass import in_order
from trl_ray.algorithms.policy.group_samples import BuiltStep
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.types import RolloutGroup, StepResult, TrainingSample

AskLearner = Callable[..., Awaitable[Any]]
"""(method, batch) -> the learner's answer, within a step's time; see `LearnerActors.ask`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The samples of one step, as updates are made on them."""

    built: BuiltStep
    samples: Sequence[TrainingSample]
    """Those of `built`, with what a first pass has added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """One step: what was trained on, and what came of it."""

    built: BuiltStep
    result: StepResult


async def prepare_step(
    groups: Sequence[RolloutGroup],
    *,
    step: int,
    objective: Objective[Any],
    cut: CutRules,
    ask_learner: AskLearner,
) -> Prepared:
    """Make samples of the groups of one step, and have the learner score them where the objective asks for it.

    Args:
        groups: finished, in training order.
        step: 1-based.
        objective: of the run.
        cut: how an update is cut into micro-batches.
        ask_learner: calls a method of the learner.

    Raises:
        LearnerLostError: the learner died or hung.
    """
    built = objective.build(groups)
    if not objective.needs_first_pass:
        return Prepared(built=built, samples=built.samples)
    draft = train_batch(built.samples, step=step, rules=cut)
    scored = await ask_learner("score", draft)
    scores = in_order(built.samples, [(draft, scored)])
    if objective.builds_on_scores:
        built = objective.build(groups, scores=scores)
    return Prepared(built=built, samples=objective.with_scores(built.samples, scores))


async def train_on(
    prepared: Prepared,
    *,
    step: int,
    config: RolloutRunConfig,
    objective: Objective[Any],
    cut: CutRules,
    ask_learner: AskLearner,
) -> Updated:
    """Train on the samples of one step, in as many updates as the configuration asks for.

    Args:
        prepared: the samples.
        step: 1-based.
        config: of the run.
        objective: of the run; its loss says what an update is divided by.
        cut: how an update is cut into micro-batches.
        ask_learner: calls a method of the learner.

    Raises:
        LearnerLostError: the learner died or hung.
        NumericsError: NaN or infinity, and the run stops for it.
    """
    batches = split_updates(
        prepared.samples,
        step=step,
        updates=config.slices_per_step,
        iterations=config.passes_per_step,
        seed=config.seed,
        rules=cut,
        totals_of=objective.totals_of,
    )
    results = [await ask_learner("step", batch) for batch in batches]
    return Updated(built=prepared.built, result=merge_results(results))


def merge_results(results: Sequence[StepResult]) -> StepResult:
    """The updates of one step as one: means of loss and norm over those that were made, metrics joined by their rules.

    Skipped only when all updates were.
    """
    made = [result for result in results if not result.skipped]
    last = results[-1]
    if len(results) == 1:
        return last
    return StepResult(
        version=last.version,
        loss=sum(result.loss for result in made) / len(made) if made else math.nan,
        grad_norm=sum(result.grad_norm for result in made) / len(made) if made else math.nan,
        lr=last.lr,
        skipped=not made,
        metrics=merge_metrics(result.metrics for result in results),
        seconds=sum(result.seconds for result in results),
    )
