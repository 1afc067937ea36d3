"""A stream is looked at before anything starts: its first window says what a dataset of the same rows would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataset_runs import values
from tiny_models import build_tiny_model
from trl_ray.algorithms import loss_registry
from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.errors import DataError
from trl_ray.pipelines.sft import SFTPipeline
from trl_ray.pipelines.supervised import dataset_preparation
from trl_ray.pipelines.supervised.dataset_preparation import SupervisedPlan

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LONG = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 90}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def plan_of(model: str, folder: Path, rows: list[Any], **options: Any) -> SupervisedPlan:
    given = {**values(model, folder / "run"), "max_length": 64, **options}
    return SFTPipeline(args=build(SFTConfig, given), train_dataset=rows).prepare()


@pytest.fixture
def endless_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_preparation, "end_of_turn_warning", lambda *_: "Turns do not end.")


@pytest.mark.usefixtures("endless_turns")
def test_a_stream_gives_the_notes_of_a_dataset(model: str, tmp_path: Path) -> None:
    rows = [{"messages": talk, "text": "read by nobody"} for talk in (TALK, LONG, TALK)]
    whole = plan_of(model, tmp_path, rows)
    streamed = plan_of(model, tmp_path, rows, dataset_streaming=True, max_steps=1)
    assert streamed.train is None
    told = " Later rows of the stream of which this holds are not told."
    assert tuple(note.removesuffix(told) for note in streamed.notes) == whole.notes
    assert whole.notes[-1] == "Turns do not end."
    assert any("longer than max_length" in note for note in whole.notes)


@pytest.mark.usefixtures("endless_turns")
def test_texts_have_no_turn_that_could_end_otherwise(model: str, tmp_path: Path) -> None:
    assert plan_of(model, tmp_path, [{"text": "abc"}], dataset_streaming=True, max_steps=1).notes == ()


def test_what_the_first_window_said_is_not_said_again(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": LONG}] * 8
    plan = plan_of(model, tmp_path, rows, dataset_streaming=True, max_steps=1, stream_window=2)
    assert len(plan.notes) == 2
    feed = plan.feed(dataset_preparation.StreamPlace(), None)
    lost = [feed.take(step).losses for step in range(1, 4)][-1]
    assert lost["tokens_cut"] > 0
    assert not caplog.records


def test_a_stream_whose_first_window_has_no_example_is_searched_for_one(model: str, tmp_path: Path) -> None:
    silent = [{"messages": TALK[:1]}] * 2
    options = {"dataset_streaming": True, "max_steps": 1, "stream_window": 2, "assistant_only_loss": True}
    assert plan_of(model, tmp_path, [*silent, {"messages": TALK}], **options).head is not None
    with pytest.raises(DataError, match="A stream must give at least one example"):
        plan_of(model, tmp_path, silent, **options)


def test_the_loss_is_built_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    def counted(*args: Any, **options: Any) -> Any:
        built.append(args)
        return loss_registry.build_loss(*args, **options)

    monkeypatch.setattr(dataset_preparation, "build_loss", counted)
    plan = plan_of(model, tmp_path, [{"messages": TALK}])
    plan.expected_memory()
    assert plan.totals_of is not None
    assert len(built) == 1
