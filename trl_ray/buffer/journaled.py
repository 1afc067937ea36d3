"""A ledger's state and the journal that it can be rebuilt from: writing a call down, replaying, compacting.

a call that changed something --_settle--> record {"op": call, "args": ...}         (`durable.py` has the calls)
records --_rebuild--> the same calls in the same order --> the same state
the state --begin_compaction--> base and parts in place of all records so far
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trl_ray.buffer.compaction import Compaction, split_blobs
from trl_ray.buffer.controller import SlotController
from trl_ray.buffer.entry import BufferRules, Change, ChangeKind, LedgerSnapshot, Outcome, WaitingGroup
from trl_ray.buffer.journal import Journal, Record
from trl_ray.buffer.ledger import Ledger
from trl_ray.buffer.news import News, NewsKind, apply_news
from trl_ray.buffer.payloads import Payloads, Place
from trl_ray.buffer.slots import AdmissionSlots
from trl_ray.errors import JournalError

T = TypeVar("T")

_REPLAYED = frozenset(
    [
        "lease",
        "renew",
        "renew_all",
        "expire",
        "lose_worker",
        "generated",
        "fail",
        "drop",
        "take",
        "trained",
        "skip",
        "release",
        "drop_stale",
        "finish",
        "checkpoint",
        "lose_payloads",
    ]
)

_OWN_REPLAY = frozenset(["report", "commit", "places", "restore"])
"""Records that hold something else than the arguments of the call."""


class JournaledState:
    """Ledger, slots, controller, prompts and the places of payloads, with their journal.

    NOTE: if the journal cannot be written, the call raises and so does every later one (`problem` says why).
    """

    def __init__(self, path: str | Path, rules: BufferRules) -> None:
        """Open and lock the journal; nothing is rebuilt yet.

        Raises:
            JournalError: another process has it open; it is no journal; or it is damaged before its end.
        """
        self.journal = Journal(path)
        self._payloads = Payloads(f"{path}.payloads")
        self.problem: str | None = None
        self.changes: list[Change] = []
        """Reissues and drops since the owner last cleared it; replay leaves none."""
        self._replaying: Record | None = None
        self._incarnations: list[str] = []
        self._prompt_ids: list[str] = []
        self._known: dict[str, int] = {}
        self._prompts: dict[int, bytes] = {}
        self._places: dict[int, Place] = {}
        self._inline: dict[int, int] = {}
        """Offsets of payloads inside the journal, where those of earlier versions kept them; empty once it is open."""
        self._compaction: Compaction | None = None
        self._set_up(rules)

    def _set_up(self, rules: BufferRules) -> None:
        self.rules = rules
        self.ledger = Ledger(rules)
        self._set_up_slots()

    def _set_up_slots(self) -> None:
        rules = self.rules
        self.slots = AdmissionSlots(rules)
        self.controller = SlotController(groups_per_step=rules.groups_per_step, capacity=rules.capacity)

    # ---- looking in --------------------------------------------------------------------------------------

    def prompt(self, group_id: int) -> bytes:
        """The bytes that were admitted for this group."""
        return self._prompts[group_id]

    def payload(self, group_id: int) -> bytes:
        """The bytes that were committed for this group.

        Raises:
            JournalError: the file no longer holds them intact.
        """
        place = self._places.get(group_id)
        if place is None:
            return self.journal.read(self._inline[group_id]).payload
        return self._payloads.read(place)

    def _is_intact(self, group_id: int) -> bool:
        place = self._places.get(group_id)
        # A record was checked when the journal was opened.
        return group_id in self._inline if place is None else self._payloads.is_intact(place)

    def snapshot(self) -> LedgerSnapshot:
        return self.ledger.snapshot()

    def waiting_on(self, *, count: int) -> list[WaitingGroup]:
        return self.ledger.waiting_on(count=count)

    def check(self) -> None:
        """Prove that the ledger balances and that slots and payloads agree with it.

        Raises:
            AssertionError: they do not.
        """
        self.ledger.check()
        holders = self.ledger.holders()
        assert self.slots.charged == set(holders), f"{sorted(self.slots.charged)} hold slots, expected {holders}."
        missing = [g for g in self.ledger.finished() if g not in self._places and g not in self._inline]
        assert not missing, f"Groups that may be trained again must keep their payload, {missing} have none."
        assert len(self._prompt_ids) == len(self._known) == self.ledger.issued, "Every group has one prompt id."

    def close(self) -> None:
        """Give up the journal; a second call does nothing."""
        self.abandon_compaction()
        self._payloads.close()
        self.journal.close()

    # ---- writing -----------------------------------------------------------------------------------------

    def _answer(self, outcome: Outcome, op: str, **args: Any) -> Outcome:
        return self._settle(outcome, outcome is not Outcome.REPEATED, op, **args)

    def _settle(self, answer: T, changed: bool, op: str, **args: Any) -> T:
        """Pass the consequences on, write the call down if it changed anything, and answer."""
        changes = self.ledger.drain_changes()
        self.slots.discharge(change.group_id for change in changes if change.frees_slot)
        if changed:
            self._log(op, args)
        if self._replaying is None:
            self.changes.extend(c for c in changes if c.kind is not ChangeKind.RELEASED)
        return answer

    def _log(self, op: str, args: Mapping[str, Any], payload: bytes = b"", **extra: Any) -> None:
        if self._replaying is None:
            self._guard(lambda: self.journal.append({"op": op, "args": args, **extra}, payload))

    def _guard(self, write: Callable[[], T]) -> T:
        """Write, unless an earlier write failed: then memory is ahead of the file, and only a restart may go on."""
        if self.problem is not None:
            raise JournalError(f"The ledger must be rebuilt from its journal after: {self.problem}")
        try:
            return write()
        except JournalError as error:
            self.problem = str(error)
            raise

    def _sync_after(self, outcome: Outcome, sync: bool) -> Outcome:
        if sync and outcome is Outcome.APPLIED and self._replaying is None:
            self.sync()
        return outcome

    def sync(self, waited: JournalError | bool = False) -> None:
        """Wait for the disk; then delete what nobody needs any more.

        Args:
            waited: True when the caller has waited on another thread (`Journal.sync_waiter`), or what came of it.

        Raises:
            JournalError: the disk reports that it could not be written.
        """

        def result() -> None:
            if isinstance(waited, JournalError):
                raise waited

        self._guard(result if waited else self.journal.sync)
        self._forget_payloads()

    def _forget_payloads(self) -> None:
        """Let go of the payloads that no restore would need.

        Not in a replay: what was kept at the time is known only once it has ended.
        """
        if self._replaying is None:
            needed = self.ledger.needs_payload
            self._places = {group_id: place for group_id, place in self._places.items() if needed(group_id)}
            self._payloads.keep(self._places.values())

    # ---- compacting --------------------------------------------------------------------------------------

    def begin_compaction(self) -> Compaction:
        """A shorter journal that stands for the present state: `run` it on any thread, then `end_compaction`."""
        self.abandon_compaction()
        self._guard(lambda: None)  # a state that is ahead of its journal must not outlive this process
        head = {
            "op": "base",
            "rules": self.rules.to_state(),
            "incarnations": list(self._incarnations),
            "prompt_ids": [],
            "ledger": self.ledger.to_state(settled=False),
            "controller": self.controller.to_state(),
            "limit": self.slots.limit,
            "prompts": [],
            "sizes": [],
            "payloads": 0,
            "places": list(self._places.items()),
        }
        self._compaction = Compaction(
            self.journal,
            head=head,
            prompt_ids=self._prompt_ids,
            settled=self.ledger.settled,
            prompts=self._prompts,
        )
        return self._compaction

    def end_compaction(self, compaction: Compaction) -> bool:
        """Put the new journal in place; False when it was abandoned for a restore or another one.

        Raises:
            JournalError: it could not be written; the old one goes on.
        """
        if self._compaction is compaction:
            self._compaction = None
        return compaction.finish()

    def abandon_compaction(self) -> None:
        """Stop the one under way, if there is any."""
        if self._compaction is not None:
            self._compaction.abandon()
            self._compaction = None

    # ---- rebuilding --------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        expected = 0
        for record in self.journal.records():
            self._replaying = record
            op = record.head["op"]
            if op == "base":
                expected = self._load_base(record)
            elif op == "part":
                self._load_part(record)
                expected -= 1
            elif op == "payload":
                self._inline[record.head["group_id"]] = record.offset
                expected -= 1
            else:
                self._replay(op, record)
            if expected == 0 and op in ("base", "part", "payload"):  # with the last of them earlier versions ended
                self.slots.reset(self.ledger.holders())
        self._replaying = None
        if expected > 0:
            raise JournalError(
                f"The journal {self.journal.path} must begin with a whole snapshot, and {expected} of its records "
                "are missing. Restore the file from a copy, or start a new run from the last checkpoint."
            )

    def _move_payloads_out_of_the_journal(self) -> None:
        """Journals of earlier versions hold the payloads themselves, and are about to be rewritten without them."""
        ids = [g for g in self._inline if g not in self._places and self.ledger.needs_payload(g)]
        if ids:
            places = self._payloads.append([self.payload(group_id) for group_id in ids])
            self._places.update(zip(ids, places, strict=True))
            self._log("places", {"places": [*zip(ids, places, strict=True)]})
        self._inline.clear()

    def _load_base(self, record: Record) -> int:
        head = record.head
        self._set_up(BufferRules.from_state(head["rules"]))
        self.ledger = Ledger.from_state(head["ledger"], rules=self.rules)
        self.controller.load_state(head["controller"])
        self.slots.limit = head["limit"]
        self._incarnations = list(head["incarnations"])
        self._prompt_ids = list(head["prompt_ids"])
        self._known = {name: group_id for group_id, name in enumerate(self._prompt_ids)}
        self._prompts = dict(zip(head["prompts"], split_blobs(record.payload, head["sizes"]), strict=True))
        self._inline.clear()
        self._places.clear()
        self._replay_places(None, places=head.get("places", ()))
        return int(head["payloads"]) + int(head.get("parts", 0))

    def _load_part(self, record: Record) -> None:
        head = record.head
        for name in head.get("prompt_ids", ()):
            self._known[name] = len(self._prompt_ids)
            self._prompt_ids.append(name)
        self.ledger.load_settled(head.get("settled", ()))
        if "prompts" in head:
            self._prompts.update(zip(head["prompts"], split_blobs(record.payload, head["sizes"]), strict=True))

    def _load_copy(self, head: Mapping[str, Any]) -> None:
        """What a checkpoint kept of the ledger, for a journal that was lost: without payloads."""
        self._set_up(BufferRules.from_state(head["rules"]))
        self.ledger = Ledger.from_state(head["ledger"], rules=self.rules)
        self.controller.load_state(head["controller"])
        self.slots.limit = head["limit"]
        self.slots.reset(self.ledger.holders())
        self._incarnations = [head["incarnation"]]
        self._prompt_ids = list(head["prompt_ids"])
        self._known = {name: group_id for group_id, name in enumerate(self._prompt_ids)}
        self._prompts = {int(group_id): base64.b64decode(text) for group_id, text in head["prompts"].items()}

    def _replay(self, op: str, record: Record) -> None:
        try:
            if op == "open":
                self._set_up(BufferRules.from_state(record.head["rules"]))
                self._incarnations = [record.head["incarnation"]]
            elif op == "copy":
                self._load_copy(record.head)
            elif op == "admit":
                prompts = split_blobs(record.payload, record.head["sizes"])
                getattr(self, op)(prompts=prompts, **record.head["args"])
            elif op in _REPLAYED:
                getattr(self, op)(**record.head["args"])
            elif op in _OWN_REPLAY:
                getattr(self, f"_replay_{op}")(record, **record.head["args"])
            else:
                raise ValueError(f"unknown operation {op!r}")
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"The record at byte {record.offset} of the journal {self.journal.path} does not follow from those "
                f"before it: {error}. Start a new run from the last checkpoint."
            ) from error

    def _replay_report(self, record: Record, *, news: Sequence[Any], places: Sequence[Any], now: float) -> None:
        del record
        for state in news:
            apply_news(self.ledger, News.from_state(state), now)
        self._replay_places(None, places=places)
        self._settle(None, False, "report")

    def _replay_places(self, record: Record | None, *, places: Sequence[Any]) -> None:
        del record
        for group_id, place in places:
            self._places[group_id] = Place(*place)
            self._payloads.reserve(self._places[group_id])

    def _replay_commit(self, record: Record, **args: Any) -> None:
        """Of earlier versions."""
        now = args.pop("now")
        if apply_news(self.ledger, News(kind=NewsKind.COMMITTED, **args), now) is Outcome.APPLIED:
            self._places.pop(args["group_id"], None)
            self._inline[args["group_id"]] = record.offset
        self._settle(None, False, "commit")
