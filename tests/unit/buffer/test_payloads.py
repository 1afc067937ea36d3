"""Payloads beside the journal: what is kept how long, and what becomes of a group whose payload is gone."""

import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules, ChangeKind, Outcome, State
from trl_ray.buffer.news import News, NewsKind
from trl_ray.buffer.payloads import Payloads, Place
from trl_ray.errors import JournalError

GOLDEN = Path(__file__).parents[2] / "golden" / "journal-with-payloads.bin"
RULES = BufferRules(groups_per_step=2, max_staleness=1, lease_s=10.0)


def start(path: Path, incarnation: str = "one", **changes: Any) -> DurableLedger:
    return DurableLedger(**{"path": path, "rules": RULES, "incarnation": incarnation, "now": 0.0} | changes)


def admit(store: DurableLedger, version: int = 0) -> list[int]:
    names = [f"0:{n}" for n in range(store.next_ordinal, store.next_ordinal + store.slots.free)]
    return store.admit(prompt_ids=names, prompts=[b"prompt"] * len(names), version=version, now=0.0)


def news_of(store: DurableLedger, count: int, version: int = 0) -> list[News]:
    return [
        News(
            kind=NewsKind.COMMITTED,
            group_id=key.group_id,
            attempt=key.attempt,
            min_version=version,
            max_version=version,
            payload=b"group %d/%d" % (key.group_id, key.attempt),
        )
        for key in store.lease(worker="w", count=count, now=0.0)
    ]


def train(store: DurableLedger, step: int) -> list[int]:
    taken = store.take(count=2, step=step, now=2.0)
    store.trained(step=step, now=2.0)
    store.release(step=step, wait_s=0.0, step_s=1.0)
    return taken


def run_steps(store: DurableLedger, steps: range) -> None:
    for step in steps:
        admit(store, step - 1)
        store.report(news=news_of(store, 9, step - 1), now=1.0)
        train(store, step)


def files(path: Path) -> list[str]:
    return sorted(file.name for file in Path(f"{path}.payloads").iterdir())


def test_a_file_is_deleted_once_it_holds_nothing_that_is_kept_and_its_number_never_comes_again(tmp_path: Path) -> None:
    payloads = Payloads(tmp_path / "p", file_bytes=10)
    [first, second] = payloads.append([b"123456", b"7890ab"])
    [third] = payloads.append([b"c"])
    assert [first, third] == [Place(0, 0, 6, first.crc), Place(1, 0, 1, third.crc)]
    payloads.keep([second])
    assert [payloads.read(second), payloads.read(third)] == [b"7890ab", b"c"]
    payloads.keep([])
    assert not payloads.is_intact(second)
    payloads.close()
    again = Payloads(tmp_path / "p")
    again.reserve(Place(7, 0, 1, 0))
    again.keep([])
    assert again.append([b"d"])[0].file == 8
    again.close()


def test_many_news_are_one_record_and_each_has_its_own_outcome(tmp_path: Path) -> None:
    with closing(start(tmp_path / "j")) as store:
        admit(store)
        [a, b, c, d] = news_of(store, 4)
        late = News(kind=NewsKind.GENERATED, group_id=a.group_id, attempt=7)
        failed = News(kind=NewsKind.FAILED, group_id=c.group_id, attempt=0, because="engine died")
        before = len(list(store.journal.records()))
        generated = News(kind=NewsKind.GENERATED, group_id=b.group_id, attempt=0)
        assert store.report(news=[generated, a, late, b, a, failed, d], now=1.0) == [
            Outcome.APPLIED, Outcome.APPLIED, Outcome.FENCED, Outcome.APPLIED, Outcome.REPEATED, Outcome.APPLIED,
            Outcome.APPLIED,
        ]  # fmt: skip
        assert len(list(store.journal.records())) == before + 1
        state = store.ledger.to_state()
    with closing(start(tmp_path / "j")) as store:
        assert store.ledger.to_state() == state
        assert [store.payload(g) for g in (0, 1, 3)] == [b"group 0/0", b"group 1/0", b"group 3/0"]
        assert store.ledger.state_of(2) is State.ISSUED


def test_payloads_of_trained_groups_go_unless_a_saved_step_would_train_them_again(tmp_path: Path) -> None:
    with closing(start(tmp_path / "j")) as store:
        run_steps(store, range(1, 4))
        # Step 0 is where a restore may go: only groups 0 to 3 were sampled by its weights.
        assert store.ledger.finished() == [0, 1, 2, 3, 6, 7]
        store.checkpoint(step=0, saved=3)
        run_steps(store, range(4, 30))
        # Of step 3, 6 and 7 were ready already, and its weights sampled 8 and 9. 58 and 59 are ready now.
        assert store.ledger.finished() == [0, 1, 2, 3, 6, 7, 8, 9, 58, 59]
        store.checkpoint(step=3, saved=29)
        assert store.ledger.finished() == [6, 7, 8, 9, 58, 59]
        store.check()
    with closing(start(tmp_path / "j", "two", resume_from_step=3)) as store:
        store.check()
        assert [store.ledger.state_of(g) for g in (6, 7, 8, 9)] == [State.READY] * 4
        assert [store.ledger.state_of(g) for g in (10, 30, 59)] == [State.ISSUED] * 3
        assert train(store, 4) == [6, 7]


