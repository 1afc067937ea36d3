"""Every pipeline through the life that scripts give a trainer: measured, trained, saved, pushed, gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

import dataset_runs
from runs import PROMPTS, distill, grpo, sdpo
from tiny_models import build_tiny_model
from trl_ray.models.checkpoint import checkpoint_step
from trl_ray.pipelines.distill import DistillPipeline
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.run import trainer_methods
from trl_ray.pipelines.sdpo import SDPOPipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def made(name: str, model: str, run: Path) -> tuple[Any, dict[str, Any]]:
    """A pipeline of two steps, and what Python gives it."""
    if name in dataset_runs.SUPERVISED:
        inputs = {
            "train_dataset": dataset_runs.rows(name, 28),
            "eval_dataset": {"near": dataset_runs.rows(name, 4, start=40), "far": dataset_runs.rows(name, 6, start=80)},
        }
        options = {"max_steps": 2, "eval_steps": 2, "save_steps": 1}
        return dataset_runs.pipeline(name, model, run, inputs=inputs, **options), inputs
    inputs = {"train_dataset": PROMPTS, "eval_dataset": {"near": PROMPTS[:2], "far": PROMPTS[4:7]}}
    options = {"max_steps": 2, "eval_steps": 2, "save_steps": 1}
    kinds: dict[str, Any] = {
        "grpo": (GRPOPipeline, grpo(model, run, **options)),
        "sdpo": (SDPOPipeline, sdpo(model, run, **options)),
        "distill": (DistillPipeline, distill(model, model, run, **options)),
    }
    kind, config = kinds[name]
    return kind(args=config, **inputs), inputs


@pytest.mark.parametrize("name", [*dataset_runs.SUPERVISED, "grpo", "sdpo", "distill"])
def test_a_trainer_lives(name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, pushed = tmp_path / "run", []
    pipeline, inputs = made(name, model, run)
    before = pipeline.evaluate()
    best = "loss" if name in dataset_runs.SUPERVISED or name == "distill" else "reward"
    assert {f"eval_near_{best}", f"eval_far_{best}"} <= before.keys() and not run.exists()
    output = pipeline.train()
    after = pipeline.evaluate()
    told = {key: value for key, value in output.metrics.items() if key.startswith("eval/")}
    assert after == pytest.approx({key.replace("eval/", "eval_"): value for key, value in told.items()}, rel=1e-4)
    assert pipeline.evaluate("near", metric_key_prefix="test").keys() == {
        key.replace("eval_", "test_", 1) for key in after if key.startswith("eval_near_")
    }
    other = pipeline.evaluate(inputs["train_dataset"][:3])
    assert f"eval_{best}" in other

    saved = pipeline.save_model(tmp_path / "saved")
    assert AutoConfig.from_pretrained(saved).model_type == "qwen2" and AutoTokenizer.from_pretrained(saved).eos_token
    monkeypatch.setattr(
        trainer_methods, "push_run", lambda config, model, **told: pushed.append((model, told)) or "url"
    )
    assert pipeline.push_to_hub("done", dataset_name="some/rows", tags="tagged") == "url"
    [(folder, commit)] = pushed
    assert folder == output.model and commit["message"] == "done"
    assert "some/rows" in commit["card"] and "- tagged" in commit["card"]

    again = PIPELINES[name].from_run(run, **inputs)
    assert checkpoint_step(again.model) == 2 and again.evaluate() == pytest.approx(after, rel=1e-4)
    assert again.train().steps == 2
    earlier = pipeline.train(resume_from_checkpoint=str(run / "checkpoints" / "step-1"))
    assert earlier.steps == 2 and pipeline.evaluate() == pytest.approx(after, rel=1e-4)
