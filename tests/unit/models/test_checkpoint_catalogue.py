"""Whatever happens to a checkpoint, or while it is written: the good ones stay, and what is wrong is told by name.

E01 truncated  E02 missing  E03 bit flip  E04 killed while it is saved  E05 disk full  E06 read-only  E08 other version
E12 no optimizer  E16 the only good one is kept  E17 links and ``..``  E18 pickles  E19 clocks that go backwards
(E07, E09-E11, E13-E15, E20: test_going_back.py, test_run_lock.py and the integration tests of runs that go on)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import random_model
from trl_ray.errors import CheckpointError
from trl_ray.models import checkpoint as module
from trl_ray.models.checkpoint import (
    MANIFEST,
    TRAINER_STATE,
    begin_checkpoint,
    finish_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_trainer_state,
    prune,
    verify_checkpoint,
)

MODEL = random_model()
FILES = ("config.json", "generation_config.json", "model.safetensors", TRAINER_STATE, "progress.json", MANIFEST)


class KilledError(BaseException):
    """Nothing that the code under test is prepared for, as a process that dies is not."""


def save(directory: Path, step: int, **extra: bytes) -> Path:
    begin_checkpoint(directory, step=step)
    files = {"progress.json": b'{"rows": 12345678901234567890}', **extra}
    state = {"version": step, "optimizer": {"exp_avg": torch.ones(8)}}
    return Path(finish_checkpoint(directory, step=step, model=MODEL, trainer_state=state, extra=files))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    assert {file.name for file in save(folder, 1).iterdir()} == set(FILES)
    save(folder, 2)
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(checkpoints: Path, name: str) -> str:
    """What is said of the second checkpoint, in whose place the first is found; nothing is touched for it."""
    before = content(checkpoints)
    found = latest_checkpoint(checkpoints)
    assert found.path == str(checkpoints / "step-1")
    [problem] = found.problems
    assert name in problem and "step-2" in problem
    assert content(checkpoints) == before
    return problem


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_e01_a_truncated_file_is_named_and_the_checkpoint_before_is_found(
    checkpoints: Path, name: str, share: float
) -> None:
    file = checkpoints / "step-2" / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused(checkpoints, name)


@pytest.mark.parametrize("name", FILES)
def test_e02_a_missing_file_is_named_and_the_checkpoint_before_is_found(checkpoints: Path, name: str) -> None:
    (checkpoints / "step-2" / name).unlink()
    assert name == MANIFEST or "missing" in refused(checkpoints, name)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", FILES[:-1])
def test_e03_a_flipped_bit_is_found_in_every_file(checkpoints: Path, name: str, place: float) -> None:
    file = checkpoints / "step-2" / name
    damaged = bytearray(file.read_bytes())
    damaged[int(place * len(damaged))] ^= 1 << 4
    file.write_bytes(damaged)
    assert "checksum" in refused(checkpoints, name)


def test_e03_a_flipped_bit_anywhere_in_the_manifest_is_found(checkpoints: Path) -> None:
    file = checkpoints / "step-2" / MANIFEST
    good = file.read_bytes()
    for place in range(0, len(good), 7):
        for bit in (1, 64):
            damaged = bytearray(good)
            damaged[place] ^= bit
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="step-2"):
                verify_checkpoint(checkpoints / "step-2")


def failpoints(patch: pytest.MonkeyPatch, at: int) -> bool:
    """Die in the call number `at` of those that change the disk."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KilledError
            return function(*args, **kwargs)

        return wrapped

    for owner, name in (
        (module, "_write_model"),
        (module, "_write_manifest"),
        (module, "_fingerprint"),
        (module, "_sync_directory"),
        (torch, "save"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (shutil, "rmtree"),
    ):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return True


@pytest.mark.parametrize("step", [2, 3])
def test_e04_killed_at_any_point_of_a_save_leaves_a_good_checkpoint_and_saving_again_works(
    saved: Path, tmp_path: Path, step: int
) -> None:
    """Step 2 is saved again, in the place of a whole one; step 3 is new."""
    died, at = True, 1
    while died:
        checkpoints = Path(shutil.copytree(saved, tmp_path / f"killed-{at}"))
        with pytest.MonkeyPatch.context() as patch:
            died = failpoints(patch, at)
            with contextlib.suppress(KilledError):
                save(checkpoints, step)
                died = False
        found = latest_checkpoint(checkpoints)
        assert found.path in {str(checkpoints / "step-2"), str(checkpoints / f"step-{step}")}, at
        assert not found.problems, at
        verify_checkpoint(save(checkpoints, step))
        prune(checkpoints, keep=5)
        assert {path.name for path in checkpoints.iterdir()} == {f"step-{each}" for each in {1, 2, step}}, at
        at += 1
    assert at > 15


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkdir", "model", "state", "extra", "manifest", "publish"])
def test_e05_e06_a_disk_that_refuses_is_told_and_leaves_what_was_there(
    checkpoints: Path, where: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    def refuse_as_torch(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0 {os.strerror(number)}")

    owner, name, raises = {
        "mkdir": (Path, "mkdir", refuse),
        "model": (module, "_write_model", refuse),
        "state": (torch, "save", refuse_as_torch),
        "extra": (Path, "write_bytes", refuse),
        "manifest": (Path, "write_text", refuse),
        "publish": (Path, "rename", refuse),
    }[where]
    before = content(checkpoints)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raises)
        with pytest.raises(CheckpointError, match=rf"step 3 must be written.*{os.strerror(number)}.*earlier"):
            save(checkpoints, 3)
    assert content(checkpoints) == before and len(list(checkpoints.iterdir())) == 2
    verify_checkpoint(save(checkpoints, 3))


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_e08_another_version_is_refused_by_its_number(checkpoints: Path, version: object) -> None:
    file = checkpoints / "step-2" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": version}))
    assert f"format {version!r}" in refused(checkpoints, MANIFEST)


@pytest.mark.parametrize("content", ["[]", '"text"', "3", '{"format": 1, "step": 2}', '{"format": 1, "files": {}}'])
def test_a_manifest_of_another_shape_is_refused(checkpoints: Path, content: str) -> None:
    (checkpoints / "step-2" / MANIFEST).write_text(content)
    refused(checkpoints, MANIFEST)


@pytest.mark.parametrize("entry", [None, 3, {}, {"bytes": "x"}, {"bytes": 3, "sha256": None}])
def test_an_entry_of_another_shape_is_refused(checkpoints: Path, entry: object) -> None:
    file = checkpoints / "step-2" / MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "files": {**manifest["files"], "config.json": entry}}))
    refused(checkpoints, "config.json" if isinstance(entry, dict) and "sha256" in entry else "")


