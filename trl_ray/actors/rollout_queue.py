"""The rollout queue: the one authority over which group is where, between prompt source, workers and learner.

    prompts -> admit -> lease -> [rollout worker] -> commit -> take -> [learner] -> trained -> release -> slots free

`wait_for_slots`, `lease` and `take` are long-polls: they answer as soon as there is something, at the latest
after their deadline, then with nothing. `trained` and `skip` wait for the disk, beside everything else. Every other
call answers at once. All state lies in the journal, so the process may be killed at any time; a restart finds leases,
finished groups and steps as they were. The journal is compacted on a thread, while calls go on.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from trl_ray.actors.actor_log import ActorLog
from trl_ray.algorithms.policy.advantages import clip_reward
from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules, Change, ChangeKind, LedgerSnapshot, Outcome, WaitingGroup
from trl_ray.buffer.journal import lock_path
from trl_ray.buffer.journal_reach import read_copy, write_copy
from trl_ray.buffer.news import News, NewsKind
from trl_ray.errors import JournalError
from trl_ray.types import (
    ActorReport,
    DropReason,
    EventKind,
    GroupTicket,
    Health,
    Prompt,
    RolloutGroup,
    steady_time,
)
from trl_ray.wire.group_payload import decode_group, decode_prompt, encode_prompt
from trl_ray.wire.worker_news import GroupFailed, GroupFinished, GroupGenerated, WorkerNews, finished_group

T = TypeVar("T")

_FAILURES = frozenset({DropReason.REWARD_FAILED, DropReason.TEACHER_FAILED, DropReason.REFUSED})
_NOTHING_TO_LEARN = frozenset({DropReason.ZERO_VARIANCE, DropReason.TRUNCATED})
_LOCK_PATIENCE_S = 5.0
"""A killed predecessor may still be giving up its lock."""


class RolloutQueue:
    """Ledger, slots, controller and journal behind long-polls.

        queue = RolloutQueue(journal_path=..., groups_per_step=8, max_staleness=2, ..., incarnation="job-1")
        await queue.admit(prompts=prompts, version=0)                       # the prompt source
        tickets = await queue.lease(worker="rollout-0", capacity=4, wait_s=10)   # a worker
        await queue.report(news=[finished_group(group), ...])
        groups = await queue.take(n=8, step=1, wait_s=60)               # the pipeline
        await queue.trained(step=1); await queue.release(step=1, wait_s=0.1, step_s=2.0)

    NOTE: every call with effect may be repeated after a lost answer; the second time changes nothing.
    """

    def __init__(
        self,
        *,
        journal_path: str,
        groups_per_step: int,
        max_staleness: int,
        incarnation: str,
        lease_s: float,
        drop_zero_variance: bool,
        mask_truncated: bool,
        adaptive_slots: bool,
        max_look_ahead: int = 1,
        max_attempts: int = 3,
        reward_clip_range: tuple[float, float] | None = None,
        max_resampled_groups: int | None = None,
        resume_from_step: int | None = None,
        resume_version: int | None = None,
        ledger_copy: str | None = None,
        name: str = "rollout_queue",
        clock: Callable[[], float] = steady_time,
    ) -> None:
        """Rebuild from the journal, or begin one.

        Args:
            journal_path: the file; a lock and a temporary file lie beside it.
            groups_per_step: P.
            max_staleness: S, in weight versions.
            incarnation: one name per submission of the job. With the name the journal already knows this is a
                restart of the process; with a new one it is a resume, and needs `resume_from_step`.
            lease_s: seconds a worker may go without renewing.
            drop_zero_variance: drop groups whose rewards are all equal.
            mask_truncated: whether the loss masks completions that were cut off; a group of nothing else is dropped.
            adaptive_slots: whether the controller moves the number of slots in use.
            max_look_ahead: W; up to W-1 younger groups may overtake a straggler.
            max_attempts: how often a group is tried in all.
            reward_clip_range: bounds of a total reward, within which differences count.
            max_resampled_groups: of one step, how many groups with nothing to learn are replaced; with one more nothing
                is admitted any more. None replaces all.
            resume_from_step: step of the checkpoint to go back to; applied once per incarnation.
            resume_version: weight version of that checkpoint; None means the step.
            ledger_copy: file with what the method `ledger_copy` answered then, for a journal that is lost; read where
                the journal holds nothing, so a restart does not need it.
            name: how events name this actor.
            clock: seconds since the epoch.

        Raises:
            ValueError: a rule is out of its range.
            JournalError: the journal is locked, damaged, of another run, or does not reach the step to resume.
            CheckpointError: the copy is needed and cannot be read.
        """
        rules = BufferRules(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            max_look_ahead=max_look_ahead,
            max_attempts=max_attempts,
            lease_s=lease_s,
            adaptive_slots=adaptive_slots,
            # Without staleness a resumed run repeats itself bit for bit, so the engine must see the same requests in
            # the same company: everything after the checkpoint is generated again.
            reuse_finished=max_staleness > 0,
        )
        self._drop_zero_variance = drop_zero_variance
        self._mask_truncated = mask_truncated
        self._clip_range, self._max_resampled = reward_clip_range, max_resampled_groups
        self._clock = clock
        self._log = ActorLog(name, clock)
        self._waiters: dict[asyncio.Future[None], None] = {}  # in order: who has waited longest is woken first
        # A long-poll outlives the worker that sent it, and must not lease to the dead. Names are never used again.
        self._lost_workers: set[str] = set()
        self._pulled: dict[str, int] = {}
        """The newest weights of each worker, as far as it told beside its leases."""
        self._progress = 0
        self._scorers_failed = 0
        self._in_a_row: Counter[DropReason] = Counter()
        """Groups given up since one was committed, by reason."""
        self._resampled: Counter[DropReason] = Counter()
        """Groups with nothing to learn since a step was finished, by reason."""
        self._closed = False
        self._compacting: asyncio.Task[None] | None = None
        _wait_for_lock(journal_path)
        self._store = DurableLedger(
            path=journal_path,
            rules=rules,
            incarnation=incarnation,
            now=clock(),
            resume_from_step=resume_from_step,
            resume_version=resume_version,
            copy=None if ledger_copy is None else partial(read_copy, ledger_copy),
        )
        self._limit = self._store.slots.limit
        if self._store.journal.truncated_bytes:
            self._log.event(EventKind.WARNING, truncated_bytes=self._store.journal.truncated_bytes, path=journal_path)

    # ---- the prompt source -------------------------------------------------------------------------------

    async def wait_for_slots(self, *, wait_s: float) -> int:
        """How many groups may be admitted now; 0 when the deadline passed without a free slot."""
        return await self._poll(lambda: 0 if self._resamples_no_more() else self._store.slots.free, 0, wait_s)

    def _resamples_no_more(self) -> bool:
        return self._max_resampled is not None and self._resampled.total() > self._max_resampled

    async def admit(self, *, prompts: Sequence[Prompt], version: int) -> list[int]:
        """Issue one group per prompt, all of them at once, and return their ids in the given order.

        A prompt id that was admitted before keeps its group.

        Raises:
            DataError: a prompt holds something that cannot be stored; nothing was admitted.
        """
        blobs = [encode_prompt(prompt) for prompt in prompts]
        names = [prompt.prompt_id for prompt in prompts]
        ids = self._store.admit(prompt_ids=names, prompts=blobs, version=version, now=self._clock())
        return self._done(ids)

    async def next_ordinal(self) -> int:
        """How many prompts were ever admitted: where the prompt source goes on after a restart."""
        return self._store.next_ordinal

    # ---- the workers -------------------------------------------------------------------------------------

    async def lease(
        self,
        *,
        worker: str,
        capacity: int,
        wait_s: float,
        holding: Sequence[tuple[int, int]] | None = None,
        version: int | None = None,
    ) -> list[GroupTicket]:
        """Up to `capacity` groups to generate, oldest first; [] when `wait_s` passed without any.

        Args:
            worker: who asks.
            capacity: how many it can start now.
            wait_s: seconds of the long poll.
            holding: (group_id, attempt) of everything it works on. A lease of its own that is not among them was in
                an answer that got lost: the group is issued again at once instead of when the lease expires.
            version: the weights it samples with. A worker that has not pulled those of the last release gets nothing,
                or a group would be older at its use than the bound allows. None is no bound.
        """

        def attempt() -> list[GroupTicket]:
            if worker in self._lost_workers:
                return []
            now = self._clock()
            self._store.expire(now=now)
            newest = None if version is None else max(version, self._pulled.get(worker, version))
            keys = self._store.lease(worker=worker, count=capacity, now=now, version=newest)
            return [
                GroupTicket(
                    group_id=key.group_id,
                    attempt=key.attempt,
                    prompt=decode_prompt(self._store.prompt(key.group_id)),
                    admitted_at_version=key.version,
                    draw=key.draw,
                )
                for key in keys
            ]

        nothing: list[GroupTicket] = []
        self._forget_unheld(worker, holding)
        tickets = await self._poll(attempt, nothing, wait_s)
        return self._done(tickets) if tickets else tickets

    async def pulled(self, *, worker: str, version: int) -> None:
        """The worker samples with younger weights now, and so does what a long-poll that it sent before will get."""
        self._pulled[worker] = max(version, self._pulled.get(worker, version))
        self._wake()

    def _forget_unheld(self, worker: str, holding: Sequence[tuple[int, int]] | None) -> None:
        if holding is None:
            return
        held = {(group_id, attempt) for group_id, attempt in holding}
        for key in self._store.ledger.leases_of(worker):
            if key not in held:
                because = "leased in an answer that got lost"
                self._done(self._store.fail(group_id=key[0], attempt=key[1], because=because, now=self._clock()))

    async def renew(self, *, worker: str, keys: Sequence[tuple[int, int]]) -> int:
        """Extend the worker's leases on these (group_id, attempt); how many still stand."""
        return self._store.renew(worker=worker, keys=keys, now=self._clock())

    async def report(self, *, news: Sequence[WorkerNews]) -> list[Outcome]:
        """Take in what workers tell of their attempts, in this order; what became of each.

        A finished group becomes ready, or is dropped when there is nothing to learn from it.
        """
        outcomes = self._store.report(news=[self._news_of(each) for each in news], now=self._clock())
        for each, outcome in zip(news, outcomes, strict=True):
            self._heed(each, outcome)
        return self._done(outcomes)

    def _news_of(self, told: WorkerNews) -> News:
        key: dict[str, Any] = {"group_id": told.group_id, "attempt": told.attempt}
        if isinstance(told, GroupGenerated):
            return News(kind=NewsKind.GENERATED, **key)
        if isinstance(told, GroupFailed):
            if told.drop is None:
                return News(kind=NewsKind.FAILED, **key, because=told.detail, reason=told.exhausted)
            return News(kind=NewsKind.DROPPED, **key, because=told.detail, reason=told.drop)
        reason = self._nothing_to_learn(told)
        if reason is not None:
            because = f"worker {told.worker} committed it"
            return News(kind=NewsKind.DROPPED, **key, because=because, reason=reason)
        return News(
            kind=NewsKind.COMMITTED,
            **key,
            min_version=told.min_version,
            max_version=told.max_version,
            payload=told.payload,
        )

    def _heed(self, told: WorkerNews, outcome: Outcome) -> None:
        if isinstance(told, GroupFinished) and outcome is Outcome.APPLIED:
            self._in_a_row.clear()  # rewards and teachers do work
        if isinstance(told, GroupFailed):
            # The learner, who may be waiting for groups, decides whether there were too many.
            self._scorers_failed += bool({told.drop, told.exhausted} & _FAILURES)
            if outcome is Outcome.APPLIED and DropReason.TEACHER_FAILED in (told.drop, told.exhausted):
                key = {"group_id": told.group_id, "attempt": told.attempt}
                self._log.event(EventKind.TEACHER_FAILED, **key, detail=told.detail)

    async def generated(self, *, group_id: int, attempt: int) -> Outcome:
        """All completions of the attempt exist; its rewards are outstanding."""
        return (await self.report(news=[GroupGenerated(group_id=group_id, attempt=attempt)]))[0]

    async def commit(self, *, group: RolloutGroup) -> Outcome:
        """The group is finished: see `report`.

        Raises:
            DataError: the group contradicts itself or cannot be stored; its state is unchanged.
        """
        return (await self.report(news=[finished_group(group)]))[0]

    def _nothing_to_learn(self, group: GroupFinished) -> DropReason | None:
        if self._mask_truncated and group.all_cut_off:
            return DropReason.TRUNCATED
        totals = {clip_reward(total, self._clip_range) for total in group.totals}
        if self._drop_zero_variance and len(totals) <= 1:
            return DropReason.ZERO_VARIANCE
        return None

    async def fail(
        self,
        *,
        group_id: int,
        attempt: int,
        detail: str,
        drop: DropReason | None = None,
        exhausted: DropReason = DropReason.RETRIES_EXHAUSTED,
    ) -> Outcome:
        """The attempt failed: issue it again, or drop it; see `GroupFailed`."""
        key: dict[str, Any] = {"group_id": group_id, "attempt": attempt}
        return (await self.report(news=[GroupFailed(**key, detail=detail, drop=drop, exhausted=exhausted)]))[0]

    async def lose_worker(self, *, worker: str) -> list[int]:
        """The worker is gone: issue what it held again (or drop it after `max_attempts`); the groups' ids."""
        self._lost_workers.add(worker)
        self._pulled.pop(worker, None)
        return self._done(self._store.lose_worker(worker=worker, now=self._clock()))

    async def expire(self) -> list[int]:
        """Take back every lease that has run out; the groups' ids."""
        return self._done(self._store.expire(now=self._clock()))

    # ---- the learner's side ------------------------------------------------------------------------------

    async def take(self, *, n: int, step: int, wait_s: float) -> list[RolloutGroup]:
        """See `take_stored`."""
        return [decode_group(payload) for payload in await self.take_stored(n=n, step=step, wait_s=wait_s)]

    async def take_stored(self, *, n: int, step: int, wait_s: float) -> list[bytes]:
        """The `n` groups of `step` as `encode_group` made them, by ascending group id.

        [] when the deadline passed before they were ready, or when rewards or teacher of a group failed meanwhile, or
        too many had nothing to learn, so that the caller may look into it.

        Asking again for the same step answers the same groups.

        Raises:
            JournalError: the journal no longer holds a group intact.
        """

        def attempt() -> list[int]:
            now = self._clock()
            if not self._store.ledger.groups_of(step):
                self._store.drop_stale(now=now)
            return self._store.take(count=n, step=step, now=now)

        nothing: list[int] = []
        failed = self._scorers_failed
        taken = await self._poll(
            attempt, nothing, wait_s, until=lambda: self._scorers_failed > failed or self._resamples_no_more()
        )
        if taken:
            self._done(None)
        return [self._store.payload(group_id) for group_id in taken]

    async def trained(self, *, step: int) -> Outcome:
        """The learner has finished `step`; the slots of its groups stay charged."""
        self._resampled.clear()
        outcome = self._done(self._store.trained(step=step, now=self._clock(), sync=False))
        await self._reach_disk()
        return outcome

    async def skip(self, *, step: int) -> Outcome:
        """The learner met numbers that are not finite and left the weights alone: the step's groups are dropped."""
        self._resampled.clear()
        outcome = self._done(self._store.skip(step=step, now=self._clock(), sync=False))
        await self._reach_disk()
        return outcome

    async def _reach_disk(self) -> None:
        """Wait until what is written survives a power cut; a repeated call waits as well, for it may be the first."""
        wait = self._store.journal.sync_waiter()
        try:
            await asyncio.to_thread(wait)
        except JournalError as error:
            self._store.sync(error)
        if not self._closed:
            self._store.sync(waited=True)

    async def release(self, *, step: int, wait_s: float, step_s: float) -> Outcome:
        """Every engine has pulled the weights of `step`: free the slots of what was trained up to it.

        Args:
            step: the step whose weights were pulled.
            wait_s: seconds the learner waited for the step's groups.
            step_s: seconds the whole step took, the wait included.
        """
        return self._done(self._store.release(step=step, wait_s=wait_s, step_s=step_s))

    async def checkpoint(self, *, step: int, saved: int | None = None) -> None:
        """A complete checkpoint is on disk: forget what is final, and begin to compact the journal.

        Args:
            step: the oldest step that a restore may go back to.
            saved: the step of the newest checkpoint; None is `step`.

        NOTE: call it after the checkpoint is whole. Steps before `step` cannot be restored any more.
        """
        self._store.checkpoint(step=step, saved=saved, compact=False)
        self._done(None)
        await self._reach_disk()
        if self._compacting is not None and not self._compacting.done():
            self._store.abandon_compaction()
            await self._compacting
        if not self._closed:
            self._compacting = asyncio.create_task(self._compact(), name="compact the journal")

    async def _compact(self) -> None:
        """Rewrite the journal beside the calls; where that fails the long one serves as well.

        consumes: nothing. produces: a shorter journal. waits for: a thread that writes it. unblocked by: its end.
        """
        compaction = self._store.begin_compaction()
        try:
            await asyncio.to_thread(compaction.run)
            self._store.end_compaction(compaction)
        except JournalError as error:
            self._log.event(EventKind.WARNING, detail=f"{error}; it stays as long as it is")

    async def compacted(self) -> None:
        """Until the journal that `checkpoint` began to compact is compact."""
        if self._compacting is not None:
            await self._compacting

    async def ledger_copy(self, *, step: int) -> bytes:
        """What a run needs of the ledger that goes back to `step`, the last finished one, and has no journal."""
        return write_copy(self._store.copy_of(step=step, now=self._clock()))

    async def restore(self, *, step: int, mark: str, version: int | None = None) -> bool:
        """The learner went back to the checkpoint of `step`: so does the ledger, once per `mark`.

        NOTE: engines must hold the checkpoint's weights before they lease again.

        Raises:
            JournalError: the ledger no longer knows what `step` had trained.
        """
        self._in_a_row.clear()
        self._resampled.clear()
        return self._done(self._store.restore(step=step, version=version, mark=mark, now=self._clock()))

    async def finish(self) -> LedgerSnapshot:
        """The run has reached its last step: drop whatever is still on its way; the final balance."""
        self._done(self._store.finish(now=self._clock()))
        return self._store.snapshot()

    def close(self, *, reason: str = "the run is over") -> None:
        """Give up the journal and answer every long-poll with nothing; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._log.event(EventKind.WAITING, closed=reason, polls_ended=len(self._waiters))
            self._store.close()
            self._wake()

    # ---- looking in --------------------------------------------------------------------------------------

    async def waiting_on(self, *, n: int) -> list[WaitingGroup]:
        """Of the `n` oldest groups not yet taken, those that are not ready: state, holder, since when."""
        return self._store.waiting_on(count=n)

    async def describe_wait(self, *, n: int) -> str:
        """What a step of `n` groups waits for, as one sentence for a stall message."""
        now = self._clock()
        named = [
            f"group {g.group_id} (attempt {g.attempt}) {g.state.value}"
            + (f" by {g.worker}" if g.worker else "")
            + f" for {now - g.since:.1f} s"
            for g in self._store.waiting_on(count=n)
        ]
        live = self._store.snapshot().live
        missing = n - sum(count for state, count in live.items() if state != "taken")
        if missing > 0:
            named.append(f"{missing} groups that were never admitted ({self._store.slots.free} slots are free)")
        if self._resampled:
            reasons = ", ".join(f"{reason.value} {count}" for reason, count in self._resampled.items())
            named.append(f"and {self._resampled.total()} that were dropped since the last step ({reasons})")
        return "waiting for " + "; ".join(named) if named else "waiting for nothing: every group is ready"

    async def snapshot(self) -> LedgerSnapshot:
        """The balance now: what ledger.json shows."""
        return self._store.snapshot()

    async def slots(self) -> int:
        """How many slots admission may fill now."""
        return self._store.slots.limit

    async def check(self) -> None:
        """Prove the balance by counting again.

        Raises:
            AssertionError: it does not hold.
        """
        self._store.check()

    async def drain(self) -> ActorReport:
        """Events since the last call, for the driver."""
        self._gather_changes()
        return self._log.drain()

    def health(self) -> Health:
        """For the supervisor: the queue must be restarted once its journal could not be written."""
        return Health(pid=os.getpid(), progress=self._progress, busy_since=None, problem=self._store.problem)

    # ---- inside ------------------------------------------------------------------------------------------

    def _done(self, answer: T) -> T:
        """After a call with effect: count it, note what it caused, wake the long-polls, and answer."""
        self._progress += 1
        self._gather_changes()
        self._wake()
        return answer

    async def _poll(
        self, attempt: Callable[[], T], nothing: T, wait_s: float, *, until: Callable[[], bool] = lambda: False
    ) -> T:
        """Answer the first thing that is there, or nothing at the deadline, or as soon as `until` holds.

        Waits for: any call with effect (`_done` wakes all waiters) or the deadline.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while not self._closed:
            answer = attempt()
            left = end - loop.time()
            if answer or left <= 0 or until():
                return answer
            woken = loop.create_future()
            self._waiters[woken] = None
            try:
                await asyncio.wait([woken], timeout=left)
            finally:
                self._waiters.pop(woken, None)
        return nothing

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _gather_changes(self) -> None:
        for change in self._store.changes:
            self._event_of(change)
        self._store.changes.clear()
        if self._store.slots.limit != self._limit:
            self._log.event(EventKind.SLOTS, before=self._limit, after=self._store.slots.limit)
            self._limit = self._store.slots.limit

    def _event_of(self, change: Change) -> None:
        key = {"group_id": change.group_id, "attempt": change.attempt, "worker": change.worker}
        if change.because == "expired":
            self._log.event(EventKind.LEASE_EXPIRED, **key)
        if change.kind is ChangeKind.REISSUED:
            self._log.event(EventKind.GROUP_REISSUED, **key, because=change.because)
        elif change.reason is not None:
            counts = self._counted(change.reason)
            self._log.event(
                EventKind.GROUP_DROPPED, **key, because=change.because, reason=change.reason.value, **counts
            )

    def _counted(self, reason: DropReason) -> dict[str, int]:
        """How many that makes: `in_a_row` of what fails, `since_step` of what has nothing to learn."""
        if reason in _FAILURES:
            self._in_a_row[reason] += 1
            return {"in_a_row": self._in_a_row[reason]}
        if reason in _NOTHING_TO_LEARN:
            self._resampled[reason] += 1
            return {"since_step": self._resampled.total()}
        return {}


def _wait_for_lock(journal_path: str) -> None:
    """Give a killed predecessor time to die; whether the lock is free is for the journal to decide."""
    path = lock_path(journal_path)
    end = time.monotonic() + _LOCK_PATIENCE_S
    while path.exists() and time.monotonic() < end:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.05)
