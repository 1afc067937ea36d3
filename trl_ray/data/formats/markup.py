"""The turns of a written conversation, and the promise that no text between them is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trl_ray.errors import DataError
from trl_ray.types import Message

SEQUENCE_TOKENS = (
    r"<s>|</s>|<bos>|<eos>|<BOS_TOKEN>|<\|begin_of_text\|>|<\|end_of_text\|>|<\|endoftext\|>|\[gMASK\]<sop>"
)
"""Regular expression: what tokenizers put at the ends of a sequence."""
_LITERAL = "set dataset_text_format=plain to train such texts as they stand"
_BETWEEN = re.compile(rf"(?:\s|{SEQUENCE_TOKENS})*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn as it was written."""

    role: str
    content: str
    closed: bool
    """Its end marker is there."""


def gap_free(pattern: re.Pattern[str], text: str, start: int, *, where: str) -> Iterator[re.Match[str]]:
    """Every match from `start` to the end of the text, with only white space and sequence tokens in between.

    Raises:
        DataError: there is other text outside of the matches; quotes it.
    """
    place = start
    while place < len(text):
        match = pattern.match(text, place)
        if match is None:
            raise refuse(text, place, "the start of a turn", where=where)
        yield match
        between = _BETWEEN.match(text, match.end())
        place = between.end() if between else match.end()


def as_messages(turns: Sequence[Turn], *, where: str, closed: bool = True) -> tuple[Message, ...]:
    """The turns as messages, without the assistant's empty turn that only invites to answer.

    Raises:
        DataError: the last turn stops without its end marker, and `closed` says that it must not.
    """
    kept = list(turns)
    if kept and not kept[-1].closed and kept[-1].role == "assistant" and not kept[-1].content.strip():
        kept.pop()
    elif kept and not kept[-1].closed and closed:
        raise DataError(
            f"{where} must end every turn, the last one stops after {kept[-1].content[-40:]!r}. Complete or remove the "
            f"row, or {_LITERAL}."
        )
    return tuple({"role": turn.role, "content": turn.content} for turn in kept)


def refuse(text: str, place: int, expected: str, *, where: str) -> DataError:
    """The error for text that the format does not have at this place."""
    return DataError(
        f"{where} must have {expected} at character {place}, got {text[place : place + 40]!r}. Mend or remove the row, "
        f"or {_LITERAL}."
    )
