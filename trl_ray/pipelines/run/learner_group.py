"""Several ranks of one learner behind the face of a single actor.

    step(batch), evaluate(batch) --shard--> rank 0 .. rank R-1, side by side --> the answer of rank 0, which knows all
    score(batch), reference_logprobs(batch) --shard--> the answers of all, in the order of the batch
    predict(batches): one batch for each rank --> the answers, in the order of the batches
    publish, weight check, save: on every rank, because they gather weights together; rank 0 answers

A rank that is lost takes the group with it: the others would wait for it in their next exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.algorithms.batches.micro_batches import shard
from trl_ray.algorithms.policy.first_pass import in_order
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ActorLostError, RunError
from trl_ray.runtime import waits
from trl_ray.runtime.runtime import ActorHandle, Role, Runtime
from trl_ray.types import ActorReport, Health, TrainBatch

_JOINED = frozenset({"step", "evaluate"})
"""Methods that take a batch and whose answer is the same on all ranks, which exchange what they found."""
_BY_SAMPLE = frozenset({"score", "reference_logprobs"})
"""Methods that take a batch and answer for each of its samples."""
_GRACE_S = 10.0
"""For Ray to find that a rank is gone, after another one's exchange with it has failed."""


class LearnerGroup:
    """The ranks, called together; see `trl_ray.runtime.runtime.ActorHandle`.

    Args:
        members: one handle per rank, in order.
        equal_passes: give every rank equally many micro-batches, for back ends that exchange data in each pass.
    """

    def __init__(self, members: Sequence[ActorHandle], *, equal_passes: bool) -> None:
        assert members, "a group has at least one rank"
        self.members = tuple(members)
        self._equal_passes = equal_passes

    @property
    def name(self) -> str:
        """The group is the learner."""
        return "learner"

    @property
    def role(self) -> Role:
        """What it does."""
        return Role.LEARNER

    async def join(self, *, deadline_s: float) -> None:
        """Have the ranks meet and load the model, side by side.

        Raises:
            ActorLostError, DeadlineError: of the first rank that fails.
        """
        address: str = await self.members[0].call("address", deadline_s=deadline_s)
        await _together([member.call("join", address, deadline_s=deadline_s) for member in self.members])

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a method of the learner on the ranks it concerns; see `trl_ray.types.Handle`."""
        if method == "identity":
            return await self.members[0].call(method, *args, deadline_s=deadline_s, **kwargs)
        if method in _JOINED | _BY_SAMPLE:
            (batch,) = args
            return await self._shards(method, batch, deadline_s)
        if method == "predict":
            (batches,) = args
            return await self._each(method, batches, deadline_s)
        answers = await _together(
            [member.call(method, *args, deadline_s=deadline_s, **kwargs) for member in self.members]
        )
        if method == "health":
            return _merge_health(answers)
        return _merge_reports(answers) if method == "drain" else answers[0]

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """The answer of rank 0, left where it was made."""
        first, *others = self.members
        answers = await _together(
            [
                first.call_shared(method, *args, deadline_s=deadline_s, **kwargs),
                *(member.call(method, *args, deadline_s=deadline_s, **kwargs) for member in others),
            ]
        )
        return answers[0]

    async def _each(self, method: str, items: Sequence[Any], deadline_s: float) -> list[Any]:
        """Give every rank one item, or none, and join what they answer."""
        answers: list[Any] = []
        for start in range(0, len(items), len(self.members)):
            shares = [items[start + rank : start + rank + 1] for rank in range(len(self.members))]
            calls = [
                member.call(method, share, deadline_s=deadline_s)
                for member, share in zip(self.members, shares, strict=True)
            ]
            answers += [answer for of_rank in await _together(calls) for answer in of_rank]
        return answers

    async def _shards(self, method: str, batch: TrainBatch, deadline_s: float) -> Any:
        shards = shard(batch, ranks=len(self.members), equal=self._equal_passes)
        answers = await _together(
            [
                member.call(method, part, deadline_s=deadline_s)
                for member, part in zip(self.members, shards, strict=True)
            ]
        )
        return answers[0] if method in _JOINED else in_order(batch.samples, zip(shards, answers, strict=True))


async def spawn_learner(runtime: Runtime, config: RunConfig, arguments: Mapping[str, Any]) -> ActorHandle:
    """Start one actor, or one for each rank; a group has yet to `join`."""
    count = config.runtime.num_learners
    if count == 1:
        return await runtime.spawn(Role.LEARNER, "learner", PolicyLearner, **arguments)
    every = {**arguments, "num_ranks": count, "collective_timeout_s": config.runtime.collective_timeout_s}
    members = [
        await runtime.spawn(Role.LEARNER, f"learner-{rank}", PolicyLearner, slot=rank, rank=rank, **every)
        for rank in range(count)
    ]
    return LearnerGroup(members, equal_passes=config.deepspeed is not None)


def ranks_of(learner: ActorHandle | None) -> tuple[ActorHandle, ...]:
    """The actors behind a learner's handle."""
    if learner is None:
        return ()
    return learner.members if isinstance(learner, LearnerGroup) else (learner,)


async def _together(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All answers, or the first error: a rank that waits for a lost one is not waited for.

    Whom a lost rank leaves in an exchange fails as well, and often first. So an error that is not the package's own
    stands back for a moment, in case another rank turns out to be lost.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await waits.first(tasks, on="the ranks of the learner", return_when=asyncio.FIRST_EXCEPTION)
        first = next((error for task in tasks if (error := _error(task)) is not None), None)
        if type(first) is RunError:
            first = await _lost_rank(tasks) or first
        if first is not None:
            raise first
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _lost_rank(tasks: Sequence[asyncio.Future[Any]]) -> ActorLostError | None:
    """The loss of a rank among those that have failed or do so soon."""
    end = asyncio.get_running_loop().time() + _GRACE_S
    while True:
        for task in tasks:
            if isinstance(error := _error(task), ActorLostError):
                return error
        pending, left = [task for task in tasks if not task.done()], end - asyncio.get_running_loop().time()
        if not pending or left <= 0:
            return None
        await waits.first(pending, on="the ranks of the learner", deadline_s=left)


def _error(task: asyncio.Future[Any]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _merge_health(answers: Sequence[Health]) -> Health:
    """Progress of all together; busy since the first that is."""
    first = answers[0]
    busy = [health.busy_since for health in answers if health.busy_since is not None]
    problems = [health.problem for health in answers if health.problem is not None]
    return Health(
        pid=first.pid,
        progress=sum(health.progress for health in answers),
        busy_since=min(busy, default=None),
        version=first.version,
        checksum=first.checksum,
        problem="; ".join(problems) or None,
    )


def _merge_reports(reports: Sequence[ActorReport]) -> ActorReport:
    return ActorReport(
        events=tuple(event for report in reports for event in report.events),
        spans=tuple(span for report in reports for span in report.spans),
    )
