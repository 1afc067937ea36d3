"""What workers tell of their attempts: the ledger takes many at once, and writes one record of them.

News(GENERATED | COMMITTED | FAILED | DROPPED) x n --Ledger--> Outcome x n
                                                   --JSON----> [kind, group_id, attempt, ...] x those that counted
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.buffer.entry import Outcome
from trl_ray.buffer.ledger import Ledger
from trl_ray.types import DropReason


class NewsKind(enum.StrEnum):
    """What happened to an attempt."""

    GENERATED = "generated"
    """All completions exist."""
    COMMITTED = "committed"
    """It is finished, and `payload` holds it."""
    FAILED = "failed"
    """For a reason that is not the group's: it is issued again, or dropped for `reason` after `max_attempts`."""
    DROPPED = "dropped"
    """It is given up for `reason`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """One worker's word on one attempt."""

    kind: NewsKind
    group_id: int
    attempt: int
    min_version: int | None = None
    """Of COMMITTED: the oldest weight version that sampled a token."""
    max_version: int | None = None
    """Of COMMITTED: the youngest."""
    payload: bytes = b""
    """Of COMMITTED; not part of the record."""
    reason: DropReason = DropReason.RETRIES_EXHAUSTED
    """Of FAILED and DROPPED."""
    because: str = ""
    """Of FAILED and DROPPED: what happened, for the event log."""

    def to_state(self) -> list[Any]:
        """As JSON values, without the payload."""
        key: list[Any] = [self.kind.value, self.group_id, self.attempt]
        if self.kind is NewsKind.COMMITTED:
            return [*key, self.min_version, self.max_version]
        if self.kind is NewsKind.GENERATED:
            return key
        return [*key, self.reason.value, self.because]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> News:
        """The inverse of `to_state`."""
        kind, key = NewsKind(state[0]), {"group_id": state[1], "attempt": state[2]}
        if kind is NewsKind.COMMITTED:
            return cls(kind=kind, **key, min_version=state[3], max_version=state[4])
        if kind is NewsKind.GENERATED:
            return cls(kind=kind, **key)
        return cls(kind=kind, **key, reason=DropReason(state[3]), because=state[4])


def apply_news(ledger: Ledger, news: News, now: float) -> Outcome:
    """Make the transition that this asks for."""
    group_id, attempt = news.group_id, news.attempt
    if news.kind is NewsKind.GENERATED:
        return ledger.generated(group_id=group_id, attempt=attempt, now=now)
    if news.kind is NewsKind.FAILED:
        return ledger.fail(group_id=group_id, attempt=attempt, because=news.because, now=now, exhausted=news.reason)
    if news.kind is NewsKind.DROPPED:
        return ledger.drop(group_id=group_id, attempt=attempt, reason=news.reason, because=news.because, now=now)
    assert news.min_version is not None and news.max_version is not None, f"A finished group has versions, got {news}."
    outcome = ledger.scored(group_id=group_id, attempt=attempt, now=now)
    if outcome is Outcome.FENCED:
        return outcome
    return ledger.commit(
        group_id=group_id, attempt=attempt, min_version=news.min_version, max_version=news.max_version, now=now
    )
