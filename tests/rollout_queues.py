"""A queue with a clock of its own, and groups for it."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.types import (
    Completion,
    EventKind,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    VersionSpan,
)


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(folder: Path, **changes: Any) -> RolloutQueue:
    arguments: dict[str, Any] = {
        "journal_path": str(folder / "ledger.journal"),
        "groups_per_step": 2,
        "max_staleness": 1,
        "incarnation": "job-1",
        "lease_s": 10.0,
        "drop_zero_variance": True,
        "mask_truncated": True,
        "adaptive_slots": False,
        **changes,
    }
    return RolloutQueue(**arguments)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def prompts(first: int, count: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"0:{n}", token_ids=np.array([n], dtype=np.int32), text=f"say {n}", columns={"answer": n})
        for n in range(first, first + count)
    ]


def finished(
    ticket: GroupTicket,
    *,
    totals: tuple[float | None, ...] = (0.0, 1.0),
    reason: FinishReason = FinishReason.STOP,
    version: int = 0,
) -> RolloutGroup:
    completion = Completion(
        token_ids=np.array([1, 2], dtype=np.int32),
        logprobs=np.array([-1.0, -2.0], dtype=np.float32),
        versions=(VersionSpan(version=version, start=0, end=2),),
        finish_reason=reason,
        text="x",
    )
    return RolloutGroup(
        ticket=ticket,
        completions=(completion,) * len(totals),
        rewards=tuple(Reward(total=total, parts={"f": total}) for total in totals),
        worker="rollout-0",
    )


async def fill(queue: RolloutQueue, count: int = 4) -> list[GroupTicket]:
    first = await queue.next_ordinal()
    await queue.admit(prompts=prompts(first, count), version=0)
    return await queue.lease(worker="rollout-0", capacity=count, wait_s=0)


async def kinds(queue: RolloutQueue) -> list[EventKind]:
    return [event.kind for event in (await queue.drain()).events]


async def with_first_step_taken(folder: Path) -> RolloutQueue:
    """A new queue with four finished groups, of which the learner has taken two for step 1."""
    queue = make(folder)
    for ticket in await fill(queue):
        await queue.commit(group=finished(ticket))
    await queue.take(n=2, step=1, wait_s=0)
    return queue


async def with_first_step_trained(folder: Path) -> RolloutQueue:
    """The same, once step 1 is trained."""
    queue = await with_first_step_taken(folder)
    await queue.trained(step=1)
    return queue
