"""From the finished groups of one step to the learner's updates.

groups --advantages--> samples --(first pass: score)--> samples with old, reference, mask --slices--> learner.step x U
                 ^------------- KL in the reward ------------'
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trl_ray.algorithms.batching import BuiltStep, RewardRules, build_step
from trl_ray.algorithms.first_pass import in_order, needs_first_pass, with_scores
from trl_ray.algorithms.metrics import merge_metrics
from trl_ray.algorithms.micro_batches import CutRules, split_updates, train_batch
from trl_ray.config.advantages import AdvantageConfig
from trl_ray.config.grpo import GRPOConfig
from trl_ray.config.loss import LossConfig
from trl_ray.types import RolloutGroup, StepResult, TrainingSample

AskLearner = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """One step: what was trained on, and what came of it."""

    built: BuiltStep
    result: StepResult


async def train_on(
    groups: Sequence[RolloutGroup], *, step: int, config: GRPOConfig, cut: CutRules, ask_learner: AskLearner
) -> Updated:
    """Train on the groups of one step, in as many updates as the configuration asks for.

    Args:
        groups: finished, in training order.
        step: 1-based.
        config: of the run.
        cut: how an update is cut into micro-batches.
        ask_learner: calls a method of the learner.

    Raises:
        LearnerLostError: the learner died or hung.
        NumericsError: NaN or infinity, and the run stops for it.
    """
    loss, deadline_s = config.part(LossConfig), config.runtime.step_deadline_s
    build = partial(build_step, groups, config=config.part(AdvantageConfig), rules=RewardRules.of(config))
    built = build()
    samples: Sequence[TrainingSample] = built.samples
    if needs_first_pass(loss, updates_per_step=config.updates_per_step):
        draft = train_batch(samples, step=step, rules=cut)
        scored = await ask_learner("score", draft, deadline_s=deadline_s)
        scores = in_order(samples, [(draft, scored)])
        if config.kl_in_reward:
            built = build(scores=scores)
        samples = with_scores(built.samples, scores, loss=loss, updates_per_step=config.updates_per_step)
    batches = split_updates(
        samples,
        step=step,
        updates=config.slices_per_step,
        iterations=config.num_iterations,
        seed=config.seed,
        rules=cut,
    )
    results = [await ask_learner("step", batch, deadline_s=deadline_s) for batch in batches]
    return Updated(built=built, result=merge_results(results))


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
