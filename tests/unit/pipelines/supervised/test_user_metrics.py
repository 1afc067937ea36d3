"""Metrics of the user's own: what functions are given, where their numbers go, and what is said when they fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataset_runs
from runs import events, lines
from supervised_batches import packed, pairs, reward_pairs, solutions, texts
from tiny_models import build_tiny_model
from trl_ray.algorithms.batches.prediction_batches import prediction_batches
from trl_ray.errors import CallbackError, ConfigError
from trl_ray.models.scoring.predictor import joined
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.supervised.user_metrics import MetricFunctions
from trl_ray.types import PredictionForm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def first(logits: Any, labels: Any) -> Any:
    """The most probable tokens."""
    del labels
    return logits.argmax(-1)


def share_right(prediction: Any) -> dict[str, Any]:
    """Of trained tokens that were the most probable, as TRL's own metric has it."""
    wanted, found = prediction.label_ids[:, 1:], prediction.predictions[:, :-1]
    asked = wanted != -100
    return {"share_right": (found == wanted)[asked].mean(), "count": int(asked.sum())}


def test_numbers_reach_every_place_by_their_names_and_choose_the_best_model(model: str, tmp_path: Path) -> None:
    run, told = tmp_path / "run", []

    class Listener:
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **payload: Any) -> None:
            told.append(metrics)

    output = dataset_runs.train(
        "sft",
        model,
        run,
        inputs={
            "compute_metrics": share_right,
            "preprocess_logits_for_metrics": first,
            "callbacks": [Listener()],
        },
        eval_steps=2,
        html_report=True,
        save_strategy="best",
        metric_for_best_model="eval_count",
        load_best_model_at_end=True,
    )
    assert [each["eval_share_right"] for each in told] == pytest.approx(
        [each["eval_mean_token_accuracy"] for each in told]
    )
    written = {line["step"]: line for line in lines(run / "metrics.jsonl")}
    assert written[2]["eval/share_right"] == told[1]["eval_share_right"] and "eval/count" not in written[1]
    assert events(run, "evaluated")[0]["detail"]["eval/count"] == told[0]["eval_count"]
    page = (run / "report.html").read_text()
    assert "Metrics of your own" in page and "share_right" in page
    # The count is the same each time, so the first one that is saved stays the best.
    assert output.model.name == "step-2"


def test_sets_with_names_are_measured_each(model: str, tmp_path: Path) -> None:
    sets = {"near": dataset_runs.rows("sft", 3), "far": dataset_runs.rows("sft", 5, start=50)}
    pipeline = dataset_runs.pipeline(
        "sft",
        model,
        tmp_path / "run",
        inputs={
            "compute_metrics": lambda found: {"rows": len(found.label_ids), "eval_far_own": 1.0},
            "eval_dataset": sets,
        },
        eval_steps=2,
    )
    numbers = pipeline.evaluate()
    assert (numbers["eval_near_rows"], numbers["eval_far_rows"]) == (3, 5)
    assert numbers["eval_far_own"] == 1.0 and numbers["eval_near_eval_far_own"] == 1.0
    assert {"eval_near_loss", "eval_far_loss"} <= numbers.keys()
    assert pipeline.evaluate("near", metric_key_prefix="test")["test_near_rows"] == 3
    with pytest.raises(ConfigError, match="sets, which are near, far; got 'middle'"):
        pipeline.evaluate("middle")


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "prm"])
def test_every_pipeline_predicts_before_and_after_training(name: str, model: str, tmp_path: Path) -> None:
    shapes = {"dpo": (8, None, 260), "kto": (4, None, 260), "reward": (8, 1), "prm": (4, None, 2)}
    pipeline = dataset_runs.pipeline(name, model, tmp_path / "run")
    before = pipeline.predict(dataset_runs.rows(name, 4, start=30))
    for size, wanted in zip(before.predictions.shape, shapes[name], strict=True):
        assert wanted is None or size == wanted
    pipeline.train()
    after = pipeline.predict(dataset_runs.rows(name, 4, start=30), metric_key_prefix="held")
    assert "held_loss" in after.metrics
    assert not np.allclose(before.predictions, after.predictions)
    assert after.label_ids == () if name == "reward" else np.array_equal(before.label_ids, after.label_ids)


def test_steps_are_labelled_where_they_end(model: str, tmp_path: Path) -> None:
    rows = dataset_runs.rows("prm", 2)
    found = dataset_runs.pipeline("prm", model, tmp_path / "run").predict(rows)
    # Two solutions of three steps each: right, wrong, and by turns.
    assert [row[row != -100].tolist() for row in found.label_ids] == [[1, 0, 1], [1, 0, 0]]


