"""Reads the formats that have no header per turn: Llama 2, Mistral and Vicuna.

    <s>[INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nuser [/INST] assistant </s><s>[INST] user [/INST] ...       Llama 2
    <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][INST]user[/INST]assistant</s>[INST]user[/INST] ...          Mistral
    system USER: user ASSISTANT: assistant</s>USER: user ASSISTANT: ...                                  Vicuna

The white space beside a marker belongs to the marker: versions of the same format differ in it.
"""

from __future__ import annotations

import re

from trl_ray.data.formats.markup import Turn, gap_free, refuse

_EXCHANGE = re.compile(
    r"\[SYSTEM_PROMPT\](?P<before>.*?)\[/SYSTEM_PROMPT\]"
    r"|\[INST\](?:\s*<<SYS>>(?P<system>.*?)<</SYS>>)?(?P<user>.*?)\[/INST\](?P<assistant>.*?)(?P<end></s>|\Z)",
    re.DOTALL,
)
_BRACKETS = re.compile(r"\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CONTENT)\]|<</?SYS>>")
_VICUNA_SYSTEM = re.compile(r"(?P<system>.*?)(?=(?<!\S)USER:)", re.DOTALL)
_VICUNA_EXCHANGE = re.compile(
    r"USER:(?P<user>.*?)(?:\sASSISTANT:(?P<assistant>.*?)(?P<end></s>|<\|endoftext\|>|(?=\sUSER:)|\Z)|\Z)", re.DOTALL
)
_VICUNA_ROLES = re.compile(r"(?:\s|^)(?:USER|ASSISTANT):")


def read_instructions(text: str, start: int, *, where: str) -> list[Turn]:
    """The turns of Llama 2 and Mistral, which only differ in where the system's text stands.

    Raises:
        DataError: text outside of all turns, or a marker inside one, those for tools among them.
    """
    turns: list[Turn] = []
    for match in gap_free(_EXCHANGE, text, start, where=where):
        for group, role in (("before", "system"), ("system", "system"), ("user", "user"), ("assistant", "assistant")):
            content = match[group]
            if content is None:
                continue
            inside = _BRACKETS.search(content)
            if inside:
                raise refuse(text, match.start(group) + inside.start(), "no marker inside a turn", where=where)
            if role == "system" and turns:
                raise refuse(text, match.start(group), "the system's text in the first turn only", where=where)
            closed = role != "assistant" or bool(match["end"])
            turns.append(Turn(role=role, content=content.strip(), closed=closed))
    return turns


def instruction_places(text: str, start: int) -> list[tuple[int, int]]:
    """Characters ``[start, stop)`` of each answer and its end, in Llama 2 and Mistral."""
    return [place for match in _EXCHANGE.finditer(text, start) if (place := _place(match)) is not None]


def vicuna_places(text: str, start: int) -> list[tuple[int, int]]:
    """The same in Vicuna."""
    return [place for match in _VICUNA_EXCHANGE.finditer(text, start) if (place := _place(match)) is not None]


def _place(match: re.Match[str]) -> tuple[int, int] | None:
    content = match["assistant"]
    if content is None or not content.strip():
        return None
    blank = len(content) - len(content.lstrip())
    return match.start("assistant") + blank, match.end("end")


def read_vicuna(text: str, start: int, *, where: str) -> list[Turn]:
    """The turns of Vicuna; what stands before the first `USER:` is the system's.

    An answer ends with `</s>` or `<|endoftext|>`, before the next `USER:`, or with the text.

    Raises:
        DataError: the roles do not alternate, or text follows an answer's end.
    """
    system = _VICUNA_SYSTEM.match(text, start)
    turns = []
    if system is not None and system["system"].strip():
        turns.append(Turn(role="system", content=system["system"].strip(), closed=True))
    for match in gap_free(_VICUNA_EXCHANGE, text, system.end() if system else start, where=where):
        for role in ("user", "assistant"):
            if match[role] is None:
                continue
            inside = _VICUNA_ROLES.search(match[role])
            if inside:
                raise refuse(text, match.start(role) + inside.start(), "the other speaker's turn", where=where)
            # The first versions of the format wrote no end; an answer without text is an invitation.
            closed = role == "user" or bool(match[role].strip())
            turns.append(Turn(role=role, content=match[role].strip(), closed=closed))
    return turns
