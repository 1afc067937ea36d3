"""The words of the ledger: states, outcomes, rules, one entry per group, and the snapshot others read.

issued -> leased -> generated -> scored -> ready -> taken(step) -> trained(step)
   ^________________________|                 any live state    -> dropped(reason)
    failed, expired or lost: attempt + 1
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.config.slot_bounds import SlotBounds
from trl_ray.types import DropReason


class State(enum.StrEnum):
    """Where a group stands."""

    ISSUED = "issued"
    """Admitted (or issued again) and waiting for a worker."""
    LEASED = "leased"
    """A worker is generating it."""
    GENERATED = "generated"
    """All completions exist; the rewards are outstanding."""
    SCORED = "scored"
    """Rewards exist; the commit is outstanding."""
    READY = "ready"
    """Committed; waits for the learner."""
    TAKEN = "taken"
    """Part of the batch of one step."""
    TRAINED = "trained"
    """A finished step used it; settled."""
    DROPPED = "dropped"
    """Left without being trained, with a reason; settled."""


HELD = frozenset({State.LEASED, State.GENERATED, State.SCORED})
"""States in which a worker holds the group under a lease."""
LIVE = frozenset(State) - {State.TRAINED, State.DROPPED}
"""States in which the group still has a fate ahead of it."""


class Outcome(enum.StrEnum):
    """What became of a transition that a caller asked for."""

    APPLIED = "applied"
    REPEATED = "repeated"
    """The same attempt had already made this transition; nothing changed."""
    FENCED = "fenced"
    """The attempt is late or foreign; counted and ignored."""


class ChangeKind(enum.StrEnum):
    """What happened to a group that its holder, its slot or the event log must hear of."""

    REISSUED = "reissued"
    DROPPED = "dropped"
    RELEASED = "released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One consequence of an operation."""

    kind: ChangeKind
    group_id: int
    attempt: int
    """The attempt that ended."""
    because: str
    """``expired``, ``worker lost``, ``restored``, or the caller's own words."""
    worker: str | None = None
    """Who held the group, if anyone did."""
    reason: DropReason | None = None
    """Set for DROPPED."""
    frees_slot: bool = False
    """True for RELEASED, and for DROPPED unless a skipped step held the group: that slot waits for the release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseKey:
    """One right to generate: with a group's payload it becomes a ticket."""

    group_id: int
    attempt: int
    version: int
    """Weight version at admission."""
    draw: int = 0
    """As in `GroupEntry`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingGroup:
    """A group that the next step cannot do without, and who has it."""

    group_id: int
    attempt: int
    state: State
    worker: str | None
    since: float
    """When it entered the state, seconds since the epoch."""


_IN_JOURNAL = {"max_look_ahead": "window"}
"""Rules that journals know by another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferRules(SlotBounds):
    """The constants of one run's buffer; written into the journal, because replay depends on them."""

    max_attempts: int = 3
    """How often a group is tried in all before it is dropped."""
    lease_s: float = 60.0
    """Seconds a worker may stay silent before its groups are issued again."""
    adaptive_slots: bool = False
    """Whether the controller moves the number of slots in use."""
    reuse_finished: bool = True
    """Whether a restore keeps finished groups; False makes a resumed synchronous run repeat itself bit for bit."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        SlotBounds.__post_init__(self)  # a class with slots is made anew, which super() does not see
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}.")
        if self.lease_s <= 0:
            raise ValueError(f"lease_s must be positive, got {self.lease_s}.")

    def to_state(self) -> dict[str, Any]:
        """As JSON values, named as the journal names them."""
        return {_IN_JOURNAL.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BufferRules:
        """The inverse of `to_state`."""
        fields = {stored: name for name, stored in _IN_JOURNAL.items()}
        return cls(**{fields.get(name, name): value for name, value in state.items()})


@dataclass(slots=True, kw_only=True)
class GroupEntry:
    """Everything the ledger knows about one group (the only mutable record; it never leaves the ledger)."""

    group_id: int
    version: int
    """Weight version at admission of the current attempt."""
    since: float
    state: State = State.ISSUED
    attempt: int = 0
    failures: int = 0
    """Attempts lost since admission or since the last restore."""
    draws: int = 0
    """Attempts whose completions could not be scored, since admission or the last restore."""
    worker: str | None = None
    expires_at: float | None = None
    committed: int | None = None
    """The attempt whose commit was applied."""
    failed: int | None = None
    """The last attempt that its own worker reported as failed."""
    min_version: int | None = None
    max_version: int | None = None
    step: int | None = None
    """TAKEN, TRAINED: the step. DROPPED: the step that was being prepared."""
    reason: DropReason | None = None
    skipped: bool = False
    """Dropped because its step was skipped."""
    overtaken: int = 0
    """How many younger groups were taken before this one."""

    def to_state(self) -> dict[str, Any]:
        """As JSON values, without the fields that still have their default."""
        always = {"group_id": self.group_id, "version": self.version, "since": self.since}
        return always | {name: v for name, usual in _USUAL if (v := getattr(self, name)) != usual}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GroupEntry:
        """The inverse of `to_state`."""
        entry = cls(**state)
        entry.state = State(entry.state)
        entry.reason = None if entry.reason is None else DropReason(entry.reason)
        return entry


_USUAL = [(f.name, f.default) for f in dataclasses.fields(GroupEntry) if f.default is not dataclasses.MISSING]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSnapshot:
    """The balance at one moment: what ``ledger.json`` shows."""

    issued: int
    trained: int
    dropped: Mapping[str, int]
    """By reason; reasons that never occurred are absent."""
    live: Mapping[str, int]
    """By state; every live state is present."""
    fenced: int
    """Late or foreign transitions that were ignored."""
    reissued: int
    """Attempts beyond the first."""
    step: int
    """The last finished step, skipped ones included."""
    version: int
    """The learner's weight version; a skipped step publishes the same weights under the next one."""

    @property
    def live_total(self) -> int:
        """Groups that still have a fate ahead of them."""
        return sum(self.live.values())

    @property
    def dropped_total(self) -> int:
        """Groups that left without being trained."""
        return sum(self.dropped.values())

    @property
    def balanced(self) -> bool:
        """Whether ``issued == trained + dropped + live`` holds."""
        return self.issued == self.trained + self.dropped_total + self.live_total

    def with_bad_rows(self, count: int) -> LedgerSnapshot:
        """The same with so many rows of the dataset that no prompt could be made of, as groups issued and dropped."""
        if not count:
            return self
        return dataclasses.replace(
            self, issued=self.issued + count, dropped={**self.dropped, DropReason.BAD_ROW.value: count}
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values, in a fixed order of keys."""
        return {**dataclasses.asdict(self), "balanced": self.balanced}
