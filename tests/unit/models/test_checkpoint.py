"""Checkpoints are whole, or told apart from whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny_models import random_model
from trl_ray.errors import CheckpointError
from trl_ray.models.checkpoint import (
    latest_checkpoint,
    load_trainer_state,
    prune,
    save_checkpoint,
    verify_checkpoint,
)


def _save(directory: Path, step: int) -> Path:
    state = {"version": step, "tensor": torch.tensor([1.5, float(step)])}
    model = random_model()
    return Path(
        save_checkpoint(directory, step=step, model=model, trainer_state=state, extra={"mark.json": b'{"at": 7}'})
    )


def test_what_was_saved_is_read_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    verify_checkpoint(path)
    assert path.name == "step-3" and [p.name for p in tmp_path.iterdir()] == ["step-3"]
    assert load_trainer_state(path)["tensor"].tolist() == [1.5, 3.0]
    assert (path / "mark.json").read_bytes() == b'{"at": 7}'
    reloaded = type(random_model()).from_pretrained(path)
    for got, want in zip(reloaded.parameters(), random_model().parameters(), strict=True):
        assert torch.equal(got, want)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    verify_checkpoint(_save(tmp_path, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "mark.json", "config.json"])
@pytest.mark.parametrize(("damage", "word"), [(_truncate, "truncated"), (_flip, "checksum"), (Path.unlink, "missing")])
def test_every_damage_to_every_file_is_found_and_the_file_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], word: str
) -> None:
    path = _save(tmp_path, 1)
    damage(path / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*{word}"):
        verify_checkpoint(path)


def test_the_latest_checkpoint_that_can_be_used_is_found_and_the_others_explained(tmp_path: Path) -> None:
    for step in (2, 10, 11):
        _save(tmp_path, step)
    _flip(tmp_path / "step-11" / "model.safetensors")
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-13.tmp").mkdir()
    found = latest_checkpoint(tmp_path)
    assert found.path == str(tmp_path / "step-10")
    assert len(found.problems) == 2 and "step-12" in found.problems[0] and "step-11" in found.problems[1]
    assert latest_checkpoint(tmp_path / "nothing").path is None


def test_a_damaged_manifest_is_reported_as_such(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(path)


def test_a_replaced_checkpoint_survives_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    _save(tmp_path, 4).rename(tmp_path / "step-4.old")
    assert latest_checkpoint(tmp_path).path == str(tmp_path / "step-4")


def test_pruning_keeps_the_youngest_and_removes_half_written_ones(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        _save(tmp_path, step)
    (tmp_path / "step-11.tmp").mkdir()
    prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-9"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="step 1"):
        _save(blocked, 1)
