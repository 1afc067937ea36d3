"""The durable ledger: restart, resume, compaction, and a disk that fills up."""

import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules, ChangeKind, Outcome, State
from trl_ray.buffer.journal import Journal, JournalDraft
from trl_ray.errors import JournalError

RULES = BufferRules(groups_per_step=2, max_staleness=1, lease_s=10.0)


def start(
    path: Path, incarnation: str = "one", now: float = 0.0, rules: BufferRules = RULES, **kw: Any
) -> DurableLedger:
    return DurableLedger(path=path, rules=rules, incarnation=incarnation, now=now, **kw)


def admit(store: DurableLedger, first: int, count: int, version: int = 0) -> list[int]:
    names = [f"0:{n}" for n in range(first, first + count)]
    return store.admit(prompt_ids=names, prompts=[f"prompt {n}".encode() for n in names], version=version, now=0.0)


def finish(store: DurableLedger, count: int, version: int = 0) -> list[int]:
    keys = store.lease(worker="w", count=count, now=0.0)
    for key in keys:
        store.commit(
            group_id=key.group_id,
            attempt=key.attempt,
            min_version=version,
            max_version=version,
            payload=b"group %d/%d" % (key.group_id, key.attempt),
            now=1.0,
        )
    return [key.group_id for key in keys]


def step(store: DurableLedger, number: int) -> list[int]:
    taken = store.take(count=2, step=number, now=2.0)
    store.trained(step=number, now=2.0)
    store.release(step=number, wait_s=0.0, step_s=1.0)
    return taken


def test_the_journal_names_the_rules_as_it_always_did(tmp_path: Path) -> None:
    rules = BufferRules(groups_per_step=2, max_staleness=1, max_look_ahead=3, lease_s=10.0)
    start(tmp_path / "j", rules=rules).close()
    written = {
        "groups_per_step": 2,
        "max_staleness": 1,
        "window": 3,
        "max_attempts": 3,
        "lease_s": 10.0,
        "adaptive_slots": False,
        "reuse_finished": True,
    }
    with closing(Journal(tmp_path / "j")) as journal:
        [record] = journal.records()
    assert list(record.head["rules"].items()) == list(written.items())
    with closing(start(tmp_path / "j", rules=rules)) as again:
        assert again.rules == rules == BufferRules.from_state(written)


def test_a_restart_finds_everything_as_it_was(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 4)
    finish(store, 2)
    [key] = store.lease(worker="w2", count=1, now=3.0)
    store.take(count=2, step=1, now=3.0)
    before = store.ledger.to_state()
    store.close()
    again = start(tmp_path / "j", now=100.0)
    again.check()
    assert again.expire(now=109.0) == []  # the time without a ledger does not count against a lease
    assert again.ledger.groups_of(1) == [0, 1]
    assert [again.payload(0), again.prompt(3)] == [b"group 0/0", b"prompt 0:3"]
    late = {"group_id": key.group_id, "attempt": 0, "min_version": 0, "max_version": 0, "payload": b"x", "now": 101.0}
    assert again.commit(**late) is Outcome.APPLIED
    assert [e["group_id"] for e in before["live"]] == [0, 1, 2, 3]
    again.close()


