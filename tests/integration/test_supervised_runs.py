"""Whole runs of every pipeline that trains on a dataset: what they learn, and what they leave behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from dataset_runs import SUPERVISED, assert_same_run, pipeline, rows, train, weights, write_rows
from runs import assert_balanced, comparable, events, ledger, lines
from tiny_models import build_tiny_model
from trl_ray.config.load import load_config
from trl_ray.errors import ConfigError, DataError
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.run.session import TrainOutput

pytestmark = pytest.mark.integration
STEPS = 8
LOADERS: Mapping[str, Any] = {"reward": AutoModelForSequenceClassification, "prm": AutoModelForTokenClassification}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run that is over."""

    name: str
    path: Path
    config: Any
    output: TrainOutput


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module", params=SUPERVISED)
def finished(request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of each pipeline, looked at by many tests: 28 rows, 8 a step, so that an epoch has 3 whole steps."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    made = pipeline(
        request.param, model, path, max_steps=STEPS, learning_rate=3e-3, eval_steps=4, save_steps=3, html_report=True
    )
    return Finished(name=request.param, path=path, config=made.config, output=made.train())


def test_a_run_leaves_the_whole_run_directory(finished: Finished) -> None:
    run = finished.path
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-3", "step-6", "step-8"]
    assert [event["detail"]["step"] for event in events(run, "evaluated")] == [0, 4, 8]
    assert [event["detail"]["step"] for event in events(run, "checkpoint")] == [3, 6, 8]
    for kind in ("run_started", "actor_started", "run_finished"):
        assert len(events(run, kind)) == 1
    assert not events(run, "warning")
    assert lines(run / "trace.jsonl")
    assert (finished.output.steps, finished.output.worst_age) == (STEPS, None)
    assert finished.output.metrics == {k: v for k, v in lines(run / "metrics.jsonl")[-1].items() if k not in _CLOCKED}


_CLOCKED = {"step", "time"}


def test_the_ledger_counts_every_row_of_every_epoch(finished: Finished) -> None:
    # Three whole steps and one of four rows are an epoch.
    assert_balanced(finished.path, trained=28 + 28)
    assert finished.output.ledger.to_json() == ledger(finished.path)
    assert [line["epoch"] for line in lines(finished.path / "metrics.jsonl")] == [n / 4 for n in range(1, STEPS + 1)]
    assert [line["examples/trained"] for line in lines(finished.path / "metrics.jsonl")] == [8, 8, 8, 4] * 2


def test_config_yaml_loads_again_to_the_same_run(finished: Finished) -> None:
    assert load_config(type(finished.config), finished.path / "config.yaml") == finished.config


def test_the_held_out_loss_falls(finished: Finished) -> None:
    first, *_, last = events(finished.path, "evaluated")
    assert last["detail"]["eval/loss"] < 0.9 * first["detail"]["eval/loss"]
    assert lines(finished.path / "metrics.jsonl")[-1]["eval/loss"] == last["detail"]["eval/loss"]


def test_what_a_metrics_line_holds(finished: Finished) -> None:
    line = lines(finished.path / "metrics.jsonl")[3]
    expected = {"loss", "grad_norm", "lr", "epoch", "weights/version", "ledger/issued", "ledger/trained"}
    expected |= {"ledger/dropped", "time/step_s", "time/wait_s", "time/learner_s", "time/other_s", "tokens/trained"}
    expected |= {"tokens/seen", "throughput/seen_tokens_per_s", "throughput/trained_tokens_per_s", "eval/loss"}
    assert expected <= line.keys()
    assert all(math.isfinite(value) for value in line.values())


def test_the_report_shows_the_held_out_examples(finished: Finished) -> None:
    page = (finished.path / "report.html").read_text()
    assert "Held-out loss" in page and "held out" in page and "rows issued" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_checkpoint_loads_with_from_pretrained(finished: Finished) -> None:
    folder = finished.path / "checkpoints" / "step-8"
    loader = LOADERS.get(finished.name, AutoModelForCausalLM)
    loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(folder)("count 3: one two three", return_tensors="pt")
    assert torch.isfinite(loaded(**tokens).logits).all()


def test_the_weights_move_at_every_checkpoint(finished: Finished, model: str) -> None:
    first, second = weights(finished.path, 3), weights(finished.path, 8)
    assert all((first[name] != second[name]).any() for name in first)


def test_rows_that_give_nothing_are_dropped_with_their_reason(model: str, tmp_path: Path) -> None:
    table = rows("sft", 20)
    table[3]["prompt"] = table[11]["prompt"] = "x" * 200
    run = tmp_path / "run"
    train("sft", model, run, inputs={"train_dataset": table}, max_steps=-1, num_train_epochs=2)
    assert ledger(run)["dropped"] == {"truncated": 2}
    assert ledger(run)["issued"] == 38
    assert_balanced(run, trained=36)
    (warning,) = events(run, "warning")
    assert "rows 3, 11" in warning["detail"]["detail"] and "raise max_length" in warning["detail"]["detail"]


