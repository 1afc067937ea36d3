"""Runs on datasets with real Ray actors: the same numbers as in one process, on more ranks, after losses.

one process == one actor == two actors with half the micro-batches each == an actor that was killed and begins again
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataset_runs import RAY, assert_close_weights, assert_same_run, losses, rows, train, weights
from runs import Disturbance, assert_balanced, comparable, events, lines, pid_of
from tiny_models import build_tiny_model
from trl_ray.errors import InterruptedRun
from trl_ray.models.companions.reference_cache import ReferenceCache
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.supervised import reference_pass as references
from trl_ray.pipelines.supervised.dataset_recording import SupervisedRecorder

pytestmark = pytest.mark.integration
STEPS = 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"neftune_noise_alpha": 5.0, "disable_dropout": False, "packing": True}),
    "dpo": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
}
TWO = {**RAY, "num_learners": 2, "learner_num_cpus": 0.5}
# Adam turns any rounding of a gradient near 0 into a whole step; a large epsilon keeps it a rounding.
STABLE = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1.0, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module", params=CASES)
def straight(request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A case and its uninterrupted run in one process."""
    name, options = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "straight"
    train(name, model, path, max_steps=STEPS, save_steps=2, eval_steps=3, **options)
    return request.param, path


def on_ray(case: str, model: str, run: Path, act: Callable[[int], None], **changes: Any) -> None:
    """The case on Ray; `act` is called when a step's line is written, before anything else happens."""
    name, options = CASES[case]
    original = SupervisedRecorder.step

    def acting(self: SupervisedRecorder, step: int, **told: Any) -> None:
        original(self, step, **told)
        act(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedRecorder, "step", acting)
        train(name, model, run, max_steps=STEPS, save_steps=2, eval_steps=3, runtime=RAY, **options, **changes)


def test_a_killed_learner_begins_again_from_its_checkpoint_and_ends_with_the_bytes_of_one_process(
    ray_local: Any, straight: tuple[str, Path], model: str, tmp_path: Path
) -> None:
    case, expected = straight
    run, killed = tmp_path / "run", []

    def kill_once(step: int) -> None:
        if step == 5 and not killed:
            killed.append(pid_of(run, "learner"))
            os.kill(killed[0], signal.SIGKILL)

    on_ray(case, model, run, kill_once)
    assert [event["actor"] for event in events(run, "actor_lost")] == ["learner"]
    assert events(run, "run_resumed")[0]["detail"]["step"] == 4
    assert_same_run(expected, run, step=STEPS)


def test_ctrl_c_on_ray_and_resumption_end_with_the_bytes_of_one_process(
    ray_local: Any, straight: tuple[str, Path], model: str, tmp_path: Path
) -> None:
    case, expected = straight
    if case != "dpo":
        pytest.skip("starting learners takes long, and the test before does it for all")
    run, name = tmp_path / "run", CASES[case][0]
    with pytest.raises(InterruptedRun, match="after step 3"):
        on_ray(case, model, run, lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None)
    inputs = {"train_dataset": rows(name, 28), "eval_dataset": rows(name, 6, start=100)}
    PIPELINES[name].from_run(run, **inputs).train()
    assert_same_run(expected, run, step=STEPS)


