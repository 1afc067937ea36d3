"""A disk that fills up ends the run by the name of the file, leaves nothing half, and the run goes on with more room.

every file a run writes --No space left--> RunError, exit 3 --room--> resume --> the same numbers
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from runs import PROMPTS, assert_balanced, comparable, grpo, lines
from tiny_models import build_tiny_model
from trl_ray.errors import RunError
from trl_ray.models import checkpoint
from trl_ray.observe import run_files
from trl_ray.observe.private_files import open_private
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.run.recording import Recorder

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module")
def straight(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(model, run)
    return comparable(run)


def train(model: str, run: Path) -> None:
    GRPOPipeline(args=grpo(model, run, max_steps=3, save_steps=1), train_dataset=PROMPTS).train()


def fill_disk(patch: pytest.MonkeyPatch, name: str) -> None:
    """From the second step on there is room for half of what is written to files of this name."""

    def is_full(path: str) -> bool:
        return started and name in Path(path).name

    def write_all(file: int, data: bytes) -> None:
        if not is_full(os.readlink(f"/proc/self/fd/{file}")):
            return write(file, data)
        os.write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path: str, flags: int) -> int:
        return os.open("/dev/full", os.O_WRONLY) if is_full(path) and flags & os.O_TRUNC else open_private(path, flags)

    def step(self: Recorder, number: int, **told: Any) -> None:
        started.append(number) if number == 2 else None
        recorded(self, number, **told)

    started, write, recorded = list[int](), run_files._write_all, Recorder.step
    patch.setattr(run_files, "_write_all", write_all)
    patch.setattr(run_files, "open_private", opened)
    patch.setattr(Recorder, "step", step)


OTHERS = ("events.jsonl", "trace.jsonl", "ledger.json", ".parquet")


@pytest.mark.parametrize("name", ["metrics.jsonl", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_a_full_disk_ends_the_run_by_the_name_of_the_file_and_it_goes_on_once_there_is_room(
    name: str, model: str, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, name)
        with pytest.raises(RunError, match=rf"{name} must stay writable.*No space left.*resume the run"):
            train(model, run)
    left = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.endswith((".part", ".tmp", ".new"))]
    for path in left:
        if path.suffix == ".jsonl":
            assert path.read_bytes()[-1:] in (b"", b"\n") and len(lines(path)) == path.read_bytes().count(b"\n")
    GRPOPipeline.from_run(run, train_dataset=PROMPTS).train()
    assert comparable(run) == straight
    assert_balanced(run, trained=12)


def test_a_report_that_finds_no_room_is_no_half_report_and_can_be_drawn_again(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, "report.html")
        with pytest.raises(RunError, match=r"report\.html must stay writable.*No space left"):
            train(model, run)
    assert not (run / "report.html").exists() and len(lines(run / "metrics.jsonl")) == 3


def test_a_checkpoint_that_finds_no_room_leaves_those_before_it(
    model: str, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def full(directory: Path, step: int) -> None:
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory, step)

    write = checkpoint._write_manifest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", full)
        with pytest.raises(RunError, match=r"checkpoint of step 2 must be written.*No space left"):
            train(model, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    GRPOPipeline.from_run(run, train_dataset=PROMPTS).train()
    assert comparable(run) == straight
