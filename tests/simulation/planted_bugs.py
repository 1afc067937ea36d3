"""Bugs to plant: each replaces one thing that upholds exactly-once training, the bound, or progress.

The simulation must find every one of them; what finds nothing is not worth its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from trl_ray.actors.calling import Outbox
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.buffer.books import LedgerBooks
from trl_ray.buffer.compaction import Compaction
from trl_ray.buffer.controller import SlotController
from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import ChangeKind, Outcome, State
from trl_ray.buffer.journal import Journal, Rewrite
from trl_ray.buffer.journaled import JournaledState
from trl_ray.buffer.ledger import Ledger
from trl_ray.buffer.payloads import Payloads
from trl_ray.buffer.slots import AdmissionSlots
from trl_ray.runtime.supervision import Supervisor

_held, _take, _trained, _skip = Ledger._held, Ledger.take, Ledger.trained, Ledger.skip
_note, _reissue, _drain, _checkpoint = Ledger._note, Ledger._reissue, Ledger.drain_changes, Ledger.checkpoint
_restore, _from_state, _drop = Ledger.restore, LedgerBooks.from_state, Ledger._drop
_log, _durable_restore, _admit = JournaledState._log, DurableLedger.restore, DurableLedger.admit
_report, _settle = DurableLedger.report, JournaledState._settle


def _late_attempts_count(self: Ledger, group_id: int, attempt: int) -> Any:
    entry = self._live.get(group_id)
    return entry if entry is not None and entry.state is not State.TAKEN else None


def _attempt_stays(self: Ledger, entry: Any, because: str, now: float) -> None:
    attempt = entry.attempt
    _reissue(self, entry, because, now)
    entry.attempt = attempt


def _trained_and_released(self: Ledger, *, step: int, now: float) -> Outcome:
    outcome = _trained(self, step=step, now=now)
    self.release(step=step)
    return outcome


def _skipped_and_released(self: Ledger, *, step: int, now: float) -> Outcome:
    outcome = _skip(self, step=step, now=now)
    self.release(step=step)
    return outcome


def _skipped_as_trained(self: Ledger, *, step: int, now: float) -> Outcome:
    return _trained(self, step=step, now=now)


def _no_one_is_overtaken(self: Ledger, **arguments: Any) -> list[int]:
    for entry in self._live.values():
        entry.overtaken = -1000
    return _take(self, **arguments)


def _youngest_first(self: Ledger, *, count: int, step: int, now: float) -> list[int]:
    taken = self.groups_of(step)
    ready = [e for e in self._live.values() if e.state is State.READY]
    if taken or len(ready) < count:
        return taken
    for entry in ready[-count:]:
        self._move(entry, State.TAKEN, now)
        entry.step = step
    return [entry.group_id for entry in ready[-count:]]


def _taken_anew(self: Ledger, *, count: int, step: int, now: float) -> list[int]:
    for group_id in self.groups_of(step):
        if group_id in self._live:
            entry = self._live[group_id]
            self._move(entry, State.READY, now)
            entry.step = None
    return _youngest_first(self, count=count, step=step, now=now)


def _no_releases(self: Ledger) -> list[Any]:
    return [change for change in _drain(self) if change.kind is not ChangeKind.RELEASED]


def _drops_keep_their_slots(self: Ledger) -> list[Any]:
    return [change for change in _drain(self) if change.kind is not ChangeKind.DROPPED]


def _keeps_all(self: Ledger, entry: Any, position: int) -> bool:
    return entry.min_version is not None


def _ready_is_worn_out(
    self: Ledger, entry: Any, reason: Any, because: str, now: float, step: int | None = None
) -> None:
    _drop(self, entry, reason, because, now, step)
    self._dropped[reason] -= 1


def _version_stays(self: Ledger, *, step: int, version: int | None, now: float, **more: Any) -> None:
    before = self.version
    _restore(self, step=step, version=version, now=now, **more)
    self.version = max(before, self.version)


def _forgets_the_released(cls: Any, state: Any, *, rules: Any) -> Any:
    return _from_state.__func__(cls, {**state, "released": 0}, rules=rules)


def _unwritten(*ops: str) -> Callable[..., None]:
    def log(self: Any, op: str, args: Any, payload: bytes = b"", **extra: Any) -> None:
        if op not in ops:
            _log(self, op, args, payload, **extra)

    return log


def _admits_again(self: DurableLedger, **arguments: Any) -> list[int]:
    for name in arguments["prompt_ids"]:
        self._known.pop(name, None)
    return _admit(self, **arguments)


def _restores_whenever_asked(self: DurableLedger, **arguments: Any) -> bool:
    done = _durable_restore(self, **arguments)
    if done:
        self._incarnations.pop()
    return done


def _answers_before_writing(self: DurableLedger, *, news: Any, now: float) -> list[Outcome]:
    problem = None
    try:
        return _report(self, news=news, now=now)
    except BaseException as error:
        problem = error
        return [Outcome.APPLIED for _ in news]
    finally:
        del problem


def _copies_nothing(self: Rewrite) -> None:
    self._copied = self._journal.end


def _swallows_what_comes_meanwhile(self: Any, item: Any) -> Any:
    future = _put(self, item)
    if self._sending and len(self._waiting) > 1:
        self._waiting.pop()
    return future


_put = Outbox.put


def _grows_without_end(self: SlotController) -> None:
    self.limit += 1


async def _nobody_is_lost(self: Supervisor, watched: Any) -> None:
    return None


def _begins_with_what_it_was_told(self: RolloutWorker, tickets: Any) -> None:
    _begin(self, [*tickets, *tickets[:1]])


_begin = RolloutWorker._begin


def _whatever_it_samples_with(self: Ledger, **arguments: Any) -> Any:
    return _lease(self, **{**arguments, "version": None})


_lease = Ledger.lease


def _never_out_of_date(self: RolloutQueue, group: Any) -> None:
    return None


def _keeps_the_tail(self: Journal) -> int:
    """Opens without cutting a torn record off."""
    with patch("os.ftruncate", lambda file, size: None):
        return _recover(self)


_recover = Journal._recover


def _forgets_steps(self: Ledger, *, step: int, saved: int | None = None) -> list[int]:
    return _checkpoint(self, step=self.step, saved=None)


def _everything_goes_on(self: Compaction) -> None:
    """A restore does not end it."""


def _lose_none(self: Ledger, *, group_ids: Any, now: float) -> None:
    return None


BUGS: dict[str, list[tuple[Any, str, Any]]] = {
    "a late attempt's commit counts": [(Ledger, "_held", _late_attempts_count)],
    "a reissued group keeps its attempt": [(Ledger, "_reissue", _attempt_stays)],
    "slots are free before the pull": [(Ledger, "trained", _trained_and_released)],
    "slots of a skipped step are free before the pull": [(Ledger, "skip", _skipped_and_released)],
    "a skipped step counts as trained": [(Ledger, "skip", _skipped_as_trained)],
    "a straggler is overtaken for ever": [(Ledger, "take", _no_one_is_overtaken)],
    "a step asked for again has other groups": [(Ledger, "take", _taken_anew)],
    "released slots are not given back": [(Ledger, "drain_changes", _no_releases)],
    "dropped groups keep their slots": [(Ledger, "drain_changes", _drops_keep_their_slots)],
    "a restore keeps every finished group": [(Ledger, "_usable", _keeps_all)],
    "a drop is not counted": [(Ledger, "_drop", _ready_is_worn_out)],
    "a restore keeps the version": [(Ledger, "restore", _version_stays)],
    "groups beyond the horizon are leased": [(AdmissionSlots, "horizon", None)],
    "a compacted journal forgets what was released": [(LedgerBooks, "from_state", classmethod(_forgets_the_released))],
    "commits are not written down": [(JournaledState, "_log", _unwritten("report"))],
    "leases are not written down": [(JournaledState, "_log", _unwritten("lease"))],
    "finished steps are not written down": [(JournaledState, "_log", _unwritten("trained", "skip"))],
    "a restore is not written down": [(JournaledState, "_log", _unwritten("restore"))],
    "lost workers are not written down": [(JournaledState, "_log", _unwritten("lose_worker", "expire"))],
    "prompts are admitted again": [(DurableLedger, "admit", _admits_again)],
    "a restore is done as often as it is asked for": [(DurableLedger, "restore", _restores_whenever_asked)],
    "what was written during a compaction is left out": [(Rewrite, "_copy", _copies_nothing)],
    "payloads of ready groups are deleted": [(LedgerBooks, "needs_payload", lambda self, group_id: False)],
    "torn payloads are read": [
        (Payloads, "is_intact", lambda self, place: True),
        (Payloads, "_read", lambda self, place: b"TRLG" + bytes(max(0, place.length - 4))),
    ],
    "a torn record stays at the journal's end": [(Journal, "_recover", _keeps_the_tail)],
    "checkpoints forget what the one before needs": [(Ledger, "checkpoint", _forgets_steps)],
    "the controller knows no bound": [(SlotController, "_grow", _grows_without_end)],
    "the supervisor sees nothing": [(Supervisor, "_probe", _nobody_is_lost)],
    "workers that have not pulled get groups": [(Ledger, "lease", _whatever_it_samples_with)],
    "a worker begins a group twice": [(RolloutWorker, "_begin", _begins_with_what_it_was_told)],
    "groups with nothing to learn are trained": [(RolloutQueue, "_nothing_to_learn", _never_out_of_date)],
    "a worker's news are lost when it has many": [(Outbox, "put", _swallows_what_comes_meanwhile)],
    "the end of a run leaves groups behind": [(Ledger, "finish", lambda self, *, now: [])],
}
"""What is replaced, by name."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """One bug in place."""
    patches = [patch.object(owner, attribute, value) for owner, attribute, value in BUGS[name]]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()
