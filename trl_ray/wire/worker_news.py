"""What a rollout worker tells the queue of its groups: small facts, and finished groups as bytes.

    RolloutWorker -- GroupGenerated | GroupFinished | GroupFailed, many in one call --> RolloutQueue.report

A group is checked and encoded where it was made; the queue stores its bytes and decides by its facts.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_ray.types import DropReason, FinishReason, RolloutGroup
from trl_ray.wire.group_payload import encode_group


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupGenerated:
    """All completions of the attempt exist; its rewards are outstanding."""

    group_id: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFinished:
    """The group is finished."""

    group_id: int
    attempt: int
    worker: str
    min_version: int
    max_version: int
    totals: tuple[float, ...]
    """Of the rewards that exist."""
    all_cut_off: bool
    """No completion came to its end."""
    payload: bytes
    """`encode_group`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFailed:
    """The attempt failed: the group is issued again, or dropped."""

    group_id: int
    attempt: int
    detail: str
    """What happened, for the event log."""
    drop: DropReason | None = None
    """Drop the group now, for this reason; None tries again up to `max_attempts`."""
    exhausted: DropReason = DropReason.RETRIES_EXHAUSTED
    """The reason recorded when that was the last attempt. That of a failed teacher makes an event of every failed
    attempt: the teacher is one of many, and does not know of the group."""


WorkerNews = GroupGenerated | GroupFinished | GroupFailed


def finished_group(group: RolloutGroup) -> GroupFinished:
    """The group as a worker tells of it.

    Raises:
        DataError: the group contradicts itself or cannot be stored.
    """
    payload = encode_group(group)
    return GroupFinished(
        group_id=group.ticket.group_id,
        attempt=group.ticket.attempt,
        worker=group.worker,
        min_version=group.min_version,
        max_version=group.max_version,
        totals=tuple(reward.total for reward in group.rewards if reward.total is not None),
        all_cut_off=all(each.finish_reason is not FinishReason.STOP for each in group.completions),
        payload=payload,
    )
