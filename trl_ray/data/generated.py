"""Generates rows of a reasoning_gym task: endless problems with a checkable answer, no download.

    reasoning_gym/<task> + dataset_kwargs + seed ─► {prompt: messages, answer, task, metadata}

With the option `examples: n`, n solved items of the task come before every question, as earlier turns: a small
model then sees what an answer looks like. With `question: TEXT` the question is worded anew: `{name}` in the text
stands for that entry of the item's metadata, e.g. ``question: "{expression} = ?"``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.errors import DataError

PREFIX = "reasoning_gym/"
# Item i of a task is drawn from seed + i: a held-out seed must lie beyond every item of the training set.
_HELD_OUT_OFFSET = 1_000_003


def generate(name: str, options: Mapping[str, Any], *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """All items of one task; those with `held_out` come from seeds that training never uses.

    Columns: `prompt` (messages, a question last), `answer` (str or None), `task` (str), `metadata` (JSON values).

    Raises:
        DataError: reasoning_gym is not installed, has no such task, or refuses the options.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"dataset_name={name!r} needs the package reasoning_gym, which is not installed. "
            "Run: pip install reasoning-gym"
        ) from error
    task = name.removeprefix(PREFIX)
    if task not in DATASETS:
        guess = nearest(task, DATASETS)
        hint = f"Did you mean {PREFIX}{guess}?" if guess else "Its tasks: " + ", ".join(sorted(DATASETS)) + "."
        raise DataError(f"dataset_name must be {PREFIX} and a task of reasoning_gym, got {name!r}. {hint}")
    settings = {"seed": seed, **options}
    examples, wording = _take_examples(settings, name), settings.pop("question", None)
    first = settings["seed"]
    if held_out:
        settings["seed"] = first + max(int(options.get("size", 0)), _HELD_OUT_OFFSET)
    try:
        dataset = reasoning_gym.create_dataset(task, **settings)
        items = [_reworded(dataset[index], wording, name) for index in range(len(dataset))]
        # One past the training items and far below the held-out ones.
        shown = reasoning_gym.create_dataset(task, **{**settings, "seed": first + len(items), "size": max(examples, 1)})
        turns = [turn for index in range(examples) for turn in _solved(_reworded(shown[index], wording, name))]
    except (TypeError, ValueError, AssertionError) as error:
        known = ", ".join([*sorted(DATASETS[task][1].__dataclass_fields__), "examples", "question"])
        raise DataError(
            f"dataset_kwargs must be options of {name}, got {dict(options)!r}: {error}. Its options: {known}."
        ) from error
    return [_row(task, turns, item) for item in items]


def _take_examples(settings: dict[str, Any], name: str) -> int:
    examples = settings.pop("examples", 0)
    if not isinstance(examples, int) or examples < 0:
        raise DataError(f"dataset_kwargs.examples of {name} must be a whole number from 0, got {examples!r}.")
    return examples


def _reworded(item: Mapping[str, Any], wording: object, name: str) -> dict[str, Any]:
    """The item with its question in the run's own words; other items' braces are left alone."""
    if wording is None:
        return dict(item)
    metadata = item["metadata"]
    known = {key for key, value in metadata.items() if isinstance(value, (str, int, float))}
    wanted = set(re.findall(r"\{(\w+)\}", wording)) if isinstance(wording, str) else set()
    if not wanted or not wanted <= known:
        raise DataError(
            f"dataset_kwargs.question of {name} must be a text with {{name}} of an entry of the task's metadata, got "
            f"{wording!r}. Entries: {', '.join(sorted(known))}."
        )
    return {**item, "question": re.sub(r"\{(\w+)\}", lambda match: str(metadata[match[1]]), str(wording))}


def _solved(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": str(item["answer"])}]


def _row(task: str, turns: list[dict[str, Any]], item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [*turns, {"role": "user", "content": item["question"]}],
        "answer": item["answer"],
        "task": task,
        # Some tasks keep sets, dates or their own classes there; scoring only reads plain values.
        "metadata": json.loads(json.dumps(item["metadata"], default=str)),
    }
