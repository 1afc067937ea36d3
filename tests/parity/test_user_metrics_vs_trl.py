"""`compute_metrics` and `predict` are given what TRL's trainers give: the same rows, logits, labels, and numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import dataset_runs
from tiny_models import build_tiny_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
BATCH = 3
ROWS = {"sft": 7, "kto": 7, "dpo": 6, "reward": 6, "cpo": 6, "orpo": 6}
"""Of pairs whole batches: of a last one that is smaller TRL forgets rejected answers, as it counts pairs for rows."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


class Book:
    """A `compute_metrics` that keeps what it is given."""

    def __init__(self) -> None:
        self.given: Any = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.given = prediction
        return {"first": float(np.asarray(prediction.predictions).ravel()[0]), "eval_named": 2.0}


def most_probable(logits: Any, labels: Any) -> Any:
    """What memory-saving users keep."""
    return logits.argmax(-1)


def trl_metrics(name: str, model: str, folder: Path, **given: Any) -> tuple[Any, Mapping[str, float]]:
    """What TRL's trainer gives to a user's function, and says."""
    import datasets
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kinds = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "cpo": (CPOTrainer, CPOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
    }
    kind, config = kinds[name]
    options, rows = given.pop("options", {}), given.pop("rows", None)
    args = config(
        output_dir=str(folder), per_device_eval_batch_size=BATCH, use_cpu=True, bf16=False, report_to="none",
        max_length=96, **options,
    )  # fmt: skip
    book = Book()
    trainer = kind(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(dataset_runs.rows(name, 6)),
        eval_dataset=datasets.Dataset.from_list(rows or dataset_runs.rows(name, ROWS[name], start=100)),
        processing_class=AutoTokenizer.from_pretrained(model),
        **{"compute_metrics": book, **given},
    )
    numbers = trainer.evaluate()
    return book.given, numbers


def our_metrics(name: str, model: str, folder: Path, **given: Any) -> tuple[Any, Mapping[str, float]]:
    options, rows = given.pop("options", {}), given.pop("rows", None)
    book = Book()
    held_out = rows or dataset_runs.rows(name, ROWS[name], start=100)
    inputs = {"compute_metrics": book, "eval_dataset": held_out, **given}
    pipeline = dataset_runs.pipeline(
        name, model, folder, inputs=inputs, eval_steps=2, per_device_eval_batch_size=BATCH, **options
    )
    numbers = pipeline.evaluate()
    return book.given, numbers


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward", "cpo", "orpo"])
def test_the_user_is_given_what_trl_gives(name: str, model: str, tmp_path: Path) -> None:
    # TRL's trainers of CPO and ORPO fail when they are asked for inputs.
    asked = ["loss"] if name in ("cpo", "orpo") else ["inputs", "loss"]
    wanted, theirs = trl_metrics(name, model, tmp_path / "trl", options={"include_for_metrics": asked})
    found, ours = our_metrics(name, model, tmp_path / "ours", options={"include_for_metrics": asked})
    assert type(found.label_ids) is type(wanted.label_ids) and found.predictions.dtype == wanted.predictions.dtype
    np.testing.assert_allclose(found.predictions, wanted.predictions, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(found.label_ids, wanted.label_ids)
    if "inputs" in asked:
        np.testing.assert_array_equal(found.inputs, wanted.inputs)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-4)
    for key in ("eval_first", "eval_named"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


TEXTS = [{"text": f"{row['prompt']}{row['completion']}"} for row in dataset_runs.rows("sft", 7)]


@pytest.mark.parametrize("packing", [False, True])
def test_texts_packed_or_not_give_the_arrays_of_trl(packing: bool, model: str, tmp_path: Path) -> None:
    given = {"options": {"packing": packing}, "rows": TEXTS, "preprocess_logits_for_metrics": most_probable}
    theirs, _ = trl_metrics("sft", model, tmp_path / "trl", **given)
    ours, _ = our_metrics("sft", model, tmp_path / "ours", **given)
    assert ours.predictions.dtype == np.int64 and ours.predictions.ndim == 2
    if not packing:
        np.testing.assert_array_equal(ours.label_ids, theirs.label_ids)
        np.testing.assert_array_equal(ours.predictions, theirs.predictions)
        return
    # Rows are packed in another order, and TRL on CPUs lets packed texts see each other: the same labels, row by row.
    assert ours.label_ids.shape == theirs.label_ids.shape
    np.testing.assert_array_equal(np.sort(ours.label_ids.ravel()), np.sort(theirs.label_ids.ravel()))


@pytest.mark.parametrize("changes", [{"eval_do_concat_batches": False}, {"batch_eval_metrics": True}])
def test_batches_apart_are_those_of_trl(changes: dict[str, bool], model: str, tmp_path: Path) -> None:
    class Batches:
        """Counts right tokens, batch by batch or over a list of them."""

        def __init__(self) -> None:
            self.calls: list[Any] = []

        def __call__(self, prediction: Any, compute_result: bool | None = None) -> dict[str, float]:
            self.calls.append((type(prediction.predictions), compute_result, prediction.predictions))
            return {"calls": float(len(self.calls))}

    books = Batches(), Batches()
    _, theirs = trl_metrics("sft", model, tmp_path / "trl", options=changes, compute_metrics=books[0])
    _, ours = our_metrics("sft", model, tmp_path / "ours", options=changes, compute_metrics=books[1])
    assert [call[:2] for call in books[0].calls] == [call[:2] for call in books[1].calls]
    for (_, _, wanted), (_, _, found) in zip(books[0].calls, books[1].calls, strict=True):
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-4, atol=2e-5)
    assert ours["eval_calls"] == theirs["eval_calls"]


def test_predict_answers_what_trl_answers(model: str, tmp_path: Path) -> None:
    import datasets
    import trl

    rows = dataset_runs.rows("sft", 5, start=50)
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_eval_batch_size=BATCH, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), compute_metrics=Book()
    )
    theirs = trainer.predict(trainer.train_dataset)
    pipeline = dataset_runs.pipeline(
        "sft", model, tmp_path / "ours", inputs={"compute_metrics": Book()}, per_device_eval_batch_size=BATCH
    )
    ours = pipeline.predict(rows)
    assert type(ours) is type(theirs) and not (tmp_path / "ours").exists()
    np.testing.assert_allclose(ours.predictions, theirs.predictions, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(ours.label_ids, theirs.label_ids)
    for key in ("test_first", "test_eval_named"):
        assert ours.metrics[key] == pytest.approx(theirs.metrics[key], rel=1e-4)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=0.1)
