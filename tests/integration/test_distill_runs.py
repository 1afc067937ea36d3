"""Distillation from end to end in one process: supports, placements, dataset completions, routes, refusals, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from runs import PROMPTS, assert_balanced, distill, events, lines
from tiny_models import build_tiny_model
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.errors import ConfigError, DataError
from trl_ray.pipelines.distill import DistillPipeline

pytestmark = pytest.mark.integration
ANSWERED = [{**row, "completion": "one two three"} for row in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("teacher"), family="llama", tied=False, seed=7)


def train(config: DistillConfig, rows: Any = PROMPTS, **inputs: Any) -> Path:
    output = DistillPipeline(args=config, train_dataset=rows, **inputs).train()
    assert output.steps == config.max_steps
    return output.run_dir


@pytest.mark.parametrize(
    "options",
    [
        {"loss_support": "teacher", "loss_top_k": 8, "beta": 0.0},
        {"loss_support": "teacher", "loss_top_k": 8, "beta": 1.0, "temperature": 0.7},
        {"loss_support": "student", "loss_top_k": 8},
        {"loss_support": "union", "loss_top_k": 8, "beta": 0.5, "loss_add_tail": False},
        {"loss_support": "full", "beta": 0.25},
        {"loss_support": "realised"},
        {"loss_support": "realised", "beta": 0.5, "loss_top_k": 1},
        {"loss_support": "sampled"},
        {"distillation_objective": "iw_opd"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_every_support_trains(model: str, teacher: str, tmp_path: Path, options: dict[str, Any]) -> None:
    run = train(distill(model, teacher, tmp_path / "run", max_steps=2, **options))
    assert_balanced(run, trained=32)
    for line in lines(run / "metrics.jsonl"):
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0


def test_the_held_out_divergence_falls(model: str, teacher: str, tmp_path: Path) -> None:
    config = distill(
        model, teacher, tmp_path / "run", max_steps=20, eval_steps=20, learning_rate=5e-3, beta=0.0, loss_top_k=32
    )
    run = train(config, eval_dataset=PROMPTS[:8])
    first, last = (event["detail"]["eval/loss"] for event in events(run, "evaluated"))
    assert last < 0.9 * first


def test_actors_and_the_learner_hold_the_same_teacher(model: str, teacher: str, tmp_path: Path) -> None:
    runs = []
    for placement in ("actor", "learner"):
        teachers = [{"model_name_or_path": teacher, "placement": placement}]
        config = distill(model, None, tmp_path / placement, max_steps=3, loss_support="sampled", teachers=teachers)
        runs.append(lines(train(config) / "metrics.jsonl"))
    for one, two in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3, abs=1e-5)


def test_dataset_completions_are_trained_on_in_their_share(model: str, teacher: str, tmp_path: Path) -> None:
    run = train(
        distill(model, teacher, tmp_path / "run", max_steps=4, lmbda=0.5, cross_entropy_weight=0.3), rows=ANSWERED
    )
    shares = [line["distillation/label_fraction"] for line in lines(run / "metrics.jsonl")]
    assert 0.25 < np.mean(shares) < 0.75
    assert all(line["distillation/cross_entropy"] > 0 for line in lines(run / "metrics.jsonl"))


def test_rows_choose_their_teacher(model: str, teacher: str, tmp_path: Path) -> None:
    rows = [{**row, "who": "first" if index % 2 else "second"} for index, row in enumerate(PROMPTS)]
    teachers = [{"name": "first", "model_name_or_path": teacher}, {"name": "second", "model_name_or_path": model}]
    run = train(distill(model, None, tmp_path / "run", max_steps=2, teachers=teachers, teacher_column="who"), rows=rows)
    assert sorted(event["actor"] for event in events(run, "actor_started") if "teacher" in event["actor"]) == [
        "teacher-first-0",
        "teacher-second-0",
    ]
    with pytest.raises(DataError, match=r"field 'who' .teacher_column., must be one of first, second, got str 'third'"):
        train(
            distill(model, None, tmp_path / "other", teachers=teachers, teacher_column="who"),
            rows=[*rows, {**PROMPTS[0], "who": "third"}],
        )


def test_an_asynchronous_run_stays_within_its_bound(model: str, teacher: str, tmp_path: Path) -> None:
    run = train(distill(model, teacher, tmp_path / "run", max_steps=6, max_staleness=2))
    assert_balanced(run, trained=96)
    assert max(line["staleness/max"] for line in lines(run / "metrics.jsonl")) <= 2


def test_a_larger_generation_batch_gives_several_updates(model: str, teacher: str, tmp_path: Path) -> None:
    config = distill(model, teacher, tmp_path / "run", max_steps=2, generation_batch_size=64, save_steps=0)
    assert config.updates_per_step == 4
    run = train(config)
    assert_balanced(run, trained=128)


def test_a_teacher_of_another_vocabulary_is_refused_with_what_to_do(model: str, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", family="qwen2", tied=True, seed=1)
    vocabulary = Path(other) / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("<|pad|>", "<|filler|>"))
    with pytest.raises(
        ConfigError, match=r"must have the student's vocabulary.*Take a teacher of the student's family"
    ):
        DistillPipeline(args=distill(model, other, tmp_path / "run"), train_dataset=PROMPTS).prepare()
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_teacher_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there must be a teacher"):
        DistillPipeline(args=distill(model, None, tmp_path / "run"), train_dataset=PROMPTS).prepare()


def test_the_student_becomes_its_teachers_likeness_where_the_whole_vocabulary_is_compared(
    model: str, teacher: str, tmp_path: Path
) -> None:
    config = distill(model, teacher, tmp_path / "run", max_steps=16, loss_support="full", learning_rate=5e-3)
    losses = [line["loss"] for line in lines(train(config) / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    assert load_file(tmp_path / "run" / "checkpoints" / "step-16" / "model.safetensors")
