"""Looking into a journal takes no more room than its copy, and lack of room is no fault of the journal."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules
from trl_ray.buffer.journal_reach import journal_reach

RULES = BufferRules(groups_per_step=2, max_staleness=1)


@pytest.fixture
def old_journal(tmp_path: Path) -> Path:
    """One of an earlier version, which has two finished groups of 10 kB in it."""
    path = tmp_path / "journal.bin"
    with closing(DurableLedger(path=path, rules=RULES, incarnation="one", now=0.0)) as store:
        store.admit(prompt_ids=["0", "1"], prompts=[b"a", b"b"], version=0, now=0.0)
        for key in store.lease(worker="w", count=2, now=0.0):
            args = {"group_id": key.group_id, "attempt": 0, "min_version": 0, "max_version": 0, "now": 0.0}
            store.journal.append({"op": "commit", "args": args}, b"x" * 10_000)
    return path


def refuse(*given: Any, **named: Any) -> int:
    raise OSError(28, "No space left on device")


def test_looking_leaves_the_payloads_in_the_copy(
    old_journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    found: list[set[str]] = []
    close = DurableLedger.close

    def look_and_close(self: DurableLedger) -> None:
        found.append({each.name for each in self.journal.path.parent.rglob("*")})
        close(self)

    monkeypatch.setattr(DurableLedger, "close", look_and_close)
    assert journal_reach(old_journal).covers(0)
    assert found == [{"journal.bin", "journal.bin.lock"}]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda patch: patch.setattr(shutil, "copyfile", refuse),
        lambda patch: patch.setattr(tempfile, "mkdtemp", refuse),
        lambda patch: patch.setattr(os, "ftruncate", refuse),
    ],
    ids=["copy", "folder", "opening"],
)
def test_no_room_to_look_says_nothing_of_the_journal(
    old_journal: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with old_journal.open("ab") as file:
        file.write(b"torn")  # is cut off when it is opened
    before = old_journal.read_bytes()
    with monkeypatch.context() as patch:
        break_it(patch)
        reach = journal_reach(old_journal)
    assert reach.is_unknown and reach.problem is None and reach.covers(7)
    assert old_journal.read_bytes() == before
    assert not journal_reach(old_journal).covers(7)


def test_a_damaged_journal_is_told_by_its_own_name(old_journal: Path) -> None:
    content = bytearray(old_journal.read_bytes())
    content[40] ^= 1
    old_journal.write_bytes(content)
    reach = journal_reach(old_journal)
    assert str(old_journal) in str(reach) and "damaged at byte 18" in str(reach) and not reach.covers(0)
