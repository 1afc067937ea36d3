"""Evaluations of whole runs on rollouts: their numbers in every place, several sets, the best model, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import EarlyStoppingCallback

from runs import PROMPTS, events, grpo, lines
from tiny_models import build_tiny_model
from trl_ray.models.scoring.rollout_prediction import RolloutPrediction
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def brief(completions: list[Any], **columns: Any) -> list[float]:
    """Shorter is better."""
    return [-float(len(str(completion))) for completion in completions]


def measured(prediction: RolloutPrediction) -> dict[str, Any]:
    """How many answers there are, and a number that is written anyway."""
    ids, labels = prediction
    assert labels is None and len(ids) == len(prediction.completions) == len(prediction.prompts)
    return {"rows": len(ids), "eval_far_mean" if len(ids) == 4 else "mean": prediction.rewards.mean(), "left": "out"}


def test_the_numbers_of_an_evaluation_are_in_every_place(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = {"near": PROMPTS[:3], "far": PROMPTS[6:8]}
    config = grpo(model, run, eval_steps=2, num_generations_eval=2)
    GRPOPipeline(
        args=config, reward_funcs=brief, train_dataset=PROMPTS, eval_dataset=sets, compute_metrics=measured
    ).train()
    written = lines(run / "metrics.jsonl")
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    names = ("reward", "reward_std", "rewards/brief/mean", "rewards/brief/std", "completions/mean_length",
             "completions/clipped_ratio", "frac_reward_zero_std", "entropy", "rows", "mean")  # fmt: skip
    for line in written:
        for name in (f"eval/{each}_{name}" for each in sets for name in names):
            assert (name in line) == (line["step"] % 2 == 0), name
    told = {(event["detail"]["step"], name) for event in events(run, "evaluated") for name in event["detail"]}
    assert {(step, f"eval/{each}_reward") for step in (0, 2, 4) for each in sets} <= told
    kept = pq.read_table(run / "completions" / "eval-far-000002.parquet").to_pylist()
    # Two prompts, two answers each; the mean of their rewards is the one that was written.
    assert len(kept) == 4 and all(row["advantage"] is None and row["age"] == 0 for row in kept)
    assert sum(row["reward/brief"] for row in kept) / 4 == pytest.approx(written[1]["eval/far_reward"])
    assert {row["prompt"] for row in kept} == {row["prompt"] for row in PROMPTS[6:8]}
    # The user's own: four answers to two prompts, and the mean that was written beside it.
    line = written[1]
    assert (line["eval/near_rows"], line["eval/far_rows"]) == (6, 4) and line["eval/far_entropy"] > 1
    assert line["eval/far_mean"] == pytest.approx(line["eval/far_reward"])
    page = (run / "report.html").read_text()
    assert "Metrics of your own" in page and "far_mean" in page
    assert "held out near" in page and "held out far" in page


def test_the_best_reward_names_the_model_of_the_run_and_transformers_callback_ends_it(
    model: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = grpo(
        model, run, max_steps=8, eval_steps=1, save_strategy="best", load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/steady/mean", learning_rate=1e-6,
    )  # fmt: skip

    def steady(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    output = GRPOPipeline(
        args=config,
        reward_funcs=[steady, brief],
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    ).train()
    # The first evaluation is the best one, the two after it are no better.
    assert (output.steps, output.model.name) == (3, "step-1")
