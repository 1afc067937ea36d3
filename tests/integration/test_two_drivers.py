"""A second driver beside a run that lives is refused, whatever it wants, and nothing of the run changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import dataset_runs
from dataset_runs import rows
from runs import PROMPTS, assert_balanced, events, grpo, lines
from tiny_models import build_tiny_model
from trl_ray.errors import ConfigError
from trl_ray.observe import run_lock
from trl_ray.observe.report.report_page import build_report
from trl_ray.observe.run_lock import LOCK
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.run import pipeline as pipeline_module
from trl_ray.pipelines.run.recording import Recorder, RunRecorder
from trl_ray.pipelines.sft import SFTPipeline
from trl_ray.pipelines.supervised.dataset_recording import SupervisedRecorder

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def content(run: Path) -> dict[str, str]:
    """Every file of a run by its checksum; the lock is touched now and then, not changed."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(kind: str, model: str, run: Path, **changes: Any) -> Any:
    if kind == "sft":
        return dataset_runs.pipeline("sft", model, run, save_steps=1, **changes)
    return GRPOPipeline(args=grpo(model, run, save_steps=1, **changes), train_dataset=PROMPTS)


def from_run(kind: str, run: Path) -> Any:
    if kind == "sft":
        return SFTPipeline.from_run(run, train_dataset=rows("sft", 28))
    return GRPOPipeline.from_run(run, train_dataset=PROMPTS)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_second_driver_is_refused_before_it_changes_anything(
    kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tried = tmp_path / "run", list[str]()
    recorder: type[RunRecorder] = SupervisedRecorder if kind == "sft" else Recorder
    original: Any = recorder.step

    def beside(self: RunRecorder, step: int, **told: Any) -> None:
        original(self, step, **told)
        if step != 3:
            return
        before = content(run)
        for ends_early in (True, False):  # also where both began at once, and only the lock itself tells them apart
            with monkeypatch.context() as patch:
                if not ends_early:
                    patch.setattr(pipeline_module, "living_holder", lambda folder: None)
                for what, second in (
                    ("resume", from_run(kind, run)),
                    ("overwrite", make(kind, model, run, overwrite_output_dir=True)),
                    ("go back", make(kind, model, run, resume_from_checkpoint=str(run / "checkpoints" / "step-1"))),
                ):
                    with pytest.raises(ConfigError, match="must be written by one process at a time"):
                        second.prepare() if ends_early else second.train()
                    tried.append(what)
        with pytest.raises(ConfigError, match="must be written by one process at a time"):
            make(kind, model, run, overwrite_output_dir=True).train()
        assert content(run) == before
        build_report(run)  # reads beside the run, and writes the report alone
        assert content(run).keys() - before.keys() <= {"report.html"}

    monkeypatch.setattr(recorder, "step", beside)
    make(kind, model, run).train()
    assert len(tried) == 6
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(list((run / "checkpoints").iterdir())) == 4 and not (run / LOCK).exists()
    assert {path for path in run.rglob("*") if path.stat().st_mode & 0o077} == set()
    if kind == "grpo":
        assert_balanced(run, trained=16)


def test_the_lock_of_a_run_that_was_killed_is_taken_and_the_run_says_so(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make("sft", model, run, max_steps=1).train()
    dead = {"host": "h", "pid": 4194304, "boot": run_lock._boot(), "born": 1, "token": "t", "since": "yesterday"}
    (run / LOCK).write_text(json.dumps(dead))
    make("sft", model, run, resume_from_checkpoint=True, max_steps=2).train()
    told = [event["detail"]["detail"] for event in events(run, "warning")]
    assert any("process 4194304 on host h (since yesterday) was taken: that process is dead" in text for text in told)
