"""Splits the text of a solution into its steps: at "Step n:", at numbers, or at line ends.

    "Step 1: add\\nStep 2: carry"   step        at "Step n:" that begins a line or follows a sentence; or ".", ")", "-"
    "1. add\\n2) carry"            numbered    at "n." and "n)" that begin a line
    "add\\n\\ncarry"                newline     at blank lines; where there are none, at line ends

Numbers must count up by one, so that "1." within a step, or a mention of an earlier step, begins nothing. Markers stay
in their steps, and what comes before the first belongs to the first step. Nothing is lost but the white space around
steps: without white space, the steps in a row are the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from trl_ray.config.reward_model_options import StepFormat

_HEADED = re.compile(
    r"(?:^|(?<=[.!?])[^\S\n])[^\S\n]*(?:[#*]+[^\S\n]*)?step[^\S\n]+(\d+)[*]*[^\S\n]*[:.)-]", re.I | re.M
)
_NUMBERED = re.compile(r"^[^\S\n]*(\d+)[.)](?=\s|$)", re.M)
_BLANK_LINE = re.compile(r"\n\s*\n")
_LONGEST_NUMBER = 9  # digits; what is longer is no number of a step


def split_steps(text: str, form: StepFormat = StepFormat.AUTO) -> tuple[str, ...]:
    """The steps of a solution in order, stripped, none of them blank; none for a blank text.

    AUTO takes headings where there is one, else numbers where they begin with 1, else lines. A form that is told and
    that the text does not have gives the whole text as one step.
    """
    match form if form is not StepFormat.AUTO else recognise_steps(text):
        case StepFormat.STEP:
            places = _markers(_HEADED, text)
        case StepFormat.NUMBERED:
            places = _markers(_NUMBERED, text)
        case _:
            lines = _BLANK_LINE.split(text.strip())
            return _not_blank(lines if len(lines) > 1 else text.split("\n"))
    return _not_blank(text[start:stop] for start, stop in pairwise([0, *places[1:], len(text)]))


def recognise_steps(text: str) -> StepFormat:
    """How the steps of a text are told apart, by its looks."""
    if _markers(_HEADED, text):
        return StepFormat.STEP
    first = next((match for match in _NUMBERED.finditer(text) if _number(match) == 1), None)
    return StepFormat.NEWLINE if first is None else StepFormat.NUMBERED


def _markers(pattern: re.Pattern[str], text: str) -> list[int]:
    """Where the markers begin that count up by one, from 1 if it is there, else from the first there is."""
    found = [match for match in pattern.finditer(text) if _number(match) is not None]
    numbers = [_number(match) for match in found]
    begin = numbers.index(1) if 1 in numbers else 0
    places: list[int] = []
    expected = numbers[begin] if found else None
    for match, number in zip(found[begin:], numbers[begin:], strict=True):
        if number == expected and expected is not None:
            places.append(match.start())
            expected += 1
    return places


def _number(match: re.Match[str]) -> int | None:
    return int(match[1]) if len(match[1]) <= _LONGEST_NUMBER else None


def _not_blank(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part.strip() for part in parts if part.strip())