def test_a_learner_that_hangs_is_noticed_while_the_reference_is_asked_and_while_it_trains(
    ray_local: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stopped = tmp_path / "run", list[int]()
    put, step = ReferenceCache.put, SupervisedRecorder.step

    def stop_learner() -> None:
        stopped.append(pid_of(run, "learner"))
        os.kill(stopped[-1], signal.SIGSTOP)

    def putting(self: ReferenceCache, indices: Any, values: Any) -> None:
        put(self, indices, values)
        if not stopped:
            stop_learner()

    def stepping(self: SupervisedRecorder, number: int, **told: Any) -> None:
        step(self, number, **told)
        if number == 3 and len(stopped) == 1:
            stop_learner()

    monkeypatch.setattr(references, "_EXAMPLES_AT_ONCE", 5)
    monkeypatch.setattr(ReferenceCache, "put", putting)
    monkeypatch.setattr(SupervisedRecorder, "step", stepping)
    cached = {"precompute_ref_log_probs": True, "ref_log_probs_cache_dir": str(tmp_path / "cache")}
    train("dpo", model, run, max_steps=STEPS, save_steps=2, runtime=RAY, **cached)
    lost = events(run, "actor_lost")
    assert [event["actor"] for event in lost] == ["learner", "learner"]
    assert all("must answer within" in event["detail"]["reason"] for event in lost)
    assert [event["detail"]["step"] for event in events(run, "run_resumed")] == [0, 2]
    answered = [event["detail"] for event in events(run, "slots") if event["actor"] == "learner"]
    assert [(detail["asked"], detail["from_cache"]) for detail in answered] == [(23, 5), (0, 28)]
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert_balanced(run, trained=28 + 16)


@pytest.mark.parametrize(("name", "stage"), [("sft", None), ("dpo", 2)], ids=["sft-torch", "dpo-zero-2"])
def test_two_ranks_equal_one_with_twice_the_accumulation(
    ray_local: Any, name: str, stage: int | None, model: str, tmp_path: Path
) -> None:
    if stage is not None:
        pytest.importorskip("deepspeed")
    one, two = tmp_path / "one", tmp_path / "two"
    # 25 rows are three steps of 8 and one of a single row, of which one rank gets nothing.
    options = {**STABLE, "max_steps": 4, "eval_steps": 2, "inputs": {"train_dataset": rows(name, 25)}}
    train(name, model, one, **options, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "runtime": TWO,
    }
    if name == "dpo":  # every rank answers for its share of the examples
        changes |= {"precompute_ref_log_probs": True, "ref_log_probs_cache_dir": str(tmp_path / "cache")}
    sharding = {} if stage is None else {"deepspeed": {"zero_optimization": {"stage": stage}}}
    train(name, model, two, **options, **changes, **sharding)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_close_weights(weights(one, 4), weights(two, 4), atol=1e-5)
    for first, second in zip(comparable(one), comparable(two), strict=True):
        assert first.keys() == second.keys()
        assert (
            first["ledger/trained"] == second["ledger/trained"] and first["tokens/trained"] == second["tokens/trained"]
        )
        if "eval/loss" in first:
            assert first["eval/loss"] == pytest.approx(second["eval/loss"], abs=1e-5)


def test_a_killed_rank_takes_the_group_back_to_the_last_checkpoint(ray_local: Any, model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    disturbance = Disturbance(run, after_step=3, act=lambda: os.kill(pid_of(run, "learner-1"), signal.SIGKILL))
    train("dpo", model, run, max_steps=20, save_steps=2, per_device_train_batch_size=2, runtime=TWO)
    assert disturbance.done
    (lost,) = events(run, "actor_lost")
    assert "learner-1" in lost["detail"]["reason"]
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, 21))
    # 28 rows are three steps of 8 and one of 4.
    assert_balanced(run, trained=5 * 28)


SHARDED = {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}


@pytest.mark.parametrize(
    ("runtime", "options"), [(RAY, {}), (TWO, {}), (TWO, SHARDED)], ids=["one rank", "two ranks", "weights in shards"]
)
def test_metrics_of_the_users_own_are_the_same_numbers_on_every_number_of_ranks(
    ray_local: Any, model: str, tmp_path: Path, runtime: dict[str, Any], options: dict[str, Any]
) -> None:
    """5 rows in batches of 2: three batches, so that of two ranks one has nothing to do at the end."""
    seen: list[Any] = []

    def share_right(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)  # in the process of who wrote it
        wanted, found = prediction.label_ids[:, 1:], prediction.predictions[:, :-1]
        asked = wanted != -100
        return {"share_right": float((found == wanted)[asked].mean()), "rows": len(wanted)}

    def most_probable(logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    run = tmp_path / "run"
    inputs = {
        "compute_metrics": share_right,
        "preprocess_logits_for_metrics": most_probable,
        "eval_dataset": rows("sft", 5, start=100),
    }
    changes = {"max_steps": 2, "eval_steps": 1, "per_device_eval_batch_size": 2, "runtime": runtime, **options}
    train("sft", model, run, inputs=inputs, **changes)
    assert len(seen) == 3 and all(each.shape == seen[0].shape and each.shape[0] == 5 for each in seen)
    written = lines(run / "metrics.jsonl")
    assert [line["eval/share_right"] for line in written] == pytest.approx(
        [line["eval/mean_token_accuracy"] for line in written]
    )
    assert written[-1]["eval/rows"] == 5
