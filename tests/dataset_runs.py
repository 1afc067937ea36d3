"""Small real runs on datasets for integration tests: rows of every kind, options that take seconds, comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from runs import comparable, lines, merge
from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.run.session import TrainOutput

WORDS = ("one", "two", "three", "four", "five", "six")
SUPERVISED = ("sft", "dpo", "kto", "cpo", "orpo", "reward", "prm")
RAY = {"kind": "ray", "health_interval_s": 0.3, "health_deadline_s": 6.0}


def rows(pipeline: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that differ from each other: counting upwards is right, downwards wrong."""
    made = []
    for number in range(start, start + count):
        prompt = f"count {number % 9}: "
        up, down = " ".join(WORDS[: number % 6 + 1]), " ".join(WORDS[::-1][: number % 5 + 1])
        if pipeline == "sft":
            row: dict[str, Any] = {"prompt": prompt, "completion": up}
        elif pipeline == "kto":
            row = {"prompt": prompt, "completion": up if number % 2 else down, "label": bool(number % 2)}
        elif pipeline == "prm":
            row = {"prompt": prompt, "completions": [up, down, up], "labels": [True, False, number % 2 == 0]}
        else:
            row = {"prompt": prompt, "chosen": up, "rejected": down}
        made.append(row)
    return made


def values(model: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run that takes a second: 8 examples a step, in two micro-batches."""
    base: dict[str, Any] = {
        "model_name_or_path": model,
        "output_dir": str(output_dir),
        "max_steps": 4,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "max_length": 96,
        "num_train_epochs": 1.0,
        "disable_dropout": True,
        "logging_steps": 1,
        "save_steps": 0,
        "html_report": False,
        "runtime": {"kind": "local"},
    }
    return merge(base, changes)


def pipeline(
    name: str, model: str, output_dir: Path, *, inputs: Mapping[str, Any] | None = None, **changes: Any
) -> Any:
    """A run that is ready to `train`; its rows are 28 of its kind unless the options or `inputs` name others."""
    chosen: Any = PIPELINES[name]
    config: SupervisedRunConfig = build(chosen.config_class, values(model, output_dir, **changes))
    given = dict(inputs or {})
    if config.dataset_name is None and not config.datasets:
        given.setdefault("train_dataset", rows(name, 28))
    if config.eval_steps and config.dataset_test_split is None:
        given.setdefault("eval_dataset", rows(name, 6, start=100))
    return chosen(args=config, **given)


def train(name: str, model: str, output_dir: Path, **changes: Any) -> TrainOutput:
    """One run to its end."""
    output: TrainOutput = pipeline(name, model, output_dir, **changes).train()
    return output


def write_rows(path: Path, table: Sequence[Mapping[str, Any]]) -> str:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def weights(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, or its adapter's."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    whole = folder / "model.safetensors"
    return load_file(whole if whole.exists() else folder / "adapter_model.safetensors")


def assert_close_weights(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], *, atol: float) -> None:
    """Equal but for rounding."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=0, atol=atol, err_msg=name)


def assert_same_run(straight: Path, broken: Path, *, step: int) -> None:
    """Every byte of the last checkpoint (weights, optimizer, random state, place) and every number of every step."""
    assert comparable(straight) == comparable(broken)
    first, second = (
        json.loads((run / "checkpoints" / f"step-{step}" / "manifest.json").read_text())["files"]
        for run in (straight, broken)
    )
    assert first == second


def losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in lines(run_dir / "metrics.jsonl")]
