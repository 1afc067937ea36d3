import json
import os
from pathlib import Path

import pytest

from trl_ray.errors import ConfigError, RunError
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import JsonLines, atomic_write_json, atomic_write_text, jsonable, read_json_lines
from trl_ray.observe.run_lock import LOCK, RunLock


def test_create_lays_out_a_new_run_and_open_finds_it(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "run")
    assert run.metrics.read_text() == "" and run.completions.is_dir() and run.checkpoints.is_dir()
    assert RunDirectory.open_existing(run.path) == run
    assert run.completions_file(12).name == "step-000012.parquet" and run.checkpoint(12).name == "step-12"


def test_a_directory_that_holds_a_run_is_refused_untouched(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.metrics.write_text('{"step":1}\n')
    with pytest.raises(ConfigError, match=r"overwrite_output_dir=true, or continue it: trl-ray resume .*/run"):
        RunDirectory.create(run.path)
    assert run.metrics.read_text() == '{"step":1}\n'


def test_overwrite_deletes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.metrics.write_text('{"step":1}\n')
    (run.path / "notes.txt").write_text("mine")
    run.checkpoint(1).mkdir()
    (run.path / "journal.bin.left").write_text("old")
    (run.path / "journal.bin.payloads.left").mkdir()
    RunDirectory.create(run.path, overwrite=True)
    assert not list(run.path.glob("*.left"))
    assert run.metrics.read_text() == "" and not run.checkpoint(1).exists()
    assert (run.path / "notes.txt").read_text() == "mine"


def test_overwrite_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="other files"):
        RunDirectory.create(tmp_path, overwrite=True)
    assert (tmp_path / "checkpoints").is_dir()


def test_a_file_in_the_way_and_a_missing_run_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="must be a folder"):
            RunDirectory.create(path)
    with pytest.raises(ConfigError, match="must exist"):
        RunDirectory.open_existing(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"must hold metrics\.jsonl"):
        RunDirectory.open_existing(tmp_path)


def test_truncate_after_forgets_later_metrics_and_completions_but_keeps_events(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.metrics.write_text('{"step":1}\n{"step":2}\n{"step":3}\n{"step":4,"lo')
    run.events.write_text('{"kind":"warning"}\n')
    for step in (2, 3):
        run.completions_file(step).write_bytes(b"")
    run.truncate_after(2)
    assert [record["step"] for record in read_json_lines(run.metrics)] == [1, 2]
    assert run.completions_file(2).exists() and not run.completions_file(3).exists()
    assert run.events.read_text() == '{"kind":"warning"}\n'


def test_json_is_replaced_as_a_whole_and_strict(tmp_path: Path) -> None:
    target = tmp_path / "ledger.json"
    atomic_write_json(target, {"issued": 1})
    atomic_write_json(target, {"issued": 2, "share": float("nan")})
    assert json.loads(target.read_text()) == {"issued": 2, "share": None}
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "inside").touch()
    with pytest.raises(RunError, match="must stay writable"):
        atomic_write_text(target, "text")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_torn_last_line_costs_that_line_only(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"a":1}\n{"a":')
    lines = JsonLines(file)
    lines.append({"a": "line\nseparator \u2028\x85"})
    lines.close()
    assert read_json_lines(file) == [{"a": 1}, {"a": "line\nseparator \u2028\x85"}]


def test_a_full_disk_is_a_run_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(RunError, match="No space left"):
        JsonLines(full).append({"a": 1})


def test_lone_surrogates_and_foreign_objects_become_json() -> None:
    assert jsonable({1: "\ud800", "path": Path("x"), "set": {2}}) == {"1": "?", "path": "x", "set": [2]}


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "b" * 300 + "/run", "/".join(["c" * 200] * 30), "lone\ud800"])
def test_a_path_that_no_folder_can_have_is_told_in_a_short_sentence(tmp_path: Path, name: str) -> None:
    for refuse in (RunDirectory.check_free, RunDirectory.create, RunDirectory.open_existing, RunLock.hold):
        with pytest.raises(ConfigError, match=r"must be") as caught:
            refuse(f"{tmp_path}/{name}")
        assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"must be a folder that can be written, got .*/a/run"):
        RunDirectory.check_free(tmp_path / "a" / "run")
    with pytest.raises(ConfigError, match="must be a folder that can be written"):
        RunDirectory.check_free(tmp_path)


def test_a_lock_alone_is_no_run(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{}")
    RunDirectory.check_free(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        RunDirectory.check_free(tmp_path)
