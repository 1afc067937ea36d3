"""Makes rows of supervised formats of a generated task: its answers, wrong ones beside them, solutions in steps.

    item ─┬─ completions   {prompt, completion}           the answer
          ├─ preferences   {prompt, chosen, rejected}     the answer, and a wrong one
          ├─ ratings       {prompt, completion, label}    every other item's answer is wrong
          └─ steps         {prompt, completions, labels}  sums term by term; every other item's go wrong at one step

A wrong answer is never equal to the right one. All depends on the seed of the item alone.
"""

from __future__ import annotations

import enum
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.errors import DataError

_CHAIN = re.compile(r"\s*(-?\d+)((?:\s*[+-]\s*\d+)+)\s*")
_TERM = re.compile(r"([+-])\s*(\d+)")
_TRIES = 100


class RowForm(enum.StrEnum):
    """Which rows are made of an item."""

    PROMPTS = "prompts"
    """A question to answer, for reinforcement learning."""
    COMPLETIONS = "completions"
    PREFERENCES = "preferences"
    RATINGS = "ratings"
    STEPS = "steps"


class WrongAnswer(enum.StrEnum):
    """Where a wrong answer is taken from."""

    OTHER = "other"
    """The right answer to another item; where that has the same, and for single items, as with `near`."""
    NEAR = "near"
    """The right answer and a little more or less; only for numbers."""
    LONGER = "longer"
    """The right answer with one digit too many, which is easy to see; only for numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedItem:
    """An item and how it is asked."""

    name: str
    """Names the task in messages."""
    number: int
    seed: int
    prompt: Sequence[Mapping[str, Any]]
    item: Mapping[str, Any]


def form_row(item: GeneratedItem, form: RowForm, *, wrong: WrongAnswer, items: Sequence[Any]) -> dict[str, Any]:
    """One row of a form; `items` are all of the task, for answers that belong to others.

    Raises:
        DataError: the item has no answer, there is no wrong one, or its solution has no steps.
    """
    prompt = list(item.prompt)
    if form is RowForm.STEPS:
        return {"prompt": prompt, **_steps(item, wrong)}
    right = item.item["answer"]
    if right is None:
        raise DataError(
            f"form={form} needs answers, and item {item.number} of {item.name} has none. Take another task."
        )
    if form is RowForm.COMPLETIONS:
        return {"prompt": prompt, "completion": _said(right)}
    if form is RowForm.RATINGS:
        good = item.number % 2 == 0
        return {
            "prompt": prompt,
            "completion": _said(right if good else wrong_answer(item, wrong, items)),
            "label": good,
        }
    return {"prompt": prompt, "chosen": _said(right), "rejected": _said(wrong_answer(item, wrong, items))}


def _said(answer: object) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": str(answer)}]


def wrong_answer(item: GeneratedItem, kind: WrongAnswer, items: Sequence[Any]) -> str:
    """An answer to the item that is not the right one.

    Raises:
        DataError: the right one is no number, and no other item's answer differs from it.
    """
    draw = random.Random(f"{item.name} {item.seed}")
    right = str(item.item["answer"])
    if kind is WrongAnswer.OTHER and len(items) > 1:
        for _ in range(_TRIES):
            other = items[(item.number + draw.randrange(1, len(items))) % len(items)]["answer"]
            if other is not None and not _same(str(other), right):
                return str(other)
    if not re.fullmatch(r"-?\d+", right):
        raise DataError(
            f"A wrong answer to item {item.number} of {item.name} must be found, and none is: {right!r} is no whole "
            f"number, and {'not found' if kind is WrongAnswer.OTHER else 'it is not looked for'} among the answers of "
            "others. Set wrong=other and a greater size."
        )
    return str(_wrong_number(int(right), kind, draw))


def _same(first: str, second: str) -> bool:
    if first.strip() == second.strip():
        return True
    try:
        return float(first) == float(second)
    except ValueError:
        return False


def _wrong_number(number: int, kind: WrongAnswer, draw: random.Random) -> int:
    """A number with a digit too many, or one of about the same size."""
    if kind is WrongAnswer.LONGER:
        return int(f"{number}{draw.randint(1, 9)}")
    return number + draw.choice([-1, 1]) * draw.randint(1, max(9, abs(number) // 10))


def _steps(item: GeneratedItem, wrong: WrongAnswer) -> dict[str, Any]:
    """Running totals as steps; where one is wrong, so are all after it, which go on from it."""
    expression = str(item.item["metadata"].get("expression", ""))
    found = _CHAIN.fullmatch(expression)
    if found is None:
        raise DataError(
            f"form=steps needs sums and differences of whole numbers, such as those of reasoning_gym/chain_sum, got "
            f"{expression or 'no expression'!r} as item {item.number} of {item.name}. Take another task."
        )
    terms = [(sign, int(number)) for sign, number in _TERM.findall(found[2])]
    draw = random.Random(f"{item.name} {item.seed}")
    slip = draw.randrange(len(terms)) if item.number % 2 else len(terms)
    total, steps = int(found[1]), []
    for place, (sign, number) in enumerate(terms):
        after = total + number if sign == "+" else total - number
        if place == slip:
            after = _wrong_number(after, wrong, draw)
        steps.append(f"{total} {sign} {number} = {after}")
        total = after
    return {"completions": steps, "labels": [place < slip for place in range(len(terms))]}