def test_admitting_the_same_prompts_again_issues_only_the_new_ones(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    assert admit(store, 0, 2) == [0, 1]
    store.close()
    store = start(tmp_path / "j")
    assert admit(store, 0, 3) == [0, 1, 2]
    assert (store.next_ordinal, store.slots.in_use) == (3, 3)
    store.close()


def test_a_checkpoint_keeps_what_is_still_needed_and_shrinks_the_file(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 4)
    finish(store, 3)
    step(store, 1)
    before = store.journal.end
    store.checkpoint(step=1)
    assert store.journal.end < before
    store.check()
    assert store.payload(2) == b"group 2/0"
    snapshot = store.snapshot()
    store.close()
    store = start(tmp_path / "j")
    store.check()
    assert store.snapshot() == snapshot
    assert (store.payload(2), store.prompt(3)) == (b"group 2/0", b"prompt 0:3")
    assert admit(store, 0, 4) == [0, 1, 2, 3]
    store.close()


def test_payloads_trained_after_the_checkpoint_stay_until_the_next_one(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 4)
    finish(store, 4)
    step(store, 1)
    store.checkpoint(step=1)
    step(store, 2)
    assert store.payload(3) == b"group 3/0"
    store.close()
    resumed = start(tmp_path / "j", "two", resume_from_step=1)
    assert resumed.take(count=2, step=2, now=5.0) == [2, 3]
    assert resumed.payload(3) == b"group 3/0"
    resumed.close()


def test_a_resume_is_applied_once_however_often_the_process_restarts(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 4)
    finish(store, 2)
    step(store, 1)
    store.close()
    resumed = start(tmp_path / "j", "two", resume_from_step=0)
    assert resumed.snapshot().trained == 0
    step(resumed, 1)
    resumed.close()
    restarted = start(tmp_path / "j", "two", resume_from_step=0)
    assert restarted.snapshot().trained == 2
    restarted.close()


def test_a_journal_of_another_run_and_one_that_falls_short_are_refused(tmp_path: Path) -> None:
    start(tmp_path / "j").close()
    with pytest.raises(JournalError, match="another run"):
        start(tmp_path / "j", "two")
    with pytest.raises(JournalError, match="cannot go back to step 3"):
        start(tmp_path / "j", "two", resume_from_step=3)
    with pytest.raises(JournalError, match="it is empty"):
        start(tmp_path / "new", resume_from_step=3)
    with pytest.raises(JournalError, match="keep its rules"):
        start(tmp_path / "j", rules=BufferRules(groups_per_step=3, max_staleness=1))


def test_a_resume_may_change_the_rules(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 4)
    store.close()
    rules = BufferRules(groups_per_step=1, max_staleness=1)
    for _ in range(2):
        store = start(tmp_path / "j", "two", rules=rules, resume_from_step=0)
        assert (store.slots.capacity, store.slots.free, store.slots.horizon) == (2, 0, 1)
        store.check()
        store.close()


def test_a_restore_beyond_capacity_leases_only_the_oldest_groups_and_admits_none(tmp_path: Path) -> None:
    store = start(tmp_path / "j", rules=BufferRules(groups_per_step=2, max_staleness=1, reuse_finished=False))
    for number in (1, 2, 3):
        admit(store, store.next_ordinal, store.slots.free)
        finish(store, 9)
        step(store, number)
    admit(store, store.next_ordinal, store.slots.free)
    assert store.restore(step=0, version=None, mark="learner lost", now=9.0)
    assert not store.restore(step=0, version=None, mark="learner lost", now=9.0)
    store.check()
    assert (store.slots.in_use, store.slots.free) == (10, 0)
    assert finish(store, 99) == [0, 1, 2, 3]
    assert finish(store, 99) == []
    step(store, 1)
    assert finish(store, 99, version=1) == [4, 5]
    store.close()


def write_as_before(store: DurableLedger) -> None:
    """Compact the journal as versions did that kept payloads in it: one base with everything, then the payloads."""
    owners = list(store._places)
    base = {
        "op": "base",
        "rules": store.rules.to_state(),
        "incarnations": store._incarnations,
        "prompt_ids": store._prompt_ids,
        "ledger": store.ledger.to_state(),
        "controller": store.controller.to_state(),
        "limit": store.slots.limit,
        "prompts": list(store._prompts),
        "sizes": [len(blob) for blob in store._prompts.values()],
        "payloads": len(owners),
    }
    drafts = [JournalDraft(head=base, payload=b"".join(store._prompts.values()))]
    drafts += [JournalDraft(head={"op": "payload", "group_id": g}, payload=store.payload(g)) for g in owners]
    store.journal.compact(drafts)


def test_a_compact_journal_of_earlier_versions_leads_to_the_slots_and_leases_that_it_had(tmp_path: Path) -> None:
    rules = BufferRules(groups_per_step=2, max_staleness=1, lease_s=10.0, reuse_finished=False)
    store = start(tmp_path / "j", rules=rules)
    for number in (1, 2, 3):
        admit(store, store.next_ordinal, store.slots.free)
        finish(store, 9)
        step(store, number)
    admit(store, store.next_ordinal, store.slots.free)
    store.restore(step=0, version=None, mark="two", now=9.0)  # ten groups for four slots
    assert finish(store, 2) == [0, 1]
    write_as_before(store)
    # Leases reach to the horizon, groups 2 and 3, whatever was asked for.
    assert [key.group_id for key in store.lease(worker="w", count=9, now=10.0)] == [2, 3]
    held = [{"group_id": g, "attempt": 1, "min_version": 0, "max_version": 0, "now": 10.0} for g in (2, 3)]
    for key in held:
        store.ledger.scored(group_id=key["group_id"], attempt=1, now=10.0)
        store.ledger.commit(**key)
        store.journal.append({"op": "commit", "args": key}, b"group %d/1" % key["group_id"])
    assert [step(store, number) for number in (1, 2)] == [[0, 1], [2, 3]]
    expected = (store.ledger.to_state(), store.slots.charged, store.slots.horizon)
    store.close()
    shutil.rmtree(tmp_path / "j.payloads")
    for _ in range(2):
        store = start(tmp_path / "j", rules=rules, incarnation="two")
        store.check()
        assert (store.ledger.to_state(), store.slots.charged, store.slots.horizon) == expected
        assert (store.slots.in_use, store.slots.horizon) == (6, 7)
        store.close()


def test_a_snapshot_that_lost_a_record_is_refused(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 2)
    finish(store, 2)
    store.checkpoint(step=0)
    store.close()
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-1])
    with pytest.raises(JournalError, match="1 of its records are missing"):
        start(tmp_path / "j")


