"""Answers held-out prompts on the rollout workers, beside the work they have in flight.

prompts --split evenly--> RolloutWorker.evaluate (one completion each, scored) --> answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.errors import ActorLostError, DeadlineError, EngineError
from trl_ray.types import Handle, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the workers answered."""

    answers: tuple[EvaluatedPrompt, ...]
    lost: tuple[str, ...]
    """Why a worker's share is missing; its loss is the supervisor's business."""


async def evaluate(workers: Sequence[Handle], prompts: Sequence[Prompt], *, seed: int, deadline_s: float) -> Evaluation:
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
    return Evaluation(answers=tuple(answers), lost=tuple(lost))
