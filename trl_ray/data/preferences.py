"""Takes preference data apart: the prompt that two answers share, and one pair as two labelled answers.

chosen = prompt + a, rejected = prompt + b  ─ shared_prompt ─►  prompt, a, b  ─ unpair ─►  (a, True), (b, False)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Sequential = TypeVar("Sequential", bound=Sequence[Any])
_PAIR = ("prompt", "chosen", "rejected")


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


def extract_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its prompt in a column of its own; a row that has the same form in `prompt` stays as it is.

    A text prompt beside conversations is replaced, because these repeat it (TRL's `maybe_extract_prompt`).
    """
    if "chosen" not in row or "rejected" not in row:
        return dict(row)
    if "prompt" in row and isinstance(row["prompt"], str) == isinstance(row["chosen"], str):
        return dict(row)
    split = shared_prompt(row["chosen"], row["rejected"])
    return {**row, "prompt": split.prompt, "chosen": split.chosen, "rejected": split.rejected}


def unpair(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every pair as two rows (`prompt`, `completion`, `label`), the wanted answer first; other columns go to both.

    Rows without `chosen` and `rejected` pass unchanged, so that unpaired data may come through here as well.
    """
    for row in rows:
        if "chosen" not in row or "rejected" not in row:
            yield dict(row)
            continue
        kept = {key: value for key, value in row.items() if key not in _PAIR}
        prompt = {"prompt": row["prompt"]} if "prompt" in row else {}
        yield {**prompt, "completion": row["chosen"], "label": True, **kept}
        yield {**prompt, "completion": row["rejected"], "label": False, **kept}
