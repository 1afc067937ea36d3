"""Compaction beside the calls: what is written meanwhile is part of it, and whatever fails leaves the journal alone."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trl_ray.buffer.compaction import Compaction
from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules
from trl_ray.buffer.journal import Journal, JournalDraft, Rewrite
from trl_ray.errors import JournalError

RULES = BufferRules(groups_per_step=2, max_staleness=1, lease_s=10.0)


def start(path: Path, incarnation: str = "one", **changes: Any) -> DurableLedger:
    return DurableLedger(**{"path": path, "rules": RULES, "incarnation": incarnation, "now": 0.0} | changes)


def run_steps(store: DurableLedger, steps: range) -> None:
    for step in steps:
        names = [f"0:{n}" for n in range(store.next_ordinal, store.next_ordinal + store.slots.free)]
        store.admit(prompt_ids=names, prompts=[b"prompt"] * len(names), version=step - 1, now=0.0)
        for key in store.lease(worker="w", count=9, now=0.0):
            versions = {"min_version": step - 1, "max_version": step - 1}
            store.commit(group_id=key.group_id, attempt=0, **versions, payload=b"%d" % key.group_id, now=1.0)
        store.take(count=2, step=step, now=2.0)
        store.trained(step=step, now=2.0)
        store.release(step=step, wait_s=0.0, step_s=1.0)


def state_of(store: DurableLedger) -> dict[str, Any]:
    store.check()
    return {"ledger": store.ledger.to_state(), "prompts": dict(store._prompts), "names": list(store._prompt_ids)}


def reopened(path: Path) -> dict[str, Any]:
    with closing(start(path)) as store:
        return state_of(store)


def test_what_is_written_while_a_journal_is_rewritten_is_in_the_new_one(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "j")) as journal:
        journal.append({"n": 0})
        rewrite = Rewrite(journal)

        def drafts() -> Iterator[JournalDraft]:
            journal.append({"n": 1}, b"one")
            yield JournalDraft(head={"n": "all before"})

        rewrite.write(drafts())
        journal.append({"n": 2}, b"two")
        rewrite.finish()
        journal.append({"n": 3}, b"three")
        assert [record.head["n"] for record in journal.records()] == ["all before", 1, 2, 3]
        assert journal.end == os.path.getsize(tmp_path / "j")
    with closing(Journal(tmp_path / "j")) as journal:
        assert [record.payload for record in journal.records()] == [b"", b"one", b"two", b"three"]


def test_steps_go_on_while_the_journal_is_compacted(tmp_path: Path) -> None:
    with closing(start(tmp_path / "j")) as store:
        run_steps(store, range(1, 40))
        long = store.journal.end
        store.checkpoint(step=30, saved=39, compact=False)
        compaction = store.begin_compaction()
        run_steps(store, range(40, 42))
        compaction.run()
        run_steps(store, range(42, 44))
        assert store.end_compaction(compaction)
        assert store.journal.end < long / 2
        run_steps(store, range(44, 46))
        before = state_of(store)
    assert reopened(tmp_path / "j") == before


@pytest.mark.parametrize("when", ["before it runs", "after it ran"])
def test_a_restore_ends_a_compaction_because_it_changes_what_that_writes(tmp_path: Path, when: str) -> None:
    with closing(start(tmp_path / "j")) as store:
        run_steps(store, range(1, 10))
        store.checkpoint(step=5, saved=9, compact=False)
        compaction = store.begin_compaction()
        if when == "after it ran":
            compaction.run()
        store.restore(step=5, version=None, mark="learner lost", now=3.0)
        if when == "before it runs":
            compaction.run()
        assert not store.end_compaction(compaction)
        assert not os.path.exists(tmp_path / "j.new")
        before = state_of(store)
    assert reopened(tmp_path / "j") == before


def test_closing_waits_for_the_writing_thread_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = start(tmp_path / "j")
    run_steps(store, range(1, 4))
    begun, go_on = threading.Event(), threading.Event()
    true_part = Compaction._part

    def slow_part(self: Compaction, *args: Any) -> JournalDraft:
        begun.set()
        assert go_on.wait(10)
        return true_part(self, *args)

    monkeypatch.setattr(Compaction, "_part", slow_part)
    compaction = store.begin_compaction()
    writing = threading.Thread(target=compaction.run)
    writing.start()
    assert begun.wait(10)
    closing_ = threading.Thread(target=store.close)
    closing_.start()
    go_on.set()
    closing_.join(10)
    writing.join(10)
    assert not store.end_compaction(compaction)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["j", "j.lock", "j.payloads"]
    reopened(tmp_path / "j")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_journal_as_it_was_and_no_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with closing(start(tmp_path / "j")) as store:
        run_steps(store, range(1, 4))
        compaction = store.begin_compaction()

        def full(*args: Any) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(JournalError, match="could not be compacted"):
                compaction.run()
                store.end_compaction(compaction)
        assert not os.path.exists(tmp_path / "j.new")
        assert store.problem is None
        run_steps(store, range(4, 6))
        before = state_of(store)
    assert reopened(tmp_path / "j") == before


def test_what_a_killed_compaction_left_is_removed_when_the_journal_is_opened(tmp_path: Path) -> None:
    (tmp_path / "j.new").write_bytes(b"half a journal")
    start(tmp_path / "j").close()
    assert not os.path.exists(tmp_path / "j.new")


def test_killed_at_any_byte_of_a_compacted_journal_only_a_cut_snapshot_is_refused(tmp_path: Path) -> None:
    with closing(start(tmp_path / "j")) as store:
        run_steps(store, range(1, 4))
        store.checkpoint(step=2, saved=3)
        base = store.journal.end
        run_steps(store, range(4, 5))
    whole = (tmp_path / "j").read_bytes()
    for cut in range(0, len(whole) + 1, 7):
        (tmp_path / "copy").write_bytes(whole[:cut])
        try:
            with closing(start(tmp_path / "copy", "two", resume_from_step=0 if cut < 19 else 2)) as store:
                store.check()
        except JournalError:
            assert 18 < cut < base
        else:
            assert cut <= 18 or cut >= base


@pytest.mark.parametrize("tail", [bytes(32 << 20), b"0" * (4 << 20), b"00000000 0 {" * (1 << 18), b"x\n" * (1 << 20)])
def test_a_long_damaged_end_is_cut_off_in_no_time(tmp_path: Path, tail: bytes) -> None:
    with closing(Journal(tmp_path / "j")) as journal:
        journal.append({"n": 0}, b"kept")
    with (tmp_path / "j").open("ab") as file:
        file.write(tail)
    with closing(Journal(tmp_path / "j")) as journal:
        assert journal.truncated_bytes == len(tail)
        assert [record.payload for record in journal.records()] == [b"kept"]
        journal.append({"n": 1})
