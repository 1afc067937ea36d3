"""Takes a preference apart: the prompt that two answers share, and what is left of each.

chosen = prompt + a, rejected = prompt + b  ─ shared_prompt ─►  prompt, a, b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Sequential = TypeVar("Sequential", bound=Sequence[Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPair(Generic[Sequential]):
    """A preference with its prompt taken out."""

    prompt: Sequential
    chosen: Sequential
    rejected: Sequential


def shared_prompt(chosen: Sequential, rejected: Sequential) -> SplitPair[Sequential]:
    """Take out what two texts, or two conversations, start with; TRL's `extract_prompt`.

    Texts are split at a character, conversations at a message. A space right before the place where texts part belongs
    to the answers. Neither answer is ever left empty: where one side goes on from the whole other, the last thing that
    they share is part of both answers.

    The prompt is empty if nothing is shared; TRL answers something else there (its index becomes -1).
    """
    shorter = min(len(chosen), len(rejected))
    place = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if place is None:
        place = max(shorter - 1, 0)
    elif place > 0 and chosen[place - 1] == " ":
        place -= 1
    return SplitPair(prompt=chosen[:place], chosen=chosen[place:], rejected=rejected[place:])  # type: ignore[arg-type]
