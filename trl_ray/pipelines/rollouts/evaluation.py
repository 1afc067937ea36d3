"""Answers held-out prompts on the rollout workers, beside the work they have in flight.

prompts --split evenly--> RolloutWorker.evaluate (scored, taught) --> answers
answers --held_out_loss--> learner.evaluate --> how far the student is from its teachers on its own answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
from trl_ray.errors import ActorLostError, DeadlineError, EngineError
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.updates import AskLearner
from trl_ray.runtime import waits
from trl_ray.types import Evaluation, Handle, Prompt

SHARE_TRIES = 4
"""How many workers a share may be lost with."""
_LOOK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutAnswers:
    """What the workers answered."""

    answers: tuple[EvaluatedPrompt, ...]
    lost: tuple[str, ...]
    """Why a share had to be asked again; the loss of its worker is the supervisor's business."""


class Answering(Protocol):
    """Rollout workers that are watched over."""

    @property
    def working(self) -> Sequence[Handle]:
        """Those that hold current weights."""
        ...

    async def ask_worker(self, handle: Handle, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call one; the wait ends with its loss."""
        ...


async def evaluate(workers: Answering, prompts: Sequence[Prompt], *, seed: int, deadline_s: float) -> HeldOutAnswers:
    """Split the prompts over the workers and gather their answers.

    The share of a worker that is lost goes to another one as it is, so that its samples stay the same.

    Args:
        workers: those of the run.
        prompts: held-out ones, always the same.
        seed: of the samples, so that evaluations differ by the weights alone.
        deadline_s: for one worker's share.
    """
    count = max(1, len(workers.working))
    shares = [share for index in range(count) if (share := prompts[index::count])]
    lost: list[str] = []

    async def ask(place: int) -> Sequence[EvaluatedPrompt]:
        async def is_there() -> bool:
            return bool(workers.working)

        for attempt in range(SHARE_TRIES):
            await waits.until(is_there, on="a rollout worker to evaluate", every_s=_LOOK_S, deadline_s=deadline_s)
            worker = workers.working[(place + attempt) % len(workers.working)]
            try:
                answers: Sequence[EvaluatedPrompt] = await workers.ask_worker(
                    worker, "evaluate", shares[place], seed=seed, deadline_s=deadline_s
                )
            except (ActorLostError, DeadlineError, EngineError) as error:
                lost.append(str(error))
            else:
                return answers
        return ()

    found = await asyncio.gather(*(ask(place) for place in range(len(shares))))
    return HeldOutAnswers(answers=tuple(answer for share in found for answer in share), lost=tuple(lost))


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
