"""Checkpoints go to the Hub beside training, and a failure there is a warning."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from dataset_loops import Run
from trl_ray.config.load import build, dump_yaml
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.errors import RunError
from trl_ray.pipelines.callbacks.callback_loading import make_callbacks
from trl_ray.pipelines.run import hub_pushes
from trl_ray.pipelines.run.hub_pushes import HubCallback, hub_place


def config(tmp_path: Path, **changes: Any) -> SFTConfig:
    values = {"per_device_train_batch_size": 2, "save_steps": 2, "output_dir": str(tmp_path / "run"), **changes}
    return build(SFTConfig, {"push_to_hub": True, **values})


@pytest.mark.parametrize(("always", "pushed"), [(False, ["step-2"]), (True, ["step-2", "step-4"])])
def test_checkpoints_go_one_after_the_other_and_the_run_waits_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool, pushed: list[str]
) -> None:
    found: list[tuple[str, str]] = []
    gate = threading.Event()

    def push(config: Any, model: Path, *, pipeline: str, message: str) -> str:
        gate.wait(10)
        found.append((model.name, message))
        return ""

    class Opens:
        def on_train_end(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
            gate.set()

    monkeypatch.setattr(hub_pushes, "push_run", push)
    options = config(tmp_path, hub_always_push=always)
    Run(tmp_path, config=options, total=4, callbacks=[Opens(), HubCallback(options)]).go()
    assert found == [(name, f"Training in progress, step {name[-1]}") for name in pushed]


def test_a_push_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def push(*args: Any, **kwargs: Any) -> str:
        raise RunError("the Hub is away")

    monkeypatch.setattr(hub_pushes, "push_run", push)
    options = config(tmp_path)
    run = Run(tmp_path, config=options, total=2, callbacks=[HubCallback(options)]).go()
    assert sorted(run.learner.saved) == [2] and "the Hub is away" in caplog.text


@pytest.mark.parametrize(("strategy", "count"), [("end", 0), ("every_save", 1), ("checkpoint", 1)])
def test_the_strategy_says_whether_checkpoints_go(tmp_path: Path, strategy: str, count: int) -> None:
    made = make_callbacks(config(tmp_path, hub_strategy=strategy), None)
    assert sum(isinstance(each, HubCallback) for each in made._callbacks) == count
    assert not make_callbacks(config(tmp_path, push_to_hub=False), None)._callbacks


def test_the_place_is_named_after_the_run_and_the_token_is_written_nowhere(tmp_path: Path) -> None:
    assert hub_place(config(tmp_path)).repo_id == "run"
    named = config(tmp_path, hub_model_id="me/model", hub_token="hf_abc", hub_revision="b")
    assert hub_place(named).token == "hf_abc" and hub_place(named, "c").revision == "c"
    assert named.replace(max_steps=3).hub_token == "hf_abc"
    assert "hf_abc" not in dump_yaml(named)