def test_a_record_that_cannot_follow_is_refused_with_its_offset(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    offset = store.journal.append({"op": "trained", "args": {"step": 4, "now": 0.0}})
    store.close()
    with pytest.raises(JournalError, match=f"record at byte {offset}"):
        start(tmp_path / "j")


def test_after_a_failed_write_every_call_with_effect_is_refused_until_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = start(tmp_path / "j")

    def full(file: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(JournalError, match="No space left"):
            admit(store, 0, 1)
    assert store.problem is not None
    with pytest.raises(JournalError, match="must be rebuilt"):
        admit(store, 1, 1)
    store.close()
    again = start(tmp_path / "j")
    assert admit(again, 0, 2) == [0, 1]
    again.close()


def test_the_controller_moves_the_limit_and_a_restart_remembers_it(tmp_path: Path) -> None:
    rules = BufferRules(groups_per_step=1, max_staleness=2, adaptive_slots=True)
    store = start(tmp_path / "j", rules=rules)
    for number in range(1, 6):
        admit(store, store.next_ordinal, store.slots.free)
        finish(store, 9, version=number - 1)
        store.take(count=1, step=number, now=2.0)
        store.trained(step=number, now=2.0)
        store.release(step=number, wait_s=0.0, step_s=1.0)
        store.release(step=number, wait_s=9.0, step_s=9.0)  # a repeated answer is not a second observation
    assert store.slots.limit == 2
    store.close()
    store = start(tmp_path / "j", rules=rules)
    assert store.slots.limit == 2
    store.checkpoint(step=5)
    store.close()
    store = start(tmp_path / "j", rules=rules)
    assert store.slots.limit == 2
    store.close()


def test_changes_tell_what_happened_and_replay_tells_nothing_twice(tmp_path: Path) -> None:
    store = start(tmp_path / "j")
    admit(store, 0, 2)
    store.lease(worker="w", count=1, now=0.0)
    store.lose_worker(worker="w", now=1.0)
    assert [(c.kind, c.group_id, c.worker) for c in store.changes] == [(ChangeKind.REISSUED, 0, "w")]
    store.close()
    store = start(tmp_path / "j")
    assert store.changes == []
    assert store.ledger.state_of(0) is State.ISSUED
    store.close()


def test_a_finished_step_is_on_disk_before_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    store = start(tmp_path / "j")
    monkeypatch.setattr(store.journal, "sync", lambda: synced.append(store.journal.end))
    admit(store, 0, 4)
    finish(store, 4)
    store.take(count=2, step=1, now=2.0)
    assert synced == []
    store.trained(step=1, now=2.0)
    assert synced == [store.journal.end]
    store.trained(step=1, now=2.0)
    store.take(count=2, step=2, now=2.0)
    store.skip(step=2, now=2.0)
    assert synced[1:] == [store.journal.end]
