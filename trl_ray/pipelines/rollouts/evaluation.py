"""Answers held-out prompts on the rollout workers, beside the work they have in flight.

prompts --split evenly--> RolloutWorker.evaluate (scored, taught) --> answers        (a lost share: another worker)
answers --held_out_loss--> learner.evaluate --> how far the student is from its teachers on its own answers
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
from trl_ray.errors import ActorLostError, DeadlineError, EngineError
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.updates import AskLearner
from trl_ray.types import Evaluation, Handle, Prompt

_PAUSE_S = 0.5
_TRIES = 3
"""How many workers are asked for one share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutAnswers:
    """What the workers answered."""

    answers: tuple[EvaluatedPrompt, ...]
    lost: tuple[str, ...] = ()
    """Why workers gave no answer; its loss is the supervisor's business."""


async def evaluate(
    workers: Callable[[], Sequence[Handle]], prompts: Sequence[Prompt], *, seed: int, deadline_s: float
) -> HeldOutAnswers:
    """Split the prompts over the workers and gather their answers; the share of one that is lost goes to others.

    waits for: the answers of all shares, and for a worker where none is left.  unblocked by: the answers; the deadline.

    Args:
        workers: those that hold current weights, now.
        prompts: held-out ones, always the same.
        seed: of the samples, so that evaluations differ by the weights alone.
        deadline_s: for a worker's share, and for a worker to be there; what is missing then is missing.
    """
    count = max(1, len(workers()))
    shares = {index: share for index in range(count) if (share := prompts[index::count])}
    answers: dict[int, list[EvaluatedPrompt]] = {}
    lost: list[str] = []
    failed: list[Handle] = []
    tries: Counter[int] = Counter()
    end = time.monotonic() + deadline_s
    while missing := [index for index in shares if index not in answers and tries[index] < _TRIES]:
        able = [worker for worker in workers() if not any(worker is each for each in failed)]
        if not able and time.monotonic() > end:
            break
        if not able:
            await asyncio.sleep(_PAUSE_S)
            continue
        asked = list(zip(missing, able, strict=False))
        calls = [worker.call("evaluate", shares[index], seed=seed, deadline_s=deadline_s) for index, worker in asked]
        for (index, worker), outcome in zip(asked, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, (ActorLostError, DeadlineError, EngineError)):
                lost.append(str(outcome))
                failed.append(worker)
                tries[index] += 1
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                answers[index] = outcome
                end = time.monotonic() + deadline_s
    # In the order of the shares, whoever answered them.
    return HeldOutAnswers(answers=tuple(each for index in shares for each in answers.get(index, ())), lost=tuple(lost))


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
