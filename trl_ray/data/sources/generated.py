"""Generates rows of a reasoning_gym task: endless problems with a checkable answer, no download.

    reasoning_gym/<task> + dataset_kwargs + seed ─► items ─► {prompt: messages, answer, task, metadata}
                                                         └─► another form (generated_forms.py)

With the option `examples: n`, n solved items of the task come before every question, as earlier turns: a small
model then sees what an answer looks like. With `question: TEXT` the question is worded anew: `{name}` in the text
stands for that entry of the item's metadata, e.g. ``question: "{expression} = ?"``. With `form` the rows are those of
another format; see `RowForm`. With `held_out_size: n`, evaluation has n rows; without it, as many as training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.data.sources.generated_forms import GeneratedItem, RowForm, WrongAnswer, form_row
from trl_ray.errors import DataError

PREFIX = "reasoning_gym/"
# Item i of a task is drawn from seed + i: a held-out seed must lie beyond every item of the training set.
_HELD_OUT_OFFSET = 1_000_003
_OWN_OPTIONS = ("examples", "question", "form", "wrong", "held_out_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What this module makes of items; all other options are the task's."""

    examples: int
    question: Any
    form: RowForm
    wrong: WrongAnswer
    held_out_size: int | None
    """None takes the task's `size`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedRows(Sequence[dict[str, Any]]):
    """The rows of a task; each is made when it is asked for, and is the same each time."""

    name: str
    task: str
    items: Any
    """The task's items by number."""
    seed: int
    """Of the first item."""
    turns: tuple[Mapping[str, Any], ...]
    """Solved items that come before each question."""
    options: _Options

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        """Row `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = _reworded(self.items[index], self.options.question, self.name)
        prompt = [*self.turns, {"role": "user", "content": item["question"]}]
        if self.options.form is not RowForm.PROMPTS:
            generated = GeneratedItem(name=self.name, number=index, seed=self.seed + index, prompt=prompt, item=item)
            return form_row(generated, self.options.form, wrong=self.options.wrong, items=self.items)
        return {
            "prompt": prompt,
            "answer": item["answer"],
            "task": self.task,
            # Some tasks keep sets, dates or their own classes there; scoring only reads plain values.
            "metadata": json.loads(json.dumps(item["metadata"], default=str)),
        }


def generate(name: str, options: Mapping[str, Any], *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """All rows of one task at once; see `generated_rows`."""
    return list(generated_rows(name, options, seed=seed, held_out=held_out))


def generated_rows(name: str, options: Mapping[str, Any], *, seed: int, held_out: bool) -> GeneratedRows:
    """The rows of one task; those with `held_out` come from seeds that training never uses.

    Columns: `prompt` (messages, a question last), `answer` (str or None), `task` (str), `metadata` (JSON values); with
    the option `form`, those of that form.

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
    settings = {"seed": seed, **{key: value for key, value in options.items() if key not in _OWN_OPTIONS}}
    own = _own_options(options, name)
    first = settings["seed"]
    try:
        if held_out:
            settings["seed"] = first + max(int(options.get("size", 0)), _HELD_OUT_OFFSET)
            if own.held_out_size is not None:
                settings["size"] = own.held_out_size
        items = reasoning_gym.create_dataset(task, **settings)
        # One past the training items and far below the held-out ones.
        beyond = {**settings, "seed": first + len(items), "size": max(own.examples, 1)}
        shown = reasoning_gym.create_dataset(task, **beyond)
        solved = [_solved(_reworded(shown[index], own.question, name)) for index in range(own.examples)]
        rows = GeneratedRows(
            name=name,
            task=task,
            items=items,
            seed=settings["seed"],
            turns=tuple(turn for turns in solved for turn in turns),
            options=own,
        )
        rows[0]  # what a task refuses is said before anything starts
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        known = ", ".join([*sorted(DATASETS[task][1].__dataclass_fields__), *_OWN_OPTIONS])
        raise DataError(
            f"dataset_kwargs must be options of {name}, got {dict(options)!r}: {error}. Its options: {known}."
        ) from error
    return rows


def _own_options(options: Mapping[str, Any], name: str) -> _Options:
    examples = options.get("examples", 0)
    if not isinstance(examples, int) or examples < 0:
        raise DataError(f"dataset_kwargs.examples of {name} must be a whole number from 0, got {examples!r}.")
    held_out = options.get("held_out_size")
    if held_out is not None and (not isinstance(held_out, int) or held_out < 1):
        raise DataError(f"dataset_kwargs.held_out_size of {name} must be a whole number from 1, got {held_out!r}.")
    form, wrong = options.get("form", RowForm.PROMPTS), options.get("wrong", WrongAnswer.OTHER)
    for key, value, known in (("form", form, list(RowForm)), ("wrong", wrong, list(WrongAnswer))):
        if value not in [str(choice) for choice in known]:
            guess = nearest(str(value), [str(choice) for choice in known])
            hint = f" Did you mean {guess}?" if guess else ""
            raise DataError(f"dataset_kwargs.{key} of {name} must be one of {', '.join(known)}, got {value!r}.{hint}")
    return _Options(
        examples=examples,
        question=options.get("question"),
        form=RowForm(form),
        wrong=WrongAnswer(wrong),
        held_out_size=held_out,
    )


def _reworded(item: Mapping[str, Any], wording: object, name: str) -> dict[str, Any]:
    """The item with its question in the run's own words; other items' braces are left alone."""
    if wording is None:
        return dict(item)
    metadata = {**item["metadata"], "answer": item["answer"]}
    known = {key for key, value in metadata.items() if isinstance(value, (str, int, float))}
    wanted = set(re.findall(r"\{(\w+)\}", wording)) if isinstance(wording, str) else set()
    if not wanted or not wanted <= known:
        raise DataError(
            f"dataset_kwargs.question of {name} must be a text with {{answer}} or the {{name}} of an entry of the "
            f"task's metadata, got {wording!r}. Entries: {', '.join(sorted(known))}."
        )
    return {**item, "question": re.sub(r"\{(\w+)\}", lambda match: str(metadata[match[1]]), str(wording))}


def _solved(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": str(item["answer"])}]
