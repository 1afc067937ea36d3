"""Recipes as users of TRL and its neighbours have them, with only model and data replaced.

recipes/trl/PIPELINE-name.yaml --replaced--> options of a pipeline on a tiny model and a handful of rows
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from trl_ray.config.load import read_yaml

FOLDER = Path(__file__).parent
TRL = sorted((FOLDER / "trl").glob("*.yaml"))
NEIGHBOURS = sorted((FOLDER / "neighbours").glob("*.yaml"))
_DATA = ("dataset_name", "dataset_config", "dataset_mixer", "dataset_mixture", "datasets")
_MODELS = ("model_name_or_path", "base_model", "pretrain")


def pipeline_of(recipe: Path) -> str:
    """The pipeline that a file is for, by its name."""
    return next(name for name in _PIPELINES if recipe.stem.startswith(f"{name}-"))


_PIPELINES = ("async-grpo", "grpo", "rloo", "sdpo", "distill", "sft", "dpo", "kto", "cpo", "orpo", "reward")


def answered(recipe: Path) -> list[str]:
    """Options that a file says are answered, not read."""
    found = re.match(r"# answered: (.*)", recipe.read_text(encoding="utf-8"))
    return found[1].split() if found else []


def replaced(recipe: Path, *, model: str, data: Path, output_dir: Path) -> dict[str, Any]:
    """What a file says, of another model and other rows; each keeps the name under which it was written."""
    options = read_yaml(recipe)
    for name in (*_MODELS, "teacher_model_name_or_path"):
        if name in options:
            options[name] = model
    splits = options.get("dataset_splits") or [
        options.get("dataset_train_split", "train"),
        options.get("dataset_test_split", "test"),
    ]
    path = _rows(data / recipe.stem, pipeline_of(recipe), splits)
    for name in _DATA:
        if name in options:
            options[name] = _named(name, options[name], path)
    options.pop("dataset_config", None)
    options["output_dir"] = str(output_dir / recipe.stem)
    return options


def without(options: Mapping[str, Any], told: list[str]) -> dict[str, Any]:
    """The options that are left when those are removed that were answered; ``datasets.0.type`` is one of an entry."""
    kept = {name: value for name, value in options.items() if name not in told}
    for name in told:
        section, _, rest = name.partition(".")
        if rest and section in kept:
            place, _, key = rest.partition(".")
            kept[section] = [
                {each: item for each, item in entry.items() if str(number) != place or each != key}
                for number, entry in enumerate(kept[section])
            ]
    return kept


def _named(name: str, value: Any, path: str) -> Any:
    if name == "dataset_mixer":
        [share] = value.values()
        return {path: share}
    if name == "datasets":
        return [{**each, "path": path} for each in value]
    if name == "dataset_mixture":
        kept = [
            {key: item for key, item in each.items() if key != "config"} | {"id": path} for each in value["datasets"]
        ]
        return {**value, "datasets": kept}
    return path


def _rows(folder: Path, pipeline: str, splits: list[str]) -> str:
    """A dataset on disk, of the pipeline's kind: conversations."""
    made = {split: Dataset.from_list([dict(_row(pipeline, number)) for number in range(12)]) for split in splits}
    DatasetDict(made).save_to_disk(folder)
    return str(folder)


def _row(pipeline: str, number: int) -> Mapping[str, Any]:
    question = [{"role": "user", "content": f"Count to {number}."}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (f"It is {number}.", f"No, {number}!"))
    if pipeline == "sft":
        return {"messages": [*question, *good]}
    if pipeline == "kto":
        return {"prompt": question, "completion": good if number % 2 else bad, "label": bool(number % 2)}
    if pipeline in ("dpo", "cpo", "orpo", "reward"):
        return {"prompt": question, "chosen": good, "rejected": bad}
    return {"prompt": question, "answer": str(number)}
