"""What actors tell of themselves: events, and intervals of their timelines."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """An interval of an actor's timeline, in seconds since the epoch."""

    actor: str
    name: str
    start: float
    end: float


class EventKind(enum.StrEnum):
    """What `events.jsonl` can say."""

    RUN_STARTED = "run_started"
    RUN_RESUMED = "run_resumed"
    RUN_FINISHED = "run_finished"
    RUN_FAILED = "run_failed"
    INTERRUPTED = "interrupted"
    ACTOR_STARTED = "actor_started"
    ACTOR_LOST = "actor_lost"
    ACTOR_RESTARTED = "actor_restarted"
    WEIGHTS_PUBLISHED = "weights_published"
    WEIGHTS_PULLED = "weights_pulled"
    WEIGHT_CHECK = "canary"
    LEASE_EXPIRED = "lease_expired"
    GROUP_REISSUED = "group_reissued"
    GROUP_DROPPED = "group_dropped"
    REWARD_FAILED = "reward_failed"
    TEACHER_FAILED = "teacher_failed"
    CHECKPOINT = "checkpoint"
    EVALUATED = "evaluated"
    SLOTS = "slots"
    STOP_REQUESTED = "stop_requested"
    READY = "ready"
    WAITING = "waiting"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of `events.jsonl`."""

    kind: EventKind
    actor: str
    time: float
    """Seconds since the epoch."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""

    @classmethod
    def now(cls, kind: EventKind, actor: str, /, **detail: Any) -> Event:
        """Something that happens at this moment."""
        return cls(kind=kind, actor=actor, time=time.time(), detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorReport:
    """Events and spans an actor has gathered since it was last asked."""

    events: Sequence[Event] = ()
    spans: Sequence[Span] = ()
