"""Ledger, slots and controller behind one journal: every change is written down before it is answered.

    call --> ledger, slots, controller --> journal record {"op": call, "args": ...} --> answer
    restart: journal --> the same calls in the same order --> the same state

It stores prompts and groups as opaque bytes: prompts in memory, groups as offsets into the journal. Everything
is deterministic given the arguments (time among them), which is what makes replay exact.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trl_ray.buffer.controller import SlotController
from trl_ray.buffer.entry import (
    BufferRules,
    Change,
    ChangeKind,
    LeaseKey,
    LedgerSnapshot,
    Outcome,
    State,
    WaitingGroup,
)
from trl_ray.buffer.journal import Journal, JournalDraft, Record
from trl_ray.buffer.ledger import Ledger
from trl_ray.buffer.slots import AdmissionSlots
from trl_ray.errors import JournalError
from trl_ray.types import DropReason

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
        "restore",
    ]
)


class DurableLedger:
    """The ledger that survives its process.

        ledger = DurableLedger(path=path, rules=rules, incarnation="job-1", now=now)
        ledger.admit(prompt_ids=["0:0"], prompts=[b"..."], version=0, now=now)
        ledger.commit(..., payload=b"...")
        ledger.payload(group_id)

    An incarnation is one submission of the job. The same incarnation again is a restart of the process: the
    journal is replayed and leases get a fresh term. A new incarnation is a resume and must say from which step.
    NOTE: if the journal cannot be written, the call raises and so does every later one (`problem` says why).
    """

    def __init__(
        self,
        *,
        path: str | Path,
        rules: BufferRules,
        incarnation: str,
        now: float,
        resume_from_step: int | None = None,
        resume_version: int | None = None,
        copy: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the journal and rebuild from it.

        With a `copy`, as `copy_of` makes it, a journal that is empty goes on from there.

        Raises:
            JournalError: the journal is locked, damaged, of another run, or does not reach the step to resume.
        """
        self.journal = Journal(path)
        self.problem: str | None = None
        self.changes: list[Change] = []
        """Reissues and drops since the owner last cleared it; replay leaves none."""
        self._replaying: Record | None = None
        self._incarnations: list[str] = []
        self._prompt_ids: list[str] = []
        self._known: dict[str, int] = {}
        self._prompts: dict[int, bytes] = {}
        self._offsets: dict[int, int] = {}
        self._set_up(rules)
        try:
            self._rebuild()
            if copy is not None and not self._incarnations:
                self._begin_from(copy, rules, incarnation)
            self._enter(rules, incarnation, now, resume_from_step, resume_version)
        except BaseException:
            self.journal.close()
            raise

    def _set_up(self, rules: BufferRules) -> None:
        self.rules = rules
        self.ledger = Ledger(rules)
        self._set_up_slots()

    def _set_up_slots(self) -> None:
        rules = self.rules
        self.slots = AdmissionSlots(rules)
        self.controller = SlotController(groups_per_step=rules.groups_per_step, capacity=rules.capacity)

    # ---- admission ---------------------------------------------------------------------------------------

    @property
    def next_ordinal(self) -> int:
        """How many prompts were ever admitted."""
        return self.ledger.issued

    def admit(self, *, prompt_ids: Sequence[str], prompts: Sequence[bytes], version: int, now: float) -> list[int]:
        """Charge a slot and issue a group per prompt, all or none; return the group ids in the given order.

        A prompt id that was admitted before keeps its group and is charged nothing, so a call whose answer was
        lost can be made again.
        """
        new = {name: blob for name, blob in zip(prompt_ids, prompts, strict=True) if name not in self._known}
        if new:
            self.slots.charge(range(self.ledger.issued, self.ledger.issued + len(new)))
            ids = self.ledger.issue(count=len(new), version=version, now=now)
            self._prompt_ids.extend(new)
            self._known.update(zip(new, ids, strict=True))
            self._prompts.update(zip(ids, new.values(), strict=True))
            args = {"prompt_ids": list(new), "version": version, "now": now}
            sizes = [len(blob) for blob in new.values()]
            self._log("admit", args, payload=b"".join(new.values()), sizes=sizes)
        return [self._known[name] for name in prompt_ids]

    # ---- leases ------------------------------------------------------------------------------------------

    def lease(self, *, worker: str, count: int, now: float) -> list[LeaseKey]:
        """After a restore only the oldest B groups are leased (see `AdmissionSlots`)."""
        keys = self.ledger.lease(worker=worker, count=count, now=now, horizon=self.slots.horizon)
        return self._settle(keys, bool(keys), "lease", worker=worker, count=count, now=now)

    def renew(self, *, worker: str, keys: Iterable[Sequence[int]], now: float) -> int:
        pairs = [(int(group_id), int(attempt)) for group_id, attempt in keys]
        standing = self.ledger.renew(worker=worker, keys=pairs, now=now)
        return self._settle(standing, standing > 0, "renew", worker=worker, keys=pairs, now=now)

    def renew_all(self, *, now: float) -> None:
        self.ledger.renew_all(now=now)
        self._settle(None, True, "renew_all", now=now)

    def expire(self, *, now: float) -> list[int]:
        lost = self.ledger.expire(now=now)
        return self._settle(lost, bool(lost), "expire", now=now)

    def lose_worker(self, *, worker: str, now: float) -> list[int]:
        lost = self.ledger.lose_worker(worker=worker, now=now)
        return self._settle(lost, bool(lost), "lose_worker", worker=worker, now=now)

    # ---- the way of one attempt --------------------------------------------------------------------------

    def generated(self, *, group_id: int, attempt: int, now: float) -> Outcome:
        outcome = self.ledger.generated(group_id=group_id, attempt=attempt, now=now)
        return self._answer(outcome, "generated", group_id=group_id, attempt=attempt, now=now)

    def commit(
        self, *, group_id: int, attempt: int, min_version: int, max_version: int, payload: bytes, now: float
    ) -> Outcome:
        """The attempt is scored and ready: store its payload. See `Ledger.commit`."""
        args = {
            "group_id": group_id,
            "attempt": attempt,
            "min_version": min_version,
            "max_version": max_version,
            "now": now,
        }
        outcome = self.ledger.scored(group_id=group_id, attempt=attempt, now=now)
        if outcome is not Outcome.FENCED:
            outcome = self.ledger.commit(
                group_id=group_id, attempt=attempt, min_version=min_version, max_version=max_version, now=now
            )
        if outcome is Outcome.APPLIED:
            self._offsets[group_id] = self._log("commit", args, payload=payload)
        elif outcome is Outcome.FENCED:
            self._log("commit", args)
        return outcome

    def fail(
        self, *, group_id: int, attempt: int, because: str, now: float, exhausted: str = DropReason.RETRIES_EXHAUSTED
    ) -> Outcome:
        key: dict[str, Any] = {"group_id": group_id, "attempt": attempt, "because": because, "now": now}
        outcome = self.ledger.fail(**key, exhausted=DropReason(exhausted))
        return self._answer(outcome, "fail", **key, exhausted=exhausted)

    def drop(self, *, group_id: int, attempt: int, reason: str, because: str, now: float) -> Outcome:
        key: dict[str, Any] = {"group_id": group_id, "attempt": attempt, "because": because, "now": now}
        outcome = self.ledger.drop(**key, reason=DropReason(reason))
        return self._answer(outcome, "drop", **key, reason=reason)

    # ---- steps -------------------------------------------------------------------------------------------

    def take(self, *, count: int, step: int, now: float) -> list[int]:
        """The payloads are read with `payload`."""
        again = bool(self.ledger.groups_of(step))
        taken = self.ledger.take(count=count, step=step, now=now)
        return self._settle(taken, bool(taken) and not again, "take", count=count, step=step, now=now)

    def trained(self, *, step: int, now: float) -> Outcome:
        """Durable, so that a checkpoint never outlives its ledger in a power cut."""
        outcome = self._answer(self.ledger.trained(step=step, now=now), "trained", step=step, now=now)
        return self._sync_after(outcome)

    def skip(self, *, step: int, now: float) -> Outcome:
        """Durable like `trained`."""
        return self._sync_after(self._answer(self.ledger.skip(step=step, now=now), "skip", step=step, now=now))

    def release(self, *, step: int, wait_s: float, step_s: float) -> Outcome:
        """Then the controller learns how the step went."""
        outcome = self.ledger.release(step=step)
        if outcome is Outcome.APPLIED and self.rules.adaptive_slots:
            ready = self.ledger.snapshot().live[State.READY]
            self.slots.limit = self.controller.observe(wait_s=wait_s, step_s=step_s, ready=ready)
        return self._answer(outcome, "release", step=step, wait_s=wait_s, step_s=step_s)

    def drop_stale(self, *, now: float) -> list[int]:
        stale = self.ledger.drop_stale(now=now)
        return self._settle(stale, bool(stale), "drop_stale", now=now)

    def finish(self, *, now: float) -> list[int]:
        left = self.ledger.finish(now=now)
        return self._settle(left, bool(left), "finish", now=now)

    # ---- checkpoints -------------------------------------------------------------------------------------

    def checkpoint(self, *, step: int) -> None:
        """Steps up to `step` are final: forget their groups, and rewrite the journal without them, durably."""
        for group_id in self.ledger.checkpoint(step=step):
            self._prompts.pop(group_id, None)
            self._offsets.pop(group_id, None)
        if self._replaying is None:
            self._guard(self._compact)

    def restore(
        self,
        *,
        step: int,
        version: int | None,
        mark: str,
        now: float,
        rules: BufferRules | Mapping[str, Any] | None = None,
    ) -> bool:
        """Go back to the end of `step`, once per `mark`; return whether this call did it. See `Ledger.restore`.

        Raises:
            JournalError: the journal does not know what `step` had trained.
        """
        if mark in self._incarnations:
            return False
        if rules is not None:
            self.rules = rules if isinstance(rules, BufferRules) else BufferRules.from_state(rules)
            self.ledger.rules = self.rules
        try:
            self.ledger.restore(step=step, version=version, now=now)
        except ValueError as error:
            raise JournalError(f"{self.journal.path} cannot go back to step {step}. {error}") from error
        self._incarnations.append(mark)
        self._set_up_slots()
        self.slots.reset(self.ledger.holders())
        for group_id in [g for g in self._offsets if self.ledger.state_of(g) is State.ISSUED]:
            del self._offsets[group_id]
        args = {"step": step, "version": version, "mark": mark, "now": now, "rules": self.rules.to_state()}
        return self._settle(True, True, "restore", **args)

    def copy_of(self, *, step: int, now: float) -> dict[str, Any]:
        """The ledger as a run needs it that goes back to `step` without this journal; JSON values.

        It has no payloads: what was live then is generated again.

        Raises:
            ValueError: as `Ledger.restore`.
        """
        rules = replace(self.rules, reuse_finished=False)
        ledger = Ledger.from_state(self.ledger.to_state(), rules=rules)
        ledger.restore(step=step, version=None, now=now)
        ledger.checkpoint(step=step)
        prompts = {group_id: base64.b64encode(self._prompts[group_id]).decode() for group_id in ledger.holders()}
        return {
            "step": step,
            "ledger": ledger.to_state(),
            "controller": self.controller.to_state(),
            "limit": self.slots.limit,
            "prompt_ids": self._prompt_ids,
            "prompts": prompts,
        }

    def _begin_from(self, copy: Mapping[str, Any], rules: BufferRules, incarnation: str) -> None:
        """One record, so that a process that dies meanwhile leaves a journal that is empty or whole."""
        head = {**copy, "rules": rules.to_state(), "incarnation": incarnation}
        self._load_copy(head)
        self._log("copy", {}, **{key: value for key, value in head.items() if key != "op"})

    def _load_copy(self, head: Mapping[str, Any]) -> None:
        self._set_up(BufferRules.from_state(head["rules"]))
        self.ledger = Ledger.from_state(head["ledger"], rules=self.rules)
        self.controller.load_state(head["controller"])
        self.slots.limit = head["limit"]
        self.slots.reset(self.ledger.holders())
        self._incarnations = [head["incarnation"]]
        self._prompt_ids = list(head["prompt_ids"])
        self._known = {name: group_id for group_id, name in enumerate(self._prompt_ids)}
        self._prompts = {int(group_id): base64.b64decode(text) for group_id, text in head["prompts"].items()}

    # ---- looking in --------------------------------------------------------------------------------------

    def prompt(self, group_id: int) -> bytes:
        """The bytes that were admitted for this group."""
        return self._prompts[group_id]

    def payload(self, group_id: int) -> bytes:
        """The bytes that were committed for this group.

        Raises:
            JournalError: the file no longer holds them intact.
        """
        return self.journal.read(self._offsets[group_id]).payload

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
        missing = [group_id for group_id in self.ledger.finished() if group_id not in self._offsets]
        assert not missing, f"Finished groups must keep their payload until a checkpoint, {missing} have none."
        assert len(self._prompt_ids) == len(self._known) == self.ledger.issued, "Every group has one prompt id."

    def close(self) -> None:
        """Give up the journal; a second call does nothing."""
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

    def _log(self, op: str, args: Mapping[str, Any], payload: bytes = b"", **extra: Any) -> int:
        if self._replaying is not None:
            return self._replaying.offset
        return self._guard(lambda: self.journal.append({"op": op, "args": args, **extra}, payload))

    def _guard(self, write: Callable[[], T]) -> T:
        """Write, unless an earlier write failed: then memory is ahead of the file, and only a restart may go on."""
        if self.problem is not None:
            raise JournalError(f"The ledger must be rebuilt from its journal after: {self.problem}")
        try:
            return write()
        except JournalError as error:
            self.problem = str(error)
            raise

    def _sync_after(self, outcome: Outcome) -> Outcome:
        if outcome is Outcome.APPLIED and self._replaying is None:
            self._guard(self.journal.sync)
        return outcome

    def _compact(self) -> None:
        owners = list(self._offsets)
        drafts = [self._base_draft(len(owners))]
        offsets = self.journal.compact(self._with_payloads(drafts, owners))
        self._offsets = dict(zip(owners, offsets[1:], strict=True))

    def _base_draft(self, payloads: int) -> JournalDraft:
        """One record with everything but the groups' payloads, which follow it as `payloads` records."""
        head = {
            "op": "base",
            "rules": self.rules.to_state(),
            "incarnations": self._incarnations,
            "prompt_ids": self._prompt_ids,
            "ledger": self.ledger.to_state(),
            "controller": self.controller.to_state(),
            "limit": self.slots.limit,
            "prompts": list(self._prompts),
            "sizes": [len(blob) for blob in self._prompts.values()],
            "payloads": payloads,
        }
        return JournalDraft(head=head, payload=b"".join(self._prompts.values()))

    def _with_payloads(self, drafts: list[JournalDraft], owners: list[int]) -> Iterator[JournalDraft]:
        yield from drafts
        for group_id in owners:
            yield JournalDraft(head={"op": "payload", "group_id": group_id}, payload=self.payload(group_id))

    # ---- rebuilding --------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        expected = 0
        for record in self.journal.records():
            self._replaying = record
            op = record.head["op"]
            if op == "base":
                expected = self._load_base(record)
            elif op == "payload":
                self._offsets[record.head["group_id"]] = record.offset
                expected -= 1
            else:
                self._replay(op, record)
        self._replaying = None
        if expected > 0:
            raise JournalError(
                f"The journal {self.journal.path} must begin with a whole snapshot, and {expected} of its records "
                "are missing. Restore the file from a copy, or start a new run from the last checkpoint."
            )

    def _load_base(self, record: Record) -> int:
        head = record.head
        self._set_up(BufferRules.from_state(head["rules"]))
        self.ledger = Ledger.from_state(head["ledger"], rules=self.rules)
        self.controller.load_state(head["controller"])
        self.slots.limit = head["limit"]
        self.slots.reset(self.ledger.holders())
        self._incarnations = list(head["incarnations"])
        self._prompt_ids = list(head["prompt_ids"])
        self._known = {name: group_id for group_id, name in enumerate(self._prompt_ids)}
        self._prompts = dict(zip(head["prompts"], _split(record.payload, head["sizes"]), strict=True))
        return int(head["payloads"])

    def _replay(self, op: str, record: Record) -> None:
        try:
            if op == "open":
                self._set_up(BufferRules.from_state(record.head["rules"]))
                self._incarnations = [record.head["incarnation"]]
            elif op == "copy":
                self._load_copy(record.head)
            elif op == "admit":
                prompts = _split(record.payload, record.head["sizes"])
                self.admit(prompts=prompts, **record.head["args"])
            elif op == "commit":
                self.commit(payload=record.payload, **record.head["args"])
            elif op in _REPLAYED:
                getattr(self, op)(**record.head["args"])
            else:
                raise ValueError(f"unknown operation {op!r}")
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"The record at byte {record.offset} of the journal {self.journal.path} does not follow from those "
                f"before it: {error}. Start a new run from the last checkpoint."
            ) from error

    def _enter(self, rules: BufferRules, incarnation: str, now: float, step: int | None, version: int | None) -> None:
        """Decide between a new run, a restart and a resume."""
        path = self.journal.path
        if not self._incarnations and not step:
            self._incarnations.append(incarnation)
            self._log("open", {}, rules=rules.to_state(), incarnation=incarnation)
        elif not self._incarnations:
            raise JournalError(f"To resume from step {step}, {path} must hold the ledger of the run, and it is empty.")
        elif incarnation in self._incarnations:
            if rules != self.rules:
                raise JournalError(f"A restarted ledger must keep its rules {self.rules}, got {rules}.")
            self.renew_all(now=now)
        elif step is None:
            raise JournalError(
                f"{path} holds the ledger of another run ({self._incarnations[-1]}). Resume that run, or choose "
                "another run directory."
            )
        else:
            self.restore(step=step, version=version, mark=incarnation, now=now, rules=rules)
            self.changes.clear()


def _split(payload: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = list(itertools.accumulate(sizes))
    assert (ends[-1] if ends else 0) == len(payload), f"Sizes {sizes} must add up to {len(payload)} bytes."
    return [payload[end - size : end] for end, size in zip(ends, sizes, strict=True)]