def test_predict_says_where_it_means_nothing(model: str, tmp_path: Path) -> None:
    pipeline = GRPOPipeline(model=model, reward_funcs=len)
    with pytest.raises(ConfigError, match=r"predict must be asked.*got grpo.*Call evaluate"):
        pipeline.predict([{"prompt": "a"}])
    with pytest.raises(ConfigError, match="test_dataset must be one set of rows, got 2"):
        dataset_runs.pipeline("sft", model, tmp_path / "run").predict({"a": [], "b": []})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"compute_metrics": lambda found: {}["no"]},
            r"compute_metrics must not raise, but did: KeyError.*\(6, \d+, 260\)",
        ),
        ({"compute_metrics": lambda found: 1.0}, "compute_metrics must return a dict of numbers, got a float"),
        (
            {"compute_metrics": lambda found: {}, "preprocess_logits_for_metrics": lambda logits: logits},
            r"preprocess_logits_for_metrics must take logits \(\d, \d+, 260\) and labels, but raised: TypeError",
        ),
    ],
)
def test_functions_that_fail_are_named(given: dict[str, Any], message: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(CallbackError, match=message):
        dataset_runs.pipeline("sft", model, tmp_path / "run", inputs=given, eval_steps=2).evaluate()


def test_what_is_no_number_is_told_and_written_nowhere(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = {"compute_metrics": lambda found: {"report": [1, 2], "right": np.float32(0.5)}}
    dataset_runs.train("sft", model, run, inputs=given, eval_steps=4, eval_on_start=False)
    [told] = [each for each in events(run, "warning") if "report" in str(each["detail"])]
    assert "no numbers" in told["detail"]["detail"]
    assert lines(run / "metrics.jsonl")[-1]["eval/right"] == 0.5


def test_functions_are_checked_before_the_run(model: str, tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="compute_metrics must be a function, got a str"):
        dataset_runs.pipeline("sft", model, tmp_path / "run", inputs={"compute_metrics": "accuracy"}).prepare()
    pipeline = dataset_runs.pipeline(
        "sft",
        model,
        tmp_path / "run",
        inputs={"preprocess_logits_for_metrics": lambda logits, labels: lock and logits},
        runtime={"kind": "ray"},
    )
    with pytest.raises(ConfigError, match="preprocess_logits_for_metrics must be picklable"):
        pipeline.prepare()


def test_logits_that_no_memory_holds_are_refused_with_what_helps() -> None:
    functions = MetricFunctions(form=PredictionForm.LABELLED, compute=share_right)
    with pytest.raises(ConfigError, match=r"GiB of logits of far.*preprocess_logits_for_metrics=lambda.*argmax"):
        functions.check_size(texts(0), vocab_size=10**13, name="far")
    less = MetricFunctions(form=PredictionForm.LABELLED, compute=share_right, preprocess=first)
    less.check_size(texts(0), vocab_size=10**13, name="far")


def test_rows_stand_as_trl_lays_them_out() -> None:
    compared = prediction_batches(pairs(1), PredictionForm.COMPARED, per_batch=3)
    assert [batch.num_examples for batch in compared] == [3, 3, 2]
    chosen, rejected = pairs(1)[1].samples[:2]
    for place, sample in ((1, chosen), (4, rejected)):
        [piece] = compared[0].rows[place]
        assert piece.token_ids.tolist() == [*sample.prompt_ids, *sample.completion_ids]
    [scored] = prediction_batches(reward_pairs(1)[:1], PredictionForm.SCORED, per_batch=3)
    sample = reward_pairs(1)[0].samples[0]
    assert scored.rows[0][0].token_ids.tolist() == [*sample.prompt_ids, *sample.completion_ids[:-1]]
    [solution] = solutions(1)[:1]
    [stepped] = prediction_batches([solution], PredictionForm.STEPPED, per_batch=3)
    labels = stepped.rows[0][0].labels
    assert labels[labels != -100].tolist() == list(map(int, solution.samples[0].label.steps))
    rows = [packed(1), packed(2)]
    [flat] = prediction_batches(rows, PredictionForm.LABELLED, per_batch=2, is_flat=True)
    assert len(flat.rows) == 1 and len(flat.rows[0]) == sum(len(each.samples) for each in rows)


def test_joined_fills_up_with_what_is_ignored() -> None:
    one, other = np.ones((1, 2, 3)), np.zeros((2, 4, 3))
    whole = joined([one, other])
    assert whole.shape == (3, 4, 3) and (whole[0, 2:] == -100).all() and (whole[0, :2] == 1).all()
    pair = joined([(one[:, :, 0], {"a": np.float32(1.0)}), (other[:, :, 0], {"a": np.float32(2.0)})])
    assert pair[0].shape == (3, 4) and pair[1]["a"].tolist() == [1.0, 2.0]
    assert joined([(), ()]) == ()


def test_predictions_leave_the_random_state_and_training_alone(model: str, tmp_path: Path) -> None:
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    dataset_runs.train("sft", model, plain, eval_steps=2, disable_dropout=False)
    noisy = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1) + torch.rand(())}
    given: Any = {"compute_metrics": lambda found: {}, **noisy}
    dataset_runs.train("sft", model, measured, inputs=given, eval_steps=2, disable_dropout=False)
    losses: Sequence[list[float]] = [dataset_runs.losses(each) for each in (plain, measured)]
    assert losses[0] == losses[1]
