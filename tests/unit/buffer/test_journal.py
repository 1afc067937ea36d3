"""The journal: framing, torn tails, damage, locking, compaction."""

import os
from pathlib import Path

import pytest

from trl_ray.buffer.journal import Journal, JournalDraft
from trl_ray.errors import JournalError

PAYLOADS = [b"", b"plain", b'\n00000000 3 {"op":1}\nabc\n', bytes(range(256)) * 40]


def write(path: Path, count: int = 4) -> list[int]:
    journal = Journal(path)
    offsets = [journal.append({"n": n}, PAYLOADS[n % 4]) for n in range(count)]
    journal.close()
    return offsets


def heads(path: Path) -> list[int]:
    journal = Journal(path)
    found = [(record.head["n"], record.payload) for record in journal.records()]
    journal.close()
    assert found == [(n, PAYLOADS[n % 4]) for n in range(len(found))]
    return [n for n, _ in found]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    offsets = write(tmp_path / "j")
    journal = Journal(tmp_path / "j")
    assert [record.offset for record in journal.records()] == offsets
    assert journal.read(offsets[3]).payload == PAYLOADS[3]
    size = os.path.getsize(tmp_path / "j")
    assert journal.append({"n": 4}) == size
    journal.close()


def test_cut_anywhere_it_keeps_every_whole_record_and_reports_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ends = [*write(path)[1:], path.stat().st_size]
    data = path.read_bytes()
    for cut in [*range(0, 400), *range(len(data) - 60, len(data) + 1)]:
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        journal = Journal(path)
        assert len(list(journal.records())) == whole
        kept = max([18, *(end for end in ends if end <= cut)])
        assert journal.truncated_bytes == max(0, cut - kept)
        journal.append({"n": whole}, PAYLOADS[whole % 4])
        journal.close()
        assert heads(path) == list(range(whole + 1))


def test_damage_before_the_end_names_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "j"
    offsets = write(path)
    data = bytearray(path.read_bytes())
    for at in (offsets[1], offsets[1] + 12, offsets[2] - 3):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match=rf"{path} is damaged at byte {offsets[1]}, .* byte {offsets[2]}"):
            Journal(path)
        assert path.read_bytes() == damaged


def test_a_damaged_length_that_reaches_past_the_end_is_not_taken_for_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "j"
    offsets = write(path)
    data = path.read_bytes().replace(b' 5 {"n":1}', b' 9999999 {"n":1}')
    path.write_bytes(data)
    with pytest.raises(JournalError, match=f"damaged at byte {offsets[1]}"):
        Journal(path)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("my notes")
    with pytest.raises(JournalError, match="must be a journal"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_text() == "my notes"


def test_two_writers_cannot_open_it_and_closing_lets_the_next_one_in(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    with pytest.raises(JournalError, match="Only one writer"):
        Journal(tmp_path / "j")
    first.close()
    first.close()
    Journal(tmp_path / "j").close()


def test_the_lock_survives_compaction(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.compact([JournalDraft(head={"n": 0})])
    with pytest.raises(JournalError, match="Only one writer"):
        Journal(tmp_path / "j")
    journal.close()


def test_compaction_replaces_everything_and_may_read_from_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "j"
    offsets = write(path)
    journal = Journal(path)
    old = JournalDraft(head={"n": 1}, payload=journal.read(offsets[1]).payload)
    new = journal.compact(draft for draft in [JournalDraft(head={"n": 0}), old])
    assert journal.read(new[1]).payload == b"plain"
    journal.append({"n": 2}, PAYLOADS[2])
    journal.close()
    assert heads(path) == [0, 1, 2]


def test_a_crash_in_the_middle_of_compaction_leaves_the_old_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path)
    journal = Journal(path)

    def drafts():  # type: ignore[no-untyped-def]
        yield JournalDraft(head={"n": 0})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.compact(drafts())
    journal.close()
    assert heads(path) == [0, 1, 2, 3]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    write(path)
    journal = Journal(path)
    real = os.write

    def full(file: int, data: memoryview) -> int:
        if len(data) > 5:
            return real(file, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(JournalError, match="No space left"):
            journal.append({"n": 4}, b"123")
    journal.append({"n": 4}, PAYLOADS[0])
    journal.close()
    assert heads(path) == [0, 1, 2, 3, 4]


def test_writing_after_close_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.close()
    with pytest.raises(JournalError, match="it is closed"):
        journal.append({"n": 0})


def test_a_system_without_fdatasync_waits_for_the_disk_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    journal = Journal(tmp_path / "j")
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "fsync", synced.append)
    journal.sync()
    journal.sync_waiter()()
    assert len(synced) == 2
    journal.close()