def test_bad_rows_and_ties_are_counted_in_the_plan_the_ledger_and_the_report(model: str, tmp_path: Path) -> None:
    table, run = rows("dpo", 12), tmp_path / "run"
    table[3]["chosen"] = table[7]["chosen"] = None
    table[5]["chosen"] = table[5]["rejected"]
    given = {"inputs": {"train_dataset": table}, "on_bad_row": "drop", "html_report": True, "max_steps": 2}
    plan = pipeline("dpo", model, run, **given).prepare()
    numbers = plan.describe()
    assert (numbers["rows left out"], numbers["training examples"]) == (3, 9)
    assert (numbers["rows left out (bad_row)"], numbers["rows left out (tie)"]) == (2, 1)
    train("dpo", model, run, **given)
    assert ledger(run)["dropped"] == {"bad_row": 2, "tie": 1}
    assert_balanced(run, trained=9)
    said = [event["detail"]["detail"] for event in events(run, "warning")]
    assert said == list(plan.notes)
    assert said[0].startswith("2 rows (3, 7): Row 3 of the given list, field 'chosen' must be given, got None.")
    page = (run / "report.html").read_text()
    assert "must be given, got None" in page
    assert "bad_row" in page


def test_rows_of_a_step_that_meets_nan_are_dropped(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_ray.models.backends.torch_backend import TorchBackend

    original, calls = TorchBackend.reduce, []

    def reduce(self: TorchBackend) -> float:
        calls.append(original(self))
        return math.nan if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(TorchBackend, "reduce", reduce)
    run = tmp_path / "run"
    train("dpo", model, run)
    assert ledger(run)["dropped"] == {"numerics": 8}
    assert [line["learner/skipped_steps"] for line in lines(run / "metrics.jsonl")] == [0, 1, 0, 0]
    assert any("not finite" in str(event["detail"]) for event in events(run, "warning"))
    # A resumed run counts them still.
    final = ledger(run)
    PIPELINES["dpo"].from_run(run, train_dataset=rows("dpo", 28)).train()
    assert ledger(run) == final


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_what_is_streamed_in_order_is_what_is_read_in_order(name: str, model: str, tmp_path: Path) -> None:
    options = {"dataset_name": write_rows(tmp_path / "rows.jsonl", rows(name, 32)), "shuffle_dataset": False}
    train(name, model, tmp_path / "read", **options)
    train(name, model, tmp_path / "streamed", dataset_streaming=True, **options)

    def numbers(run: Path) -> list[dict[str, Any]]:
        # A stream does not know how long it is, and so not which part of an epoch is over.
        return [{key: value for key, value in line.items() if key != "epoch"} for line in comparable(run)]

    assert numbers(tmp_path / "read") == numbers(tmp_path / "streamed")


def bad_stream(folder: Path, name: str, *, place: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run on a stream with one bad row, in windows of 10 rows."""
    table: list[Mapping[str, Any]] = list(rows(name, 40))
    table[place] = row
    return {
        "dataset_name": write_rows(folder / "rows.jsonl", table),
        "dataset_streaming": True,
        "stream_window": 10,
        "per_device_train_batch_size": 2,
        "max_steps": 30,
    }


def test_a_bad_row_in_a_stream_ends_the_run_with_its_number_and_keeps_what_was_trained(
    model: str, tmp_path: Path
) -> None:
    options = bad_stream(tmp_path, "dpo", place=33, row={"prompt": "count: ", "chosen": None, "rejected": "two"})
    straight, run = tmp_path / "straight", tmp_path / "run"
    with pytest.raises(DataError) as caught:
        train("dpo", model, run, **options)
    message = str(caught.value)
    assert "33" in message and "chosen" in message and f"trl-ray resume {run}" in message
    # Rows 30 to 39 are tokenised together, so that steps of 4 rows end with row 27.
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-7"]
    assert_balanced(run, trained=28)
    (failed,) = events(run, "run_failed")
    assert "chosen" in failed["detail"]["error"]
    # Once the row is mended, the run goes on as if nothing had been.
    write_rows(tmp_path / "rows.jsonl", rows("dpo", 40))
    PIPELINES["dpo"].from_run(run).train()
    train("dpo", model, straight, **options)
    assert_same_run(straight, run, step=30)


def test_a_bad_row_in_the_first_window_of_a_stream_is_found_before_anything_starts(model: str, tmp_path: Path) -> None:
    options = bad_stream(tmp_path, "dpo", place=3, row={"prompt": "count: ", "chosen": None, "rejected": "two"})
    run = tmp_path / "run"
    with pytest.raises(DataError) as caught:
        train("dpo", model, run, **options)
    assert "Row 3 " in str(caught.value) and "chosen" in str(caught.value) and "resume" not in str(caught.value)
    assert not run.exists()


def test_a_dataset_without_length_is_streamed_or_refused(model: str, tmp_path: Path) -> None:
    endless = IterableDataset.from_generator(lambda: iter(rows("sft", 20)))
    with pytest.raises(ConfigError, match="dataset_streaming must be true"):
        train("sft", model, tmp_path / "run", inputs={"train_dataset": endless}, max_steps=-1)
    # As in TRL, max_steps says how much of it is trained on.
    train("sft", model, tmp_path / "run", inputs={"train_dataset": endless}, stream_window=12)
    assert_balanced(tmp_path / "run", trained=32)


def test_old_checkpoints_are_deleted(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("sft", model, run, save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-3", "step-4"]
    assert json.loads((run / "checkpoints" / "step-4" / "progress.json").read_text())["accounts"]["trained"] == 28
