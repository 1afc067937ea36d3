"""Ledger, slots and controller behind one journal: every change is written down before it is answered.

    call --> ledger, slots, controller --> journal record {"op": call, "args": ...} --> answer
    restart: journal --> the same calls in the same order --> the same state

It stores prompts and groups as opaque bytes: prompts in memory and in the journal, groups beside it (`Payloads`).
Everything is deterministic given the arguments (time among them), which is what makes replay exact.

What is durable when:

* An answered call survives the death of its process: payloads and records are with the operating system by then.
* A finished step survives a power cut before it is answered: one wait for the disk a step, for the journal alone.
* A payload is never waited for. Whether one is intact is seen when it is needed again, at a restart or a restore; a
  group whose payload is not is issued again, as one whose worker was lost.
* Payloads are deleted after the record that makes them needless has reached the disk.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trl_ray.buffer.entry import (
    BufferRules,
    LeaseKey,
    Outcome,
    State,
)
from trl_ray.buffer.journal import Record
from trl_ray.buffer.journaled import JournaledState
from trl_ray.buffer.ledger import Ledger
from trl_ray.buffer.news import News, NewsKind, apply_news
from trl_ray.errors import JournalError
from trl_ray.types import DropReason

T = TypeVar("T")


class DurableLedger(JournaledState):
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
        copy: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Open the journal and rebuild from it.

        With a `copy`, which reads what `copy_of` has made, a journal that is empty goes on from there. It is not read
        for any other: what it lies in may be gone by then.

        Raises:
            JournalError: the journal is locked, damaged, of another run, or does not reach the step to resume.
        """
        super().__init__(path, rules)
        try:
            self._rebuild()
            if copy is not None and not self._incarnations:
                self._begin_from(copy(), rules, incarnation)
            self._enter(rules, incarnation, now, resume_from_step, resume_version)
            self._move_payloads_out_of_the_journal()
            self._forget_payloads()
        except BaseException:
            self.close()
            raise

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

    def lease(self, *, worker: str, count: int, now: float, version: int | None = None) -> list[LeaseKey]:
        """After a restore only the oldest B groups are leased (see `AdmissionSlots`)."""
        asked: dict[str, Any] = {"worker": worker, "count": count, "now": now, "version": version}
        keys = self.ledger.lease(**asked, horizon=self.slots.horizon)
        return self._settle(keys, bool(keys), "lease", **asked)

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

    def report(self, *, news: Sequence[News], now: float) -> list[Outcome]:
        """Take in what workers tell of their attempts, in this order and in one record; what became of each.

        Payloads are written before the record that names them.
        """
        outcomes = [apply_news(self.ledger, each, now) for each in news]
        told = [pair for pair in zip(news, outcomes, strict=True) if pair[1] is not Outcome.REPEATED]
        stored = [n for n, outcome in told if n.kind is NewsKind.COMMITTED and outcome is Outcome.APPLIED]
        places = self._guard(lambda: self._payloads.append([each.payload for each in stored]))
        ids = [each.group_id for each in stored]
        self._places.update(zip(ids, places, strict=True))
        states = [each.to_state() for each, _ in told]
        return self._settle(
            outcomes, bool(told), "report", news=states, places=[*zip(ids, places, strict=True)], now=now
        )

    def generated(self, *, group_id: int, attempt: int, now: float) -> Outcome:
        return self._tell(News(kind=NewsKind.GENERATED, group_id=group_id, attempt=attempt), now)

    def commit(
        self, *, group_id: int, attempt: int, min_version: int, max_version: int, payload: bytes, now: float
    ) -> Outcome:
        """The attempt is scored and ready: store its payload. See `Ledger.commit`."""
        versions = {"min_version": min_version, "max_version": max_version}
        key: dict[str, Any] = {"group_id": group_id, "attempt": attempt, **versions}
        return self._tell(News(kind=NewsKind.COMMITTED, **key, payload=payload), now)

    def fail(
        self, *, group_id: int, attempt: int, because: str, now: float, exhausted: str = DropReason.RETRIES_EXHAUSTED
    ) -> Outcome:
        key: dict[str, Any] = {"group_id": group_id, "attempt": attempt, "because": because}
        return self._tell(News(kind=NewsKind.FAILED, **key, reason=DropReason(exhausted)), now)

    def drop(self, *, group_id: int, attempt: int, reason: str, because: str, now: float) -> Outcome:
        key: dict[str, Any] = {"group_id": group_id, "attempt": attempt, "because": because}
        return self._tell(News(kind=NewsKind.DROPPED, **key, reason=DropReason(reason)), now)

    def _tell(self, news: News, now: float) -> Outcome:
        return self.report(news=[news], now=now)[0]

    # ---- steps -------------------------------------------------------------------------------------------

    def take(self, *, count: int, step: int, now: float) -> list[int]:
        """The payloads are read with `payload`."""
        again = bool(self.ledger.groups_of(step))
        taken = self.ledger.take(count=count, step=step, now=now)
        return self._settle(taken, bool(taken) and not again, "take", count=count, step=step, now=now)

    def trained(self, *, step: int, now: float, sync: bool = True) -> Outcome:
        """Durable, so that a checkpoint never outlives its ledger in a power cut.

        Args:
            step: the step that is finished.
            now: seconds since the epoch.
            sync: False leaves waiting for the disk, and what may be forgotten then, to `sync`.
        """
        outcome = self._answer(self.ledger.trained(step=step, now=now), "trained", step=step, now=now)
        return self._sync_after(outcome, sync)

    def skip(self, *, step: int, now: float, sync: bool = True) -> Outcome:
        """Durable like `trained`."""
        outcome = self._answer(self.ledger.skip(step=step, now=now), "skip", step=step, now=now)
        return self._sync_after(outcome, sync)

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

    def checkpoint(self, *, step: int, saved: int | None = None, compact: bool = True) -> None:
        """Steps up to `step` are final: forget their groups, and rewrite the journal without them, durably.

        Args:
            step: the oldest step that a restore may go back to.
            saved: a younger step that has a checkpoint as well: payloads that it would need are kept.
            compact: False leaves the journal to `begin_compaction`.
        """
        for group_id in self.ledger.checkpoint(step=step, saved=saved):
            self._prompts.pop(group_id, None)
        self._log("checkpoint", {"step": step, "saved": saved})
        if self._replaying is None and compact:
            compaction = self.begin_compaction()
            compaction.run()
            self.end_compaction(compaction)
            self._forget_payloads()

    def restore(
        self,
        *,
        step: int,
        version: int | None,
        mark: str,
        now: float,
        rules: BufferRules | Mapping[str, Any] | None = None,
        lost: Sequence[int] | None = None,
    ) -> bool:
        """Go back to the end of `step`, once per `mark`; return whether this call did it. See `Ledger.restore`.

        Args:
            step: the step to go back to.
            version: its weight version; None means `step`.
            mark: names this restore.
            now: seconds since the epoch.
            rules: those that hold from now on; None keeps the present ones.
            lost: groups whose payload was found missing, in a replay; None looks.

        Raises:
            JournalError: the journal does not know what `step` had trained.
        """
        if mark in self._incarnations:
            return False
        self.abandon_compaction()  # it reads entries that change now
        if rules is not None:
            self.rules = rules if isinstance(rules, BufferRules) else BufferRules.from_state(rules)
            self.ledger.rules = self.rules
        missing: list[int] = []

        def has_payload(group_id: int) -> bool:
            there = self._is_intact(group_id) if self._replaying is None else group_id not in (lost or ())
            if not there:
                missing.append(group_id)
            return there

        try:
            self.ledger.restore(step=step, version=version, now=now, has_payload=has_payload)
        except ValueError as error:
            raise JournalError(f"{self.journal.path} cannot go back to step {step}. {error}") from error
        self._incarnations.append(mark)
        self._set_up_slots()
        self.slots.reset(self.ledger.holders())
        args = {"step": step, "version": version, "mark": mark, "now": now, "rules": self.rules.to_state()}
        done = self._settle(True, True, "restore", **args, lost=missing)
        if self._replaying is None:
            self.sync()
        return done

    def lose_payloads(self, *, group_ids: Sequence[int], now: float) -> None:
        """What was stored of these ready groups is damaged: issue them again."""
        self.ledger.lose_payloads(group_ids=group_ids, now=now)
        self._settle(None, bool(group_ids), "lose_payloads", group_ids=group_ids, now=now)

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

    # ---- opening -----------------------------------------------------------------------------------------

    def _begin_from(self, copy: Mapping[str, Any], rules: BufferRules, incarnation: str) -> None:
        """One record, so that a process that dies meanwhile leaves a journal that is empty or whole."""
        head = {**copy, "rules": rules.to_state(), "incarnation": incarnation}
        self._load_copy(head)
        self._log("copy", {}, **head)

    def _replay_restore(self, record: Record, **args: Any) -> None:
        del record
        self.restore(**{"lost": (), **args})

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
            ready = [g for g in self.ledger.finished() if self.ledger.state_of(g) is State.READY]
            self.lose_payloads(group_ids=[g for g in ready if not self._is_intact(g)], now=now)
            self.renew_all(now=now)
        elif step is None:
            raise JournalError(
                f"{path} holds the ledger of another run ({self._incarnations[-1]}). Resume that run, or choose "
                "another run directory."
            )
        else:
            self.restore(step=step, version=version, mark=incarnation, now=now, rules=rules)
            self.changes.clear()
