"""Checkpoints are whole, or told apart from whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import build_tiny_model, random_model
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import CheckpointError
from trl_ray.models.checkpoint import (
    TRAINER_STATE,
    abandon_checkpoint,
    begin_checkpoint,
    finish_checkpoint,
    latest_checkpoint,
    leave_after,
    load_trainer_state,
    partial_path,
    prune,
    verify_checkpoint,
)
from trl_ray.models.policy_loading import Policy, load_policy


def save_checkpoint(directory: Path, *, step: int, **contents: Any) -> str:
    """One rank alone."""
    begin_checkpoint(directory, step=step)
    return finish_checkpoint(directory, step=step, **contents)


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


def test_checkpoints_are_left_aside_without_the_loss_of_those_that_were_left_before(tmp_path: Path) -> None:
    for mark in (b"1", b"2", b"3"):
        for step in (2, 4):
            save_checkpoint(tmp_path, step=step, model=random_model(), trainer_state={}, extra={"mark": mark})
        left = leave_after(tmp_path, step=2)
    assert left == [str(tmp_path / "step-4.left2")]
    kept = {path.name: (path / "mark").read_bytes() for path in tmp_path.iterdir()}
    assert kept == {"step-2": b"3", "step-4.left": b"1", "step-4.left1": b"2", "step-4.left2": b"3"}
    assert latest_checkpoint(tmp_path).path == str(tmp_path / "step-2")


def test_a_checkpoint_that_cannot_be_written_leaves_the_others_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="step 1"):
        _save(blocked, 1)


def test_what_every_rank_has_written_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    model = random_model()
    partial = begin_checkpoint(tmp_path, step=2)
    assert partial == partial_path(tmp_path, 2) and not list(partial.iterdir())
    for rank in range(2):
        (partial / "shards").mkdir(exist_ok=True)
        (partial / "shards" / f"rank-{rank}.pt").write_bytes(bytes([rank]) * 10)
    assert latest_checkpoint(tmp_path).path is None
    path = Path(finish_checkpoint(tmp_path, step=2, model=model, trainer_state={"version": 2}))
    verify_checkpoint(path)
    assert latest_checkpoint(tmp_path).path == str(path)
    _flip(path / "shards" / "rank-1.pt")
    with pytest.raises(CheckpointError, match=r"rank-1\.pt.*checksum"):
        verify_checkpoint(path)


def test_a_checkpoint_begun_again_or_abandoned_keeps_nothing_of_the_first_try(tmp_path: Path) -> None:
    (begin_checkpoint(tmp_path, step=2) / "stale").write_text("")
    assert not list(begin_checkpoint(tmp_path, step=2).iterdir())
    abandon_checkpoint(tmp_path, step=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_gathered_weights_are_saved_instead_of_the_models_own(tmp_path: Path, tied: bool) -> None:
    model = random_model(tied=tied)
    weights = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    path = save_checkpoint(tmp_path, step=1, model=model, trainer_state={}, weights=weights)
    reloaded, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in reloaded.named_parameters())


def test_gathered_weights_of_an_adapter_are_saved_instead_of_the_models_own(tmp_path: Path) -> None:
    model = ModelConfig(model_name_or_path=build_tiny_model(tmp_path / "tiny"), use_peft=True)
    policy = load_policy(model)
    weights = {name: parameter.detach() + 1 for name, parameter in policy.named_parameters() if parameter.requires_grad}
    path = save_checkpoint(tmp_path / "run", step=1, model=policy, trainer_state={}, weights=weights)
    reloaded = load_policy(model, path=path)
    assert all(torch.equal(reloaded.get_parameter(name), weight) for name, weight in weights.items())


def _train(policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = torch.tensor([[5, 6, 7, 8 + step]])
    (-policy(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def _adam(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)


def test_training_an_adapter_goes_on_bit_for_bit_from_its_checkpoint(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny")
    model = ModelConfig(model_name_or_path=tiny, use_peft=True, use_dora=True, lora_modules_to_save=["norm"])
    policy = load_policy(model)
    optimizer = _adam(policy)
    _train(policy, optimizer, 1)
    state = {"optimizer": optimizer.state_dict()}
    path = save_checkpoint(tmp_path / "run", step=1, model=policy, trainer_state=state)
    assert latest_checkpoint(tmp_path / "run").path == path
    assert {file.name for file in Path(path).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "trainer_state.pt",
    }
    _train(policy, optimizer, 2)
    resumed = load_policy(model, path=path)
    optimizer = _adam(resumed)
    optimizer.load_state_dict(load_trainer_state(path)["optimizer"])
    _train(resumed, optimizer, 2)
    for (name, got), want in zip(resumed.named_parameters(), policy.parameters(), strict=True):
        assert torch.equal(got, want) and got.requires_grad == want.requires_grad, name


class _Program:
    """Unpickles into a call."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.canary), "w"))


def test_a_trainer_state_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"optimizer": _Program(canary)}, tmp_path / TRAINER_STATE)
    with pytest.raises(CheckpointError, match="must be readable"):
        load_trainer_state(tmp_path)
    assert not canary.exists()