def test_a_manifest_that_leaves_out_the_state_is_refused(checkpoints: Path) -> None:
    file = checkpoints / "step-2" / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["files"][TRAINER_STATE]
    file.write_text(json.dumps(manifest))
    refused(checkpoints, TRAINER_STATE)


def test_e16_the_only_good_one_is_kept_however_few_are_asked_for(checkpoints: Path) -> None:
    for step in (3, 4):
        (save(checkpoints, step) / "model.safetensors").write_bytes(b"damaged")
    prune(checkpoints, keep=1)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-1", "step-2", "step-3", "step-4"]
    save(checkpoints, 5)
    prune(checkpoints, keep=1)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-5"]


@pytest.mark.parametrize("name", ["../step-1/config.json", "/etc/hostname", "a/../../step-1/config.json"])
def test_e17_a_manifest_names_files_of_its_own_folder_alone(checkpoints: Path, name: str) -> None:
    file = checkpoints / "step-2" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    file.write_text(json.dumps(manifest))
    assert "within" in refused(checkpoints, name)


def test_e17_a_link_is_no_file_of_a_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    file = checkpoints / "step-2" / "config.json"
    (tmp_path / "secret").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    assert "link" in refused(checkpoints, "config.json")


def test_e17_a_checkpoint_that_is_a_link_is_left_with_what_it_points_to(checkpoints: Path, tmp_path: Path) -> None:
    outside = Path(shutil.move(checkpoints / "step-1", tmp_path / "outside"))
    (checkpoints / "step-1").symlink_to(outside)
    prune(checkpoints, keep=1)
    assert outside.is_dir() and "config.json" in {file.name for file in outside.iterdir()}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "manifest.json", "a/../../x"])
def test_e17_further_files_stay_in_the_checkpoint(checkpoints: Path, name: str) -> None:
    before = content(checkpoints)
    with pytest.raises(CheckpointError, match="step 3 must be written"):
        save(checkpoints, 3, **{name: b"x"})
    assert content(checkpoints) == before


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_e18_what_a_pickle_would_run_is_not_run(checkpoints: Path, tmp_path: Path) -> None:
    torch.save({"version": 2, "optimizer": Evil(tmp_path / "mark")}, checkpoints / "step-2" / TRAINER_STATE)
    with pytest.raises(CheckpointError, match=TRAINER_STATE):
        load_trainer_state(checkpoints / "step-2")
    assert not (tmp_path / "mark").exists()


def test_e19_steps_say_which_checkpoint_is_the_newest_not_clocks(checkpoints: Path) -> None:
    os.utime(checkpoints / "step-1", (4e9, 4e9))
    os.utime(checkpoints / "step-2", (1.0, 1.0))
    assert latest_checkpoint(checkpoints).path == str(checkpoints / "step-2")
    prune(checkpoints, keep=1)
    assert [path.name for path in checkpoints.iterdir()] == ["step-2"]
