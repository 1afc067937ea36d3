"""Answers held-out prompts on the rollout workers, beside the work they have in flight.

prompts --split evenly--> RolloutWorker.evaluate (scored, taught) --> answers
answers --held_out_loss--> learner.evaluate --> how far the student is from its teachers on its own answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
from trl_ray.errors import ActorLostError, DeadlineError, EngineError
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.updates import AskLearner
from trl_ray.types import Evaluation, Handle, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutAnswers:
    """What the workers answered."""

    answers: tuple[EvaluatedPrompt, ...]
    lost: tuple[str, ...]
    """Why a worker's share is missing; its loss is the supervisor's business."""


async def evaluate(
    workers: Sequence[Handle], prompts: Sequence[Prompt], *, seed: int, deadline_s: float
) -> HeldOutAnswers:
    """Split the prompts over the workers and gather their answers.

    Args:
        workers: those that hold current weights; the share of one that is lost meanwhile is missing.
        prompts: held-out ones, always the same.
        seed: of the samples, so that evaluations differ by the weights alone.
        deadline_s: for one worker's share.
    """
    shares = [prompts[index :: len(workers)] for index in range(len(workers))]
    calls = [
        worker.call("evaluate", share, seed=seed, deadline_s=deadline_s)
        for worker, share in zip(workers, shares, strict=True)
        if share
    ]
    answers: list[EvaluatedPrompt] = []
    lost: list[str] = []
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, (ActorLostError, DeadlineError, EngineError)):
            lost.append(str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            answers.extend(outcome)
    return HeldOutAnswers(answers=tuple(answers), lost=tuple(lost))


async def held_out_loss(
    answers: Sequence[EvaluatedPrompt],
    *,
    step: int,
    objective: Objective[Any],
    cut: CutRules,
    ask_learner: AskLearner,
) -> Evaluation | None:
    """The loss on held-out answers that teachers were asked about; None where the loss is none of teachers alone.

    Args:
        answers: of `evaluate`.
        step: finished optimizer steps.
        objective: of the run.
        cut: how the answers are cut into micro-batches.
        ask_learner: calls a method of the learner.

    Raises:
        LearnerLostError: the learner died or hung.
    """
    if not objective.evaluates_loss:
        return None
    groups = [answer.as_group(number) for number, answer in enumerate(answers) if answer.contexts]
    if not groups:
        return None
    samples = objective.build(groups).samples
    batch = train_batch(samples, step=step + 1, rules=cut, totals_of=objective.totals_of)
    found: Evaluation = await ask_learner("evaluate", batch)
    return found
