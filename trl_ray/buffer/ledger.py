"""The sample ledger: every group ever issued is trained exactly once or dropped with a reason.

    issue -> lease -> generated -> scored -> commit -> take(step) -> trained(step) -> release(step)
               `-- fail, expire, lose_worker: issue again, or drop --'   `-> skip(step)

It knows group ids, attempts and weight versions, never tokens; time is always passed in. Transitions are keyed
by (group_id, attempt): a late or foreign attempt is fenced, a repeated one is a no-op, and neither raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trl_ray.buffer.books import LedgerBooks
from trl_ray.buffer.entry import HELD, ChangeKind, GroupEntry, LeaseKey, Outcome, State
from trl_ray.types import DropReason


class Ledger(LedgerBooks):
    """The state machine over groups.

        ledger = Ledger(rules)
        ledger.issue(count=8, version=0, now=now)
        [key, *_] = ledger.lease(worker="rollout-0", count=4, now=now)
        ledger.commit(group_id=key.group_id, attempt=key.attempt, min_version=0, max_version=0, now=now)
        ledger.take(count=8, step=1, now=now); ledger.trained(step=1, now=now); ledger.release(step=1)

    NOTE: ``issued == trained + dropped + live`` after every call; `check` proves it by counting again.
    NOTE: steps finish in order 1, 2, 3, ...; a step is finished by `trained` or by `skip`.
    """

    # ---- admission and leases ----------------------------------------------------------------------------

    def issue(self, *, count: int, version: int, now: float) -> list[int]:
        """Issue `count` new groups at once and return their ids, ascending."""
        new = list(range(self.issued, self.issued + count))
        for group_id in new:
            self._live[group_id] = GroupEntry(group_id=group_id, version=version, since=now)
        self.issued += count
        return new

    def lease(
        self, *, worker: str, count: int, now: float, horizon: int | None = None, version: int | None = None
    ) -> list[LeaseKey]:
        """Lease up to `count` issued groups to `worker`, oldest first, none younger than `horizon`.

        Args:
            worker: who asks.
            count: the most it gets.
            now: seconds since the epoch.
            horizon: the youngest group that may be leased; None is no bound.
            version: the weights that the worker samples with. Without those of the last release it gets nothing: the
                bound on the age at use counts on them. None is no bound.
        """
        keys: list[LeaseKey] = []
        if version is not None and version < self.version - (self.step - self._released):
            return keys
        for entry in self._live.values():
            # Live groups stand in the order of their ids: after the first one beyond the horizon all are.
            if len(keys) >= count or (horizon is not None and entry.group_id > horizon):
                break
            if entry.state is State.ISSUED:
                self._move(entry, State.LEASED, now)
                entry.worker, entry.expires_at = worker, now + self.rules.lease_s
                keys.append(
                    LeaseKey(group_id=entry.group_id, attempt=entry.attempt, version=entry.version, draw=entry.draws)
                )
        return keys

    def leases_of(self, worker: str) -> list[tuple[int, int]]:
        """(group_id, attempt) of every group the worker holds."""
        return [(e.group_id, e.attempt) for e in self._live.values() if e.state in HELD and e.worker == worker]

    def renew(self, *, worker: str, keys: Iterable[tuple[int, int]], now: float) -> int:
        """Extend the worker's leases on these (group_id, attempt) and return how many still stand."""
        standing = 0
        for group_id, attempt in keys:
            entry = self._held(group_id, attempt)
            if entry is not None and entry.worker == worker:
                entry.expires_at = now + self.rules.lease_s
                standing += 1
        return standing

    def renew_all(self, *, now: float) -> None:
        """Extend every lease: while the ledger was away nobody could renew."""
        for entry in self._live.values():
            if entry.state in HELD:
                entry.expires_at = now + self.rules.lease_s

    def expire(self, *, now: float) -> list[int]:
        """Issue again, or drop, every group whose lease has run out; return their ids."""
        lost = [e for e in self._live.values() if e.expires_at is not None and e.expires_at <= now]
        for entry in lost:
            self._retry(entry, "expired", DropReason.RETRIES_EXHAUSTED, now)
        return [entry.group_id for entry in lost]

    def lose_worker(self, *, worker: str, now: float) -> list[int]:
        """Issue again, or drop, every group the worker holds; return their ids."""
        lost = [e for e in self._live.values() if e.state in HELD and e.worker == worker]
        for entry in lost:
            self._retry(entry, "worker lost", DropReason.RETRIES_EXHAUSTED, now)
        return [entry.group_id for entry in lost]

    # ---- the way of one attempt --------------------------------------------------------------------------

    def generated(self, *, group_id: int, attempt: int, now: float) -> Outcome:
        """All completions of the attempt exist."""
        return self._advance(group_id, attempt, State.GENERATED, now)

    def scored(self, *, group_id: int, attempt: int, now: float) -> Outcome:
        """All rewards of the attempt exist."""
        return self._advance(group_id, attempt, State.SCORED, now)

    def commit(self, *, group_id: int, attempt: int, min_version: int, max_version: int, now: float) -> Outcome:
        """The finished group is safely stored: it becomes ready.

        Args:
            group_id: the group.
            attempt: the attempt that made it.
            min_version: oldest weight version that sampled a token.
            max_version: youngest weight version that sampled a token.
            now: seconds since the epoch.
        """
        entry = self._held(group_id, attempt)
        if entry is None:
            return self._unheld(group_id, attempt)
        self._move(entry, State.READY, now)
        # It is stored now, and cannot be lost with its worker any more.
        entry.worker = entry.expires_at = None
        entry.committed, entry.min_version, entry.max_version = attempt, min_version, max_version
        return Outcome.APPLIED

    def fail(
        self,
        *,
        group_id: int,
        attempt: int,
        because: str,
        now: float,
        exhausted: DropReason = DropReason.RETRIES_EXHAUSTED,
    ) -> Outcome:
        """The attempt failed for a reason that is not the group's: issue again, or drop after `max_attempts`."""
        entry = self._held(group_id, attempt)
        if entry is None:
            return self._unheld(group_id, attempt, failing=True)
        # Kept, so that the same news told again is a repetition and no second failure.
        entry.failed = attempt
        # What could not be scored may be its completions' fault: the next attempt draws others. All other attempts draw
        # the same, so that a lost worker changes nothing of a run.
        entry.draws += exhausted is DropReason.REWARD_FAILED
        self._retry(entry, because, exhausted, now)
        return Outcome.APPLIED

    def drop(self, *, group_id: int, attempt: int, reason: DropReason, because: str, now: float) -> Outcome:
        """Give the group up, on the word of the worker that holds this attempt."""
        entry = self._held(group_id, attempt)
        if entry is None:
            return self._unheld(group_id, attempt)
        # As after a commit: the worker may tell of it twice.
        entry.committed = attempt
        self._drop(entry, reason, because, now)
        return Outcome.APPLIED

    def _advance(self, group_id: int, attempt: int, state: State, now: float) -> Outcome:
        entry = self._held(group_id, attempt)
        if entry is None:
            return self._unheld(group_id, attempt)
        order = list(State)
        if order.index(entry.state) >= order.index(state):
            return Outcome.REPEATED
        self._move(entry, state, now)
        return Outcome.APPLIED

    def _held(self, group_id: int, attempt: int) -> GroupEntry | None:
        entry = self._live.get(group_id)
        if entry is None or entry.state not in HELD or entry.attempt != attempt:
            return None
        return entry

    def _unheld(self, group_id: int, attempt: int, *, failing: bool = False) -> Outcome:
        entry = self._live.get(group_id) or self._settled.get(group_id)
        if entry is not None and attempt == (entry.failed if failing else entry.committed):
            return Outcome.REPEATED
        # No error: the worker has done nothing wrong, its attempt was given up meanwhile.
        self.fenced += 1
        return Outcome.FENCED

    def _retry(self, entry: GroupEntry, because: str, exhausted: DropReason, now: float) -> None:
        entry.failures += 1
        if entry.failures >= self.rules.max_attempts:
            self._drop(entry, exhausted, because, now)
        else:
            self._reissue(entry, because, now)

    def _reissue(self, entry: GroupEntry, because: str, now: float) -> None:
        # Noted with the attempt that ended and the worker that held it, before both are gone.
        self._note(ChangeKind.REISSUED, entry, because)
        entry.attempt += 1
        entry.worker = entry.expires_at = entry.committed = entry.min_version = entry.max_version = None
        self.reissued += 1
        self._move(entry, State.ISSUED, now)

    def _drop(self, entry: GroupEntry, reason: DropReason, because: str, now: float, step: int | None = None) -> None:
        entry.reason = reason
        self._note(ChangeKind.DROPPED, entry, because)
        # A drop belongs to the step that was being prepared: a restore to the step before undoes it.
        entry.step = self.step + 1 if step is None else step
        entry.worker = entry.expires_at = None
        self._dropped[reason] += 1
        self._settle(entry, State.DROPPED, now)

    # ---- steps -------------------------------------------------------------------------------------------

    def take(self, *, count: int, step: int, now: float) -> list[int]:
        """Take the `count` oldest ready groups for `step`, or none; return their ids, ascending.

        A live group that is passed over has been overtaken by every younger group taken before it. Over its whole
        life this may happen W-1 times, so with W = 1 the `count` oldest live groups must all be ready. The
        straggler that counts is the oldest: whatever overtook a younger one overtook it too.

        A step that was already taken answers the same groups again.
        """
        # The driver asks again where an answer got lost, and must get the same groups.
        taken = self.groups_of(step)
        if taken:
            return taken
        latest = max((e.step for e in self._live.values() if e.step is not None), default=self.step)
        assert step == latest + 1, f"Steps are taken in order: step {latest + 1} is next, got {step}."
        waiting = [entry for entry in self._live.values() if entry.state is not State.TAKEN]
        chosen = [entry for entry in waiting if entry.state is State.READY][:count]
        if len(chosen) < count or count < 1:
            return []
        youngest = chosen[-1].group_id
        passed = [e for e in waiting if e.state is not State.READY and e.group_id < youngest]
        overtakes = {e.group_id: sum(c.group_id > e.group_id for c in chosen) for e in passed}
        if any(e.overtaken + overtakes[e.group_id] > self.rules.max_look_ahead - 1 for e in passed):
            return []
        for entry in passed:
            entry.overtaken += overtakes[entry.group_id]
        for entry in chosen:
            self._move(entry, State.TAKEN, now)
            entry.step = step
        return [entry.group_id for entry in chosen]

    def groups_of(self, step: int) -> list[int]:
        """The groups taken for or trained by `step`, ascending; empty when it is unknown or forgotten."""
        if step > self.step:
            return [e.group_id for e in self._live.values() if e.step == step]
        trained = (e for e in self._settled.values() if e.state is State.TRAINED and e.step == step)
        return sorted(entry.group_id for entry in trained)

    def trained(self, *, step: int, now: float) -> Outcome:
        """The learner has finished `step`: its groups are trained; their slots stay charged until `release`."""
        if step <= self.step:
            return Outcome.REPEATED
        for entry in self._finish(step):
            self._trained += 1
            self._settle(entry, State.TRAINED, now)
        self.version += 1
        return Outcome.APPLIED

    def skip(self, *, step: int, now: float, reason: DropReason = DropReason.NUMERICS) -> Outcome:
        """The learner gave `step` up and left the weights as they were: its groups are dropped.

        Their slots stay charged until `release`, as after a trained step: the step makes a version all the same, so
        a group admitted into them before the pull would be one version older than the bound allows.
        """
        if step <= self.step:
            return Outcome.REPEATED
        for entry in self._finish(step):
            entry.skipped = True
            self._drop(entry, reason, f"step {step} was skipped", now, step=step)
        self.version += 1
        return Outcome.APPLIED

    def _finish(self, step: int) -> list[GroupEntry]:
        taken = [e for e in self._live.values() if e.state is State.TAKEN and e.step == step]
        assert step == self.step + 1, f"Steps finish in order: step {self.step + 1} is next, got {step}."
        assert taken, f"A step must be taken before it is finished, and step {step} was not."
        self.step = step
        return taken

    def release(self, *, step: int) -> Outcome:
        """All engines have pulled the weights of `step`: the slots of everything finished up to it are free."""
        assert step <= self.step, f"Only finished steps are released: step {self.step} was the last, got {step}."
        # The driver repeats this too, where it does not know whether it was heard.
        if step <= self._released:
            return Outcome.REPEATED
        for entry in [e for e in self._unreleased.values() if (e.step or 0) <= step]:
            del self._unreleased[entry.group_id]
            self._note(ChangeKind.RELEASED, entry, "released")
        # Slots are freed here and not in `trained`: until the pull, engines sample with older weights.
        self._released = step
        return Outcome.APPLIED

    def drop_stale(self, *, now: float) -> list[int]:
        """Drop ready groups older than the bound; return their ids.

        With slots charged correctly there are none, so each is an alarm.
        """
        ahead = {e.step for e in self._live.values() if e.state is State.TAKEN}
        # Steps that are taken and not finished will each have made a version before a ready group's turn.
        at_use = self.version + len(ahead)
        ready = [e for e in self._live.values() if e.state is State.READY]
        stale = [e for e in ready if at_use - (e.min_version or 0) > self.rules.max_age_at_use]
        for entry in stale:
            age = at_use - (entry.min_version or 0)
            self._drop(entry, DropReason.STALE, f"age {age} exceeds {self.rules.max_age_at_use}", now)
        return [entry.group_id for entry in stale]

    def finish(self, *, now: float) -> list[int]:
        """The run ends: drop whatever is live and return the ids."""
        left = list(self._live.values())
        for entry in left:
            self._drop(entry, DropReason.END_OF_RUN, "the run reached its last step", now)
        return [entry.group_id for entry in left]

    # ---- checkpoints -------------------------------------------------------------------------------------

    def checkpoint(self, *, step: int, saved: int | None = None) -> list[int]:
        """A checkpoint of `step` makes everything settled by then final; forget it and return the ids.

        A group whose slot is still charged is kept until a later checkpoint.

        Args:
            step: the oldest step that a restore may still go back to.
            saved: a younger step that has a checkpoint as well.
        """
        newest = step if saved is None else saved
        assert newest <= self.step, f"Only a finished step has a checkpoint: {self.step} was the last, got {newest}."
        self.oldest_restorable = max(self.oldest_restorable, step)
        # A step that is passed is too late to tell of: what it needed of payloads may be gone.
        told = {newest} if newest == self.step else set()
        self.saved = {each for each in self.saved | told if each >= self.oldest_restorable}
        final = [e for e in self._settled.values() if (e.step or 0) <= step and not self._holds_slot(e)]
        for entry in final:
            del self._settled[entry.group_id]
            if entry.reason is None:
                self._forgotten_trained += 1
            else:
                self._forgotten_dropped[entry.reason] += 1
        return [entry.group_id for entry in final]

    def restore(
        self,
        *,
        step: int,
        version: int | None,
        now: float,
        has_payload: Callable[[int], bool] = lambda group_id: True,
    ) -> None:
        """Go back to the moment when `step` had just finished: whatever was settled later is live again.

        A finished group stays ready if the checkpoint's weights could have sampled it and it will still be young
        enough when its turn comes. Every other group is issued again with the next attempt, so that commits
        from the lost timeline are fenced.

        Args:
            step: the step of the checkpoint.
            version: the checkpoint's weight version; None means `step`.
            now: seconds since the epoch.
            has_payload: whether a group's payload is still there; asked of those that would stay ready.

        Raises:
            ValueError: the ledger no longer knows, or does not know yet, what `step` had trained.
        """
        # The checkpoint proves that its steps were trained, even when the news of it was lost with the machine.
        for ahead in range(self.step + 1, step + 1):
            if self.groups_of(ahead):
                self.trained(step=ahead, now=now)
        if not self.oldest_restorable <= step <= self.step:
            raise ValueError(
                f"The step to restore must lie in [{self.oldest_restorable}, {self.step}], got {step}: earlier "
                "groups are forgotten, later ones were never recorded. Resume from a checkpoint in that range."
            )
        self.version = step if version is None else version
        self.step = self._released = step
        self._unreleased.clear()
        self.saved = {*(saved for saved in self.saved if saved < step), step}
        undone = [entry for entry in self._settled.values() if (entry.step or 0) > step]
        for entry in undone:
            del self._settled[entry.group_id]
            if entry.reason is None:
                self._trained -= 1
            else:
                self._dropped[entry.reason] -= 1
        back = sorted([*self._live.values(), *undone], key=lambda entry: entry.group_id)
        self._live = {entry.group_id: entry for entry in back}
        for position, entry in enumerate(back):
            self._revive(entry, position, now, has_payload)

    def _revive(self, entry: GroupEntry, position: int, now: float, has_payload: Callable[[int], bool]) -> None:
        keep = self.rules.reuse_finished and self._usable(entry, position) and has_payload(entry.group_id)
        # What the lost timeline did to a group is not held against it.
        entry.failures = entry.draws = entry.overtaken = 0
        entry.step = entry.reason = entry.failed = None
        entry.skipped = False
        if keep:
            self._move(entry, State.READY, now)
            return
        entry.version = self.version
        if entry.state is not State.ISSUED:
            self._reissue(entry, "restored", now)

    def _usable(self, entry: GroupEntry, position: int) -> bool:
        """Whether a restored group's payload may be trained: of this timeline, and young enough at use.

        `position` older groups are live.
        """
        if entry.min_version is None or entry.max_version is None:
            return False
        # What the end of a run dropped was good, and a longer run may train it.
        if entry.reason not in (None, DropReason.END_OF_RUN):
            return False
        age = self.version + self.rules.max_steps_before(position) - entry.min_version
        return entry.max_version <= self.version and age <= self.rules.max_age_at_use

    def lose_payloads(self, *, group_ids: Iterable[int], now: float) -> None:
        """What was stored of these ready groups is damaged: issue them again."""
        for group_id in group_ids:
            entry = self._live[group_id]
            assert entry.state is State.READY, f"Only a ready group's payload can be made again, got {entry}."
            self._reissue(entry, "payload lost", now)
