"""A reference that is asked once, before training: the same losses without a second model, no answer twice."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen2ForCausalLM

from dataset_runs import assert_same_run, losses, rows, train
from runs import events, lines
from tiny_models import build_tiny_model
from trl_ray.errors import InterruptedRun
from trl_ray.models.companions.reference_cache import ReferenceCache
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.supervised import reference_pass as references
from trl_ray.pipelines.supervised.dataset_recording import SupervisedRecorder

pytestmark = pytest.mark.integration
CACHED = {"precompute_ref_log_probs": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def cached(folder: Path) -> dict[str, Any]:
    """Options that keep the reference's answers in a folder."""
    return {**CACHED, "ref_log_probs_cache_dir": str(folder / "cache")}


def asked(run: Path) -> list[tuple[int, int]]:
    """Of every set of examples, how many the reference was asked about and how many answers were there."""
    told = [event["detail"] for event in events(run, "slots") if event["actor"] == "learner"]
    return [(detail["asked"], detail["from_cache"]) for detail in told]


def interrupt(after: int, patch: pytest.MonkeyPatch, *, kill: bool) -> None:
    """Ctrl-C, or a death that nothing is done about, once so many batches of answers are on the disk."""
    original, written = ReferenceCache.put, []

    def put(self: ReferenceCache, indices: Any, values: Any) -> None:
        original(self, indices, values)
        written.append(len(values))
        if len(written) == after and kill:
            raise KeyboardInterrupt
        if len(written) == after:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(references, "_EXAMPLES_AT_ONCE", 5)
    patch.setattr(ReferenceCache, "put", put)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {}),
        ("dpo", {"ld_alpha": 0.4, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]}),
        ("dpo", {"use_peft": True, "lora_dropout": 0.0}),
        ("kto", {}),
    ],
    ids=["dpo", "dpo-by-length", "dpo-adapter", "kto"],
)
def test_precomputed_or_held_the_reference_says_the_same(
    name: str, options: dict[str, Any], model: str, tmp_path: Path
) -> None:
    held, precomputed = tmp_path / "held", tmp_path / "precomputed"
    # A low rate, because training takes a rounding further and further.
    options = {"eval_steps": 2, "learning_rate": 1e-4, **options}
    train(name, model, held, **options)
    train(name, model, precomputed, **options, **cached(tmp_path))
    assert losses(precomputed) == pytest.approx(losses(held), rel=1e-6, abs=1e-6)
    ours, theirs = ([event["detail"]["eval/loss"] for event in events(run, "evaluated")] for run in (precomputed, held))
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_no_second_model_is_held(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, found = SupervisedRecorder.step, []

    def counting(self: SupervisedRecorder, step: int, **told: Any) -> None:
        original(self, step, **told)
        gc.collect()
        found.append(sum(type(each) is Qwen2ForCausalLM for each in gc.get_objects()))

    gc.collect()
    before = sum(type(each) is Qwen2ForCausalLM for each in gc.get_objects())
    monkeypatch.setattr(SupervisedRecorder, "step", counting)
    train("dpo", model, tmp_path / "held", max_steps=1)
    train("dpo", model, tmp_path / "precomputed", max_steps=1, **cached(tmp_path))
    assert [count - before for count in found] == [2, 1]


def test_a_second_run_asks_nothing_and_held_out_rows_share_the_answers(model: str, tmp_path: Path) -> None:
    train("dpo", model, tmp_path / "first", eval_steps=2, **cached(tmp_path))
    assert asked(tmp_path / "first") == [(28, 0), (6, 0)]
    # Another rate and another order: the rows and the model are what counts.
    train("dpo", model, tmp_path / "second", eval_steps=2, learning_rate=1e-4, seed=7, **cached(tmp_path))
    assert asked(tmp_path / "second") == [(0, 28), (0, 6)]
    same = {"train_dataset": rows("dpo", 10), "eval_dataset": rows("dpo", 10)}
    train("dpo", model, tmp_path / "third", inputs=same, eval_steps=2, **cached(tmp_path))
    assert asked(tmp_path / "third") == [(10, 0), (0, 10)]


def test_another_model_is_asked_anew(model: str, tmp_path: Path) -> None:
    train("dpo", model, tmp_path / "first", max_steps=1, **cached(tmp_path))
    other = build_tiny_model(tmp_path / "other", seed=1)
    train("dpo", other, tmp_path / "second", max_steps=1, **cached(tmp_path))
    assert asked(tmp_path / "second") == [(28, 0)]


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "interrupted"])
def test_a_run_that_ends_while_it_asks_goes_on_where_it_was(
    kill: bool, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    train("dpo", model, straight, **CACHED, ref_log_probs_cache_dir=str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        interrupt(3, patch, kill=kill)
        with pytest.raises(KeyboardInterrupt if kill else InterruptedRun) as caught:
            train("dpo", model, run, **cached(tmp_path))
    if not kill:
        assert "15 of 28 training examples" in str(caught.value) and "trl-ray resume" in str(caught.value)
    assert lines(run / "metrics.jsonl") == []
    PIPELINES["dpo"].from_run(run, train_dataset=rows("dpo", 28)).train()
    assert asked(run) == [(13, 15)]
    # Who is asked with whom rounds the last bit of a sum.
    np.testing.assert_allclose(losses(run), losses(straight), rtol=0, atol=1e-6)


def test_answers_that_were_lost_are_asked_of_the_initial_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    train("dpo", model, straight, **CACHED, ref_log_probs_cache_dir=str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        original = SupervisedRecorder.step

        def breaking(self: SupervisedRecorder, step: int, **told: Any) -> None:
            original(self, step, **told)
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(SupervisedRecorder, "step", breaking)
        with pytest.raises(InterruptedRun):
            train("dpo", model, run, **cached(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    PIPELINES["dpo"].from_run(run, train_dataset=rows("dpo", 28)).train()
    assert asked(run) == [(28, 0), (28, 0)]
    assert_same_run(straight, run, step=4)