def test_a_long_run_keeps_few_payload_files(tmp_path: Path) -> None:
    with closing(start(tmp_path / "j")) as store:
        store._payloads._file_bytes = 1
        saved = 0
        for first in range(1, 61, 10):
            run_steps(store, range(first, first + 10))
            store.checkpoint(step=saved, saved=first + 9)
            saved = first + 9
        # Two steps may be restored, with at most four groups each, beside four that are live.
        assert len(files(tmp_path / "j")) <= 12
        store.check()


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_ready_group_whose_payload_is_damaged_is_issued_again_and_no_other(tmp_path: Path, how: str) -> None:
    with closing(start(tmp_path / "j")) as store:
        admit(store)
        store.report(news=news_of(store, 2), now=1.0)
        store.take(count=2, step=1, now=2.0)
        store.report(news=news_of(store, 2), now=1.0)
    [file] = Path(tmp_path / "j.payloads").iterdir()
    whole = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if how == "cut" else whole[:-1] + b"?")
    with closing(start(tmp_path / "j")) as store:
        store.check()
        lost = [3] if how != "gone" else [2, 3]
        assert [(c.kind, c.group_id, c.because) for c in store.changes] == [
            (ChangeKind.REISSUED, g, "payload lost") for g in lost
        ]
        assert [key.group_id for key in store.lease(worker="w", count=9, now=5.0)] == lost
        # The learner may have them already, so that nobody makes taken groups again.
        assert store.ledger.groups_of(1) == [0, 1]
        if how == "gone":
            with pytest.raises(JournalError, match="must hold 9 intact bytes"):
                store.payload(0)
        state = store.ledger.state_of(2), store.ledger.state_of(3)
    with closing(start(tmp_path / "j")) as store:
        assert (store.ledger.state_of(2), store.ledger.state_of(3)) == state


def test_a_restore_issues_again_what_lost_its_payload_and_every_later_replay_agrees(tmp_path: Path) -> None:
    with closing(start(tmp_path / "j")) as store:
        admit(store)
        store.report(news=news_of(store, 4), now=1.0)
        train(store, 1)
    shutil.rmtree(tmp_path / "j.payloads")
    with closing(start(tmp_path / "j", "two", resume_from_step=0)) as store:
        store.check()
        assert [store.ledger.state_of(g) for g in range(4)] == [State.ISSUED] * 4
        store.report(news=news_of(store, 2), now=3.0)
        assert train(store, 1) == [0, 1]
        state = store.ledger.to_state()
    for _ in range(2):
        with closing(start(tmp_path / "j", "two", resume_from_step=0)) as store:
            store.check()
            assert store.ledger.to_state() == state


def test_a_journal_that_holds_the_payloads_itself_is_still_read(tmp_path: Path) -> None:
    shutil.copy(GOLDEN, tmp_path / "j")
    rules = BufferRules(groups_per_step=2, max_staleness=1, max_look_ahead=2, lease_s=10.0)
    for _ in range(2):
        with closing(start(tmp_path / "j", rules=rules)) as store:
            store.check()
            snapshot = store.snapshot()
            assert (snapshot.issued, snapshot.trained, snapshot.fenced, snapshot.reissued) == (8, 4, 1, 2)
            assert [store.payload(g) for g in (4, 5, 6, 7)] == [
                b"group 4/2", b"group 5/0", b"group 6/0", b"group 7/0"
            ]  # fmt: skip
    with closing(start(tmp_path / "j", "two", rules=rules, resume_from_step=1)) as store:
        assert store.take(count=2, step=2, now=20.0) == [2, 3]
        assert [store.payload(2), store.prompt(7)] == [b"group 2/0", b"prompt 7"]
        store.trained(step=2, now=21.0)
        store.checkpoint(step=2)
        # The weights that sampled it do not exist any more.
        assert store.ledger.state_of(4) is State.ISSUED
        store.check()


def test_a_payload_that_cannot_be_written_is_a_problem_and_a_restart_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = start(tmp_path / "j")
    admit(store)
    news = news_of(store, 2)
    real = os.write

    def full(file: int, data: memoryview) -> int:
        if bytes(data).startswith(b"group"):
            return real(file, data[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(JournalError, match="No space left"):
            store.report(news=news, now=1.0)
    assert store.problem is not None
    store.close()
    with closing(start(tmp_path / "j")) as again:
        again.check()
        assert again.report(news=news, now=2.0) == [Outcome.APPLIED, Outcome.APPLIED]
        assert again.payload(1) == b"group 1/0"


def test_a_release_looks_at_no_group_that_was_released_before(tmp_path: Path) -> None:
    class Sealed(dict[int, Any]):
        def values(self) -> Any:
            raise AssertionError("a step must not look through everything that was ever settled")

        __iter__ = items = values

    with closing(start(tmp_path / "j")) as store:
        store.ledger._settled = Sealed()
        run_steps(store, range(1, 6))
        assert len(store.ledger._settled) == 10
        store.ledger._settled = dict(dict.items(store.ledger._settled))
        store.check()
