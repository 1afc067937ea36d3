"""Conversations that were written into one text with a model family's markers, read back into messages.

    text ─ recognise (how it starts) ─► TextFormat ─ read_transcript ─► messages (role, content, thinking, tool_calls)

Every character of the text is either a marker, white space between turns, a begin or end token of the sequence, or part
of a message; anything else is an error, so that nothing gets lost on the way.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trl_ray.data.formats import harmony
from trl_ray.data.formats.bracketed import instruction_places, read_instructions, read_vicuna, vicuna_places
from trl_ray.data.formats.chatml import read_assistant, read_tool_results
from trl_ray.data.formats.markup import SEQUENCE_TOKENS, Turn, as_messages, gap_free, refuse
from trl_ray.errors import DataError
from trl_ray.types import Message


class TextFormat(enum.StrEnum):
    """How a text writes down who says what."""

    PLAIN = "plain"
    """Not at all: a text without roles."""
    CHATML = "chatml"
    LLAMA2 = "llama2"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    VICUNA = "vicuna"
    ZEPHYR = "zephyr"
    GEMMA = "gemma"
    PHI = "phi"
    COHERE = "cohere"
    HARMONY = "harmony"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The texts that the messages of a row were read from."""

    kind: TextFormat
    texts: Mapping[str, str]
    """By column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """A format in which every turn has a header with its role and an end."""

    opening: str
    """Regular expression: the special token that a header starts with."""
    header: str
    """Regular expression with the group `role`: the whole header."""
    end: str
    """Regular expression."""
    roles: Mapping[str, str]
    """The role that the header names: the role of the message."""


_PLAIN_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLE_TOKEN = r"<\|(?:system|user|assistant|tool)\|>"
_MARKERS: dict[TextFormat, Markers] = {
    TextFormat.CHATML: Markers(
        opening=r"<\|im_start\|>",
        header=r"<\|im_start\|>(?P<role>[^\n<]*)(?:\n|\Z)",
        end=r"<\|im_end\|>",
        roles={**_PLAIN_ROLES, "developer": "developer"},
    ),
    TextFormat.LLAMA3: Markers(
        opening=r"<\|start_header_id\|>",
        header=r"<\|start_header_id\|>(?P<role>[^<]*)<\|end_header_id\|>(?:\n\n|\Z)",
        end=r"<\|eot_id\|>",
        roles={**_PLAIN_ROLES, "ipython": "tool"},
    ),
    TextFormat.GEMMA: Markers(
        opening=r"<start_of_turn>",
        header=r"<start_of_turn>(?P<role>[^\n<]*)(?:\n|\Z)",
        end=r"<end_of_turn>",
        roles={"user": "user", "model": "assistant"},
    ),
    TextFormat.COHERE: Markers(
        opening=r"<\|START_OF_TURN_TOKEN\|>",
        header=r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>[A-Z]+)_TOKEN\|>",
        end=r"<\|END_OF_TURN_TOKEN\|>",
        roles={"SYSTEM": "system", "USER": "user", "CHATBOT": "assistant"},
    ),
    TextFormat.ZEPHYR: Markers(
        opening=_ROLE_TOKEN,
        header=r"<\|(?P<role>system|user|assistant|tool)\|>(?:\n|\Z)",
        end=r"</s>",
        roles=_PLAIN_ROLES,
    ),
    TextFormat.PHI: Markers(
        opening=_ROLE_TOKEN,
        header=r"<\|(?P<role>system|user|assistant|tool)\|>\n?",
        end=r"<\|end\|>",
        roles=_PLAIN_ROLES,
    ),
}
# Tried in this order on what follows a sequence's begin token; the first that fits names the format.
_STARTS: tuple[tuple[TextFormat, str], ...] = (
    (TextFormat.HARMONY, r"<\|start\|>"),
    (TextFormat.CHATML, r"<\|im_start\|>(?![^\n<]*<\|im_sep\|>)"),
    (TextFormat.LLAMA3, r"<\|start_header_id\|>"),
    (TextFormat.GEMMA, r"<start_of_turn>"),
    (TextFormat.COHERE, r"<\|START_OF_TURN_TOKEN\|>"),
    (TextFormat.PHI, r"<\|(?:system|user|assistant)\|>(?=.*<\|end\|>)"),
    (TextFormat.ZEPHYR, r"<\|(?:system|user|assistant)\|>\n(?=.*</s>)"),
    (TextFormat.LLAMA2, r"\[INST\](?=\s*<<SYS>>|.*</s>\s*<s>\s*\[INST\])"),
    (TextFormat.MISTRAL, r"\[INST\]|\[SYSTEM_PROMPT\]"),
    (TextFormat.VICUNA, r"(?=.*\sASSISTANT:)(?:(?!ASSISTANT:).)*?(?<!\S)USER:.*\sASSISTANT:"),
)
_BEGIN = re.compile(rf"(?:\s|{SEQUENCE_TOKENS})*")
# Made of special tokens. Labels of prose ("Human:", "### Instruction:") are words, and a text may have them.
_LOOKS = re.compile(
    r"<\|(?!endoftext\|>)\w+\|>|</?(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|"
    r"<\uff5c[^\uff5c\n]{1,40}\uff5c>"
)


def recognise(text: str, *, where: str) -> TextFormat:
    """The format of one text, told from how it starts.

    Raises:
        DataError: it starts like none of them and yet holds the markers of a template; quotes the first of these.
    """
    begin = _BEGIN.match(text)
    start = begin.end() if begin else 0
    for kind, pattern in _STARTS:
        if re.compile(pattern, re.DOTALL).match(text, start):
            return kind
    seen = _LOOKS.search(text)
    if seen:
        known = ", ".join(kind for kind in TextFormat if kind is not TextFormat.PLAIN)
        raise DataError(
            f"{where} must be plain text or written in one of {known}; it starts with {text[:40]!r} and has "
            f"{seen[0]!r} at character {seen.start()}, which looks like another chat template. Convert it to "
            "messages, or set dataset_text_format=plain to train such texts as they stand."
        )
    return TextFormat.PLAIN


def read_transcript(text: str, kind: TextFormat, *, where: str, closed: bool = True) -> tuple[Message, ...]:
    """The messages of a text in a known format.

    An assistant's turn without content at the very end is an invitation to answer and is left out. Thoughts go to the
    key that the family's own template reads: `thinking` (Harmony) or `reasoning_content` (ChatML). Text inside a
    turn stays as it is, but for the white space that the format itself puts beside its markers. `closed` says that the
    last turn must have its end marker.

    Raises:
        DataError: an unknown role, a turn without its end, or text outside of all turns; quotes what was seen.
    """
    begin = _BEGIN.match(text)
    start = begin.end() if begin else 0
    if kind is TextFormat.PLAIN:
        raise AssertionError("plain text has no messages")
    if kind is TextFormat.HARMONY:
        return harmony.read(text, start, where=where, closed=closed)
    if kind in (TextFormat.LLAMA2, TextFormat.MISTRAL):
        turns = read_instructions(text, start, where=where)
    elif kind is TextFormat.VICUNA:
        turns = read_vicuna(text, start, where=where)
    else:
        turns = _read_marked(text, start, _MARKERS[kind], where=where)
    messages = as_messages(turns, where=where, closed=closed)
    if kind is TextFormat.CHATML:
        return tuple(part for message in messages for part in _chatml(message, where))
    return messages


def assistant_places(text: str, kind: TextFormat) -> list[tuple[int, int]]:
    """Characters ``[start, stop)`` of what the assistant wrote in a text, its turns' end markers included."""
    begin = _BEGIN.match(text)
    start = begin.end() if begin else 0
    if kind is TextFormat.HARMONY:
        return harmony.assistant_places(text, start)
    if kind in (TextFormat.LLAMA2, TextFormat.MISTRAL):
        return instruction_places(text, start)
    if kind is TextFormat.VICUNA:
        return vicuna_places(text, start)
    return [
        (match.start("content"), match.end("end"))
        for match in _turn_pattern(_MARKERS[kind]).finditer(text, start)
        if _MARKERS[kind].roles.get(match["role"].strip()) == "assistant" and (match["content"].strip() or match["end"])
    ]


def _turn_pattern(markers: Markers) -> re.Pattern[str]:
    return re.compile(rf"{markers.header}(?P<content>.*?)(?P<end>{markers.end}|\Z)", re.DOTALL)


def _chatml(message: Message, where: str) -> tuple[Message, ...]:
    if message["role"] == "assistant":
        return (read_assistant(message, where=where),)
    return read_tool_results(message) if message["role"] == "user" else (message,)


def _read_marked(text: str, start: int, markers: Markers, *, where: str) -> list[Turn]:
    pattern = _turn_pattern(markers)
    opening = re.compile(markers.opening)
    turns = []
    for match in gap_free(pattern, text, start, where=where):
        written = match["role"].strip()
        role = markers.roles.get(written)
        if role is None:
            raise refuse(text, match.start(), f"a turn of one of {', '.join(markers.roles)}", where=where)
        nested = opening.search(match["content"])
        if nested:
            raise refuse(text, match.start("content") + nested.start(), "the end of the turn before it", where=where)
        turns.append(Turn(role=role, content=match["content"], closed=bool(match["end"])))
    return turns
