"""Before anything is cut it is certain what a run goes on from: a checkpoint that is whole, with its ledger."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from tiny_models import random_model
from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules
from trl_ray.buffer.journal_reach import LEDGER_COPY, groups_again, journal_reach, read_copy, write_copy
from trl_ray.errors import CheckpointError, ConfigError, JournalError, RunError
from trl_ray.models.checkpoint import begin_checkpoint, finish_checkpoint
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import JsonLines, read_json_lines
from trl_ray.pipelines.run.going_back import Return, RunOrigin, Wish, find_return, leave_aside, resolve

RULES = BufferRules(groups_per_step=2, max_staleness=1)
MODEL = random_model()
ORIGIN = RunOrigin(pipeline="grpo", model=None)


def admit(store: DurableLedger, upto: int) -> None:
    names = [f"0:{number}" for number in range(upto)]
    store.admit(prompt_ids=names, prompts=[name.encode() for name in names], version=0, now=0.0)


def train(store: DurableLedger, step: int) -> None:
    """Two groups a step, and two more on their way."""
    admit(store, 2 * step + 2)
    for key in store.lease(worker="w", count=2, now=0.0):
        key_of = {"group_id": key.group_id, "attempt": key.attempt}
        store.commit(**key_of, min_version=step - 1, max_version=step - 1, payload=b"p", now=0.0)
    store.take(count=2, step=step, now=0.0)
    store.trained(step=step, now=0.0)
    store.release(step=step, wait_s=0.0, step_s=1.0)


def save(run: RunDirectory, step: int, copy: bytes | None) -> None:
    begin_checkpoint(run.checkpoints, step=step)
    extra = {} if copy is None else {LEDGER_COPY: copy}
    finish_checkpoint(run.checkpoints, step=step, model=MODEL, trainer_state={"step": step}, extra=extra)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Four steps with a checkpoint each; the journal has forgotten what was before step 3."""
    run = RunDirectory.create(tmp_path / "run")
    with closing(DurableLedger(path=run.journal, rules=RULES, incarnation="one", now=0.0)) as store:
        for step in (1, 2, 3, 4):
            train(store, step)
            save(run, step, write_copy(store.copy_of(step=step, now=0.0)))
            if step > 1:
                store.checkpoint(step=step - 1)
    run.metrics.write_text("".join(f'{{"step":{step}}}\n' for step in (1, 2, 3, 4)))
    for step in (1, 2, 3, 4):
        run.completions_file(step).write_bytes(b"")
    return run


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_checkpoints(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        damage(run.checkpoint(step) / "model.safetensors")


def look(run: RunDirectory, **wish: object) -> Return:
    """`find_return`, which must change nothing."""
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    try:
        return find_return(run, origin=ORIGIN, wish=Wish(**wish), has_journal=True)  # type: ignore[arg-type]
    finally:
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_e09_a_checkpoint_of_another_pipeline_or_model_is_none_of_the_run(run: RunDirectory, tmp_path: Path) -> None:
    begin_checkpoint(run.checkpoints, step=5)
    other = RunOrigin(pipeline="sft", model=None)
    finish_checkpoint(run.checkpoints, step=5, model=MODEL, trainer_state={}, extra=other.file())
    back = look(run)
    assert back.step == 4 and "has pipeline grpo and not sft" in back.problems[0]
    with pytest.raises(CheckpointError, match="has pipeline grpo and not sft"):
        look(run, at=5)
    shape = json.loads((run.checkpoint(4) / "config.json").read_text())
    for changes, is_fine in (({}, True), ({"vocab_size": 7}, True), ({"hidden_size": 7}, False)):
        (tmp_path / "config.json").write_text(json.dumps({**shape, **changes}))
        mine = RunOrigin(pipeline="grpo", model=str(tmp_path))
        if is_fine:
            mine.check(run.checkpoint(4))
        else:
            with pytest.raises(CheckpointError, match=rf"hidden_size 7 and not {shape['hidden_size']}"):
                mine.check(run.checkpoint(4))


def test_e13_that_there_is_none_is_told(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert leave_aside(run, look(run)) == ["there is no checkpoint to go on from: training begins anew, at step 0"]


def test_a_run_goes_on_from_its_newest_checkpoint(run: RunDirectory) -> None:
    assert look(run) == Return(checkpoint=str(run.checkpoint(4)), step=4)


def test_a_damaged_one_is_left_aside_for_the_one_before_and_told(run: RunDirectory) -> None:
    damage_checkpoints(run, 4)
    back = look(run)
    assert back.step == 3 and back.ledger_copy is None
    damaged, aside = leave_aside(run, back)
    assert "step-4/model.safetensors must match its checksum" in damaged and "step-4.left" in aside
    assert len(read_json_lines(run.metrics)) == 4  # metrics are cut once all is there to train the steps again


def test_where_the_journal_reaches_no_further_the_ledger_of_the_checkpoint_does(run: RunDirectory) -> None:
    damage_checkpoints(run, 3, 4)
    back = look(run)
    assert back.step == 2 and back.ledger_copy == str(run.checkpoint(2) / LEDGER_COPY)
    told = leave_aside(run, back)[-1]
    assert "does not reach back to step 2: it reaches from step 3 to step 4" in told
    assert "steps 3 to 4 are trained again, 2 groups that were on their way then (4, 5) are generated again" in told
    assert not run.journal.exists() and (run.path / "journal.bin.left").exists()


def test_the_new_journal_has_the_account_of_the_checkpoint_and_restarts_to_the_same(run: RunDirectory) -> None:
    copy = read_copy(run.checkpoint(2) / LEDGER_COPY)
    assert groups_again(copy) == [4, 5]
    run.journal.unlink()
    for incarnation in ("two", "two"):
        store = DurableLedger(
            path=run.journal, rules=RULES, incarnation=incarnation, now=0.0, resume_from_step=2, copy=lambda: copy
        )
        with closing(store):
            store.check()
            balance = store.snapshot()
            assert (balance.issued, balance.trained, balance.live["issued"], balance.step) == (6, 4, 2, 2)
            assert store.prompt(5) == b"0:5" and store.next_ordinal == 6
    with closing(DurableLedger(path=run.journal, rules=RULES, incarnation="two", now=0.0)) as store:
        train(store, 3)
        store.check()
        assert store.snapshot().trained == 6
    assert journal_reach(run.journal).covers(2) and not journal_reach(run.journal).covers(1)


@pytest.mark.parametrize("how", ["missing", "empty", "half", "flipped", "no journal"])
def test_a_journal_that_is_lost_is_told_with_what_is_left_and_what_to_do(run: RunDirectory, how: str) -> None:
    content = run.journal.read_bytes()
    if how == "missing":
        run.journal.unlink()
    elif how == "flipped":
        damage(run.journal)
    else:
        run.journal.write_bytes({"empty": b"", "half": content[: len(content) // 2], "no journal": b"x" * 900}[how])
    with pytest.raises(JournalError, match=r"--from-checkpoint 4 --new-journal") as caught:
        look(run)
    assert "step-4 itself can be used" in str(caught.value) and "Nothing was changed" in str(caught.value)
    back = look(run, at=4, new_journal=True)
    assert back.step == 4 and back.forgets == "new_journal was asked for"
    told = leave_aside(run, back)[-1]
    assert "2 groups that were on their way then (8, 9) are generated again" in told
    assert ("kept as journal.bin.left" in told) == (how != "missing")


def test_a_start_that_ended_between_the_two_journals_is_gone_on_with(run: RunDirectory) -> None:
    damage_checkpoints(run, 3, 4)
    leave_aside(run, look(run))
    for begun in (None, b"", b"trl_ray-journal 1\n"):
        if begun is not None:
            run.journal.write_bytes(begun)
        back = look(run)
        assert back.step == 2 and back.ledger_copy == str(run.checkpoint(2) / LEDGER_COPY)
        told = leave_aside(run, back)[-1]
        assert "an earlier start left the journal aside (journal.bin.left" in told
        assert "2 groups that were on their way then (4, 5) are generated again" in told
    copy = read_copy(run.checkpoint(2) / LEDGER_COPY)
    given = {"path": run.journal, "rules": RULES, "incarnation": "two", "now": 0.0}
    DurableLedger(**given, resume_from_step=2, copy=lambda: copy).close()  # type: ignore[arg-type]
    assert look(run) == Return(checkpoint=str(run.checkpoint(2)), step=2)


def test_a_journal_that_was_left_is_no_excuse_where_the_checkpoint_has_no_copy(run: RunDirectory) -> None:
    leave_aside(run, look(run, at=2, new_journal=True))
    save(run, 3, None)
    with pytest.raises(JournalError, match=r"it is empty or missing.*Begin a new run from its weights"):
        look(run)


def test_a_session_that_was_lost_before_the_new_journal_was_begun_leaves_its_reason_to_the_next(
    run: RunDirectory,
) -> None:
    def again(before: Return) -> Return:
        return find_return(run, origin=ORIGIN, has_journal=True, before=before)

    run.journal.unlink()  # nothing is left aside that could tell of it
    first = look(run, new_journal=True)
    leave_aside(run, first)
    second = again(first)
    assert second == first and second.ledger_copy is not None
    copy = read_copy(second.ledger_copy)
    given = {"path": run.journal, "rules": RULES, "incarnation": "two", "now": 0.0}
    DurableLedger(**given, resume_from_step=4, copy=lambda: copy).close()  # type: ignore[arg-type]
    third = again(second)
    assert third == Return(checkpoint=str(run.checkpoint(4)), step=4)
    damage(run.journal)
    assert again(third) == third  # in order as far as this process knows: the queue alone opens it


def test_without_a_copy_of_the_ledger_the_weights_are_left(run: RunDirectory) -> None:
    save(run, 5, None)
    run.journal.unlink()
    for wish in ({}, {"at": 5, "new_journal": True}):
        with pytest.raises(JournalError, match=r"model_name_or_path=.*step-5"):
            look(run, **wish)


def test_when_no_checkpoint_is_whole_the_run_is_refused_and_each_is_named(run: RunDirectory) -> None:
    damage_checkpoints(run, 1, 2, 3, 4)
    with pytest.raises(CheckpointError, match=r"none in .* is: .*step-4.*step-3.*step-2.*step-1.*Nothing was changed"):
        look(run)


def test_a_run_without_any_checkpoint_begins_anew_and_its_journal_must_know_the_beginning(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert look(run) == Return()
    with closing(DurableLedger(path=run.journal, rules=RULES, incarnation="one", now=0.0)) as store:
        train(store, 1)
    assert look(run) == Return()
    damage(run.journal)
    with pytest.raises(JournalError, match="--from-checkpoint 0 --new-journal"):
        look(run)
    assert look(run, at=0, new_journal=True).ledger_copy is None


def test_a_copy_that_cannot_be_read_is_an_error_before_anything_is_left(run: RunDirectory) -> None:
    for content in ("{", json.dumps({"format": 2}), "[]"):
        (run.checkpoint(4) / LEDGER_COPY).write_text(content)
        with pytest.raises(CheckpointError, match=LEDGER_COPY):
            read_copy(run.checkpoint(4) / LEDGER_COPY)


def test_what_was_asked_for_must_be_there(run: RunDirectory) -> None:
    output_dir = str(run.path)
    with pytest.raises(ConfigError, match=r"which has step-1, step-2, step-3, step-4 in .*; got .*step-9"):
        resolve(Wish(at=9), output_dir, within=2)
    with pytest.raises(ConfigError, match=r"one of the last 2 checkpoints.*--from-checkpoint 1 --new-journal"):
        resolve(Wish(at=1), output_dir, within=2)
    assert resolve(Wish(at=1, new_journal=True), output_dir, within=2).at == 1
    with pytest.raises(ConfigError, match="new_journal must be false"):
        resolve(Wish(new_journal=True), output_dir, within=None)
    assert resolve(Wish(given=True), output_dir, within=2).at is None
    assert resolve(Wish(given=str(run.checkpoint(3))), output_dir, within=2).at == 3


def test_metrics_are_cut_in_place_under_a_writer_that_is_open_and_on_a_full_disk(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise RunError("No space left")

    monkeypatch.setattr("trl_ray.observe.run_directory.atomic_write_text", full)
    lines = JsonLines(run.metrics)
    run.truncate_after(2)
    lines.append({"step": 3, "again": True})
    lines.close()
    assert [record["step"] for record in read_json_lines(run.metrics)] == [1, 2, 3]
    assert read_json_lines(run.metrics)[-1]["again"]
    assert sorted(path.name for path in run.completions.iterdir()) == ["step-000001.parquet", "step-000002.parquet"]
