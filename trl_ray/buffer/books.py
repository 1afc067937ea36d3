"""The ledger's books: its entries, what follows from moving them, and the balance that proves that none was lost.

    live --settle--> settled --(slot: unreleased)--release--> settled --checkpoint--> forgotten, counted

Transitions are in `ledger.py`; here is what they write down, and what anybody may read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Self

from trl_ray.buffer.entry import (
    HELD,
    LIVE,
    BufferRules,
    Change,
    ChangeKind,
    GroupEntry,
    LedgerSnapshot,
    State,
    WaitingGroup,
)
from trl_ray.types import DropReason


class LedgerBooks:
    """Everything a ledger knows of its groups."""

    def __init__(self, rules: BufferRules) -> None:
        """Start empty, at step 0 and version 0."""
        self.rules = rules
        self.issued = 0
        self.step = 0
        """The last finished step."""
        self.version = 0
        """The learner's weight version; a skipped step publishes the same weights under the next one."""
        self.oldest_restorable = 0
        """Steps before this one can no longer be restored."""
        self.fenced = 0
        self.reissued = 0
        self._trained = 0
        self._dropped: Counter[DropReason] = Counter()
        self._released = 0
        # Both hold ascending group ids: groups are issued in order, and a restore sorts.
        self._live: dict[int, GroupEntry] = {}
        self._settled: dict[int, GroupEntry] = {}
        # Settled groups whose slot waits for a release: nothing else of the settled is looked at in every step.
        self._unreleased: dict[int, GroupEntry] = {}
        self.saved: set[int] = {0}
        """Steps that a restore may go back to, as far as the ledger was told; what they need of payloads is kept."""
        self._forgotten_trained = 0
        self._forgotten_dropped: Counter[DropReason] = Counter()
        self._changes: list[Change] = []

    # ---- moving entries -----------------------------------------------------------------------------------

    def _settle(self, entry: GroupEntry, state: State, now: float) -> None:
        self._move(entry, state, now)
        del self._live[entry.group_id]
        self._settled[entry.group_id] = entry
        if self._holds_slot(entry):
            self._unreleased[entry.group_id] = entry

    @staticmethod
    def _move(entry: GroupEntry, state: State, now: float) -> None:
        entry.state, entry.since = state, now

    def _note(self, kind: ChangeKind, entry: GroupEntry, because: str) -> None:
        self._changes.append(
            Change(
                kind=kind,
                group_id=entry.group_id,
                attempt=entry.attempt,
                because=because,
                worker=entry.worker,
                reason=entry.reason,
                frees_slot=kind is ChangeKind.RELEASED or (kind is ChangeKind.DROPPED and not entry.skipped),
            )
        )

    def drain_changes(self) -> list[Change]:
        """What was reissued, dropped and released since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    # ---- slots and payloads ---------------------------------------------------------------------------------

    def _holds_slot(self, entry: GroupEntry) -> bool:
        used = entry.state is State.TRAINED or entry.skipped
        return entry.state in LIVE or (used and (entry.step or 0) > self._released)

    def holders(self) -> list[int]:
        """The groups that hold a slot: live ones, and those of finished steps whose weights are not pulled yet."""
        return sorted([*self._live, *self._unreleased])

    def finished(self) -> list[int]:
        """The groups whose payload must still be known, ascending; see `needs_payload`."""
        return sorted(group_id for group_id in (*self._live, *self._settled) if self.needs_payload(group_id))

    def needs_payload(self, group_id: int) -> bool:
        """Whether the group is ready or taken, or would be ready again after a restore to a saved step.

        What was sampled after every saved step before its training is generated again by a restore in any case.
        """
        entry = self._live.get(group_id)
        if entry is not None:
            return entry.state in (State.READY, State.TAKEN)
        entry = self._settled.get(group_id)
        if entry is None or entry.max_version is None or not self.rules.reuse_finished:
            return False
        if entry.reason not in (None, DropReason.END_OF_RUN):
            return False
        # Every finished step makes one version.
        behind, youngest, used = self.version - self.step, entry.max_version, entry.step or 0
        return any(saved < used and youngest <= saved + behind for saved in self.saved)

    # ---- looking in --------------------------------------------------------------------------------------

    def waiting_on(self, *, count: int) -> list[WaitingGroup]:
        """Of the `count` oldest groups not yet taken, those that are not ready."""
        oldest = [e for e in self._live.values() if e.state is not State.TAKEN][:count]
        return [
            WaitingGroup(group_id=e.group_id, attempt=e.attempt, state=e.state, worker=e.worker, since=e.since)
            for e in oldest
            if e.state is not State.READY
        ]

    def state_of(self, group_id: int) -> State | None:
        """The group's state; None when it is unknown or forgotten."""
        entry = self._live.get(group_id) or self._settled.get(group_id)
        return None if entry is None else entry.state

    def snapshot(self) -> LedgerSnapshot:
        """The balance now."""
        states = Counter(entry.state for entry in self._live.values())
        return LedgerSnapshot(
            issued=self.issued,
            trained=self._trained,
            dropped={reason.value: self._dropped[reason] for reason in DropReason if self._dropped[reason]},
            live={state.value: states[state] for state in State if state in LIVE},
            fenced=self.fenced,
            reissued=self.reissued,
            step=self.step,
            version=self.version,
        )

    def check(self) -> None:
        """Prove the balance by counting every group again.

        Raises:
            AssertionError: a group was lost, counted twice, or is in an impossible state.
        """
        assert not self._live.keys() & self._settled.keys(), "A group must be either live or settled."
        reasons = Counter(e.reason for e in self._settled.values())
        trained = self._forgotten_trained + reasons.pop(None, 0)
        assert trained == self._trained, f"{trained} groups are trained, yet {self._trained} were counted."
        dropped = Counter({r: self._forgotten_dropped[r] + reasons[r] for r in DropReason})
        assert +dropped == +self._dropped, f"Dropped are {dropped}, yet {self._dropped} were counted."
        assert self.issued == trained + dropped.total() + len(self._live), (
            f"issued {self.issued} must equal trained {trained} + dropped {dropped.total()} + live {len(self._live)}."
        )
        assert list(self._live) == sorted(self._live), "Live groups must be in the order of their ids."
        held = {e.group_id for e in self._settled.values() if self._holds_slot(e)}
        noted = set(self._unreleased)
        assert held == noted, f"Groups {held} wait for a release, yet {noted} are noted."
        for entry in (*self._live.values(), *self._settled.values()):
            _check_entry(entry)

    @property
    def settled(self) -> list[GroupEntry]:
        """The settled groups that are not forgotten; an entry changes again in a restore only."""
        return list(self._settled.values())

    def to_state(self, *, settled: bool = True) -> dict[str, Any]:
        """Everything, as JSON values; changes that were not drained are not part of it.

        Args:
            settled: False leaves the settled groups to `load_settled`.
        """
        return {
            "issued": self.issued,
            "step": self.step,
            "version": self.version,
            "oldest_restorable": self.oldest_restorable,
            "fenced": self.fenced,
            "reissued": self.reissued,
            "released": self._released,
            "saved": sorted(self.saved),
            "forgotten_trained": self._forgotten_trained,
            "forgotten_dropped": {reason.value: count for reason, count in self._forgotten_dropped.items()},
            "live": [entry.to_state() for entry in self._live.values()],
            "settled": [entry.to_state() for entry in self._settled.values()] if settled else [],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, rules: BufferRules) -> Self:
        """The inverse of `to_state`."""
        ledger = cls(rules)
        ledger.issued, ledger.step, ledger.version = state["issued"], state["step"], state["version"]
        ledger.oldest_restorable = state["oldest_restorable"]
        ledger.fenced, ledger.reissued = state["fenced"], state["reissued"]
        ledger._released = state["released"]
        ledger._live = {entry["group_id"]: GroupEntry.from_state(entry) for entry in state["live"]}
        ledger._forgotten_trained = state["forgotten_trained"]
        ledger._forgotten_dropped = Counter({DropReason(k): v for k, v in state["forgotten_dropped"].items()})
        # Ledgers from before steps were noted as saved knew one: the oldest.
        ledger.saved = set(state.get("saved", [ledger.oldest_restorable]))
        # Counted again rather than stored, so that totals cannot disagree with groups.
        ledger._trained = ledger._forgotten_trained
        ledger._dropped = Counter(ledger._forgotten_dropped)
        ledger.load_settled(state["settled"])
        return ledger

    def load_settled(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take in settled groups that `to_state` left out."""
        for state in states:
            entry = GroupEntry.from_state(state)
            self._settled[entry.group_id] = entry
            if self._holds_slot(entry):
                self._unreleased[entry.group_id] = entry
            if entry.reason is None:
                self._trained += 1
            else:
                self._dropped[entry.reason] += 1


def _check_entry(entry: GroupEntry) -> None:
    held, state = entry.state in HELD, entry.state
    assert held == (entry.worker is not None) == (entry.expires_at is not None), f"Lease and state differ: {entry}."
    assert (state is State.DROPPED) == (entry.reason is not None), f"Reason and state differ: {entry}."
    assert (state in (State.TAKEN, State.TRAINED, State.DROPPED)) == (entry.step is not None), f"No step: {entry}."
    if state in (State.READY, State.TAKEN, State.TRAINED):
        assert entry.committed == entry.attempt and entry.min_version is not None, f"No payload: {entry}."
