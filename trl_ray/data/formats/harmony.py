"""Reads Harmony, the format of gpt-oss, in which one answer is several written messages on channels.

    <|start|>user<|message|>...<|end|>                                          ─► user
    <|start|>assistant<|channel|>analysis<|message|>...<|end|>                  ─┐
    <|start|>assistant<|channel|>commentary<|message|>...<|end|>                 ├► one message of the assistant:
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json     │  thinking, content, tool_calls
        <|message|>{...}<|call|>                                                 │
    <|start|>assistant<|channel|>final<|message|>...<|return|>                  ─┘
    <|start|>functions.f to=assistant<|channel|>commentary<|message|>...<|end|> ─► tool, with its name

The texts of system and developer are kept as they were written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from trl_ray.data.formats.markup import gap_free, refuse
from trl_ray.data.json_text import parse_json
from trl_ray.errors import DataError
from trl_ray.types import Message

_WRITTEN = re.compile(
    r"<\|start\|>(?P<head>[^<]*)"
    r"(?:(?P<channelled><\|channel\|>)(?P<channel>[^<]*)(?:<\|constrain\|>(?P<kind>[^<]*))?)?"
    r"(?:<\|message\|>(?P<content>.*?)(?P<end><\|end\|>|<\|return\|>|<\|call\|>|\Z)|\Z)",
    re.DOTALL,
)
_MARKER = re.compile(r"<\|(?:start|end|message|channel|constrain|return|call)\|>")
_RECIPIENT = re.compile(r"\bto=(\S+)")
_FUNCTIONS = "functions."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """One written message, its header taken apart."""

    author: str
    channel: str
    recipient: str | None
    content: str
    end: str
    place: int


def read(text: str, start: int, *, where: str, closed: bool = True) -> tuple[Message, ...]:
    """The messages of a text from `start` on.

    An assistant's header at the end without content is an invitation to answer and is left out.

    Raises:
        DataError: an unknown author or channel, a message without its end, or thoughts that nothing follows.
    """
    reader = _Reader(text, where)
    for match in gap_free(_WRITTEN, text, start, where=where):
        if match["content"] is None or (not match["end"] and not match["content"].strip()):
            if match["head"].strip() != "assistant" or match.end() != len(text):
                raise refuse(text, match.start(), "a message with content", where=where)
            break
        written = _take_apart(match, text, where)
        if not written.end and closed:
            raise DataError(
                f"{where} must end every message, the last one stops after {written.content[-40:]!r}. Complete or "
                "remove the row."
            )
        reader.add(written)
    return reader.finish()


def assistant_places(text: str, start: int) -> list[tuple[int, int]]:
    """Characters ``[start, stop)`` of each answer: from behind its header on, its end and headers inside included."""
    places: list[tuple[int, int]] = []
    open_since: int | None = None
    for match in _WRITTEN.finditer(text, start):
        if match["content"] is None or (match["head"].split() or [""])[0] != "assistant":
            continue
        if not match["end"] and not match["content"].strip():
            continue
        since = match.start() + len("<|start|>assistant") if open_since is None else open_since
        thought = match["channel"] is not None and match["channel"].strip() == "analysis"
        open_since = since if thought else None
        if not thought:
            places.append((since, match.end()))
    return places


def _take_apart(match: re.Match[str], text: str, where: str) -> _Written:
    nested = _MARKER.search(match["content"])
    if nested:
        place = match.start("content") + nested.start()
        raise refuse(text, place, "the end of the message before it", where=where)
    header = f"{match['head']} {match['channel'] or ''}"
    recipient = _RECIPIENT.search(header)
    author = (match["head"].split() or [""])[0]
    channel = (_RECIPIENT.sub("", match["channel"] or "").split() or [""])[0]
    return _Written(
        author=author,
        channel=channel,
        recipient=recipient[1] if recipient else None,
        content=match["content"],
        end=match["end"],
        place=match.start(),
    )


class _Reader:
    """Gathers what the assistant writes until the answer or a call completes it."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where
        self._messages: list[Message] = []
        self._open: dict[str, Any] = {}

    def add(self, written: _Written) -> None:
        if written.author == "assistant":
            self._assistant(written)
            return
        self._check_complete()
        if written.author in ("system", "developer", "user"):
            self._messages.append({"role": written.author, "content": written.content})
        elif written.recipient == "assistant" and written.author.startswith(_FUNCTIONS):
            name = written.author.removeprefix(_FUNCTIONS)
            self._messages.append({"role": "tool", "name": name, "content": written.content})
        else:
            raise refuse(
                self._text,
                written.place,
                "a message of system, developer, user, assistant or a function",
                where=self._where,
            )

    def finish(self) -> tuple[Message, ...]:
        self._check_complete()
        return tuple(self._messages)

    def _check_complete(self) -> None:
        # A preamble may be all that was said; thoughts alone are half an answer.
        if "content" in self._open:
            self._close({})
        if self._open:
            raise DataError(
                f"{self._where} must have an answer or a tool call after the thoughts "
                f"{self._open['thinking'][-40:]!r}. Complete or remove the row."
            )

    def _assistant(self, written: _Written) -> None:
        if written.recipient is not None:
            self._call(written)
        elif written.channel == "analysis":
            self._note("thinking", written)
        elif written.channel == "commentary":
            self._note("content", written)
        elif written.channel == "final":
            if "content" in self._open:
                self._close({})
            self._close({"content": written.content})
        else:
            raise refuse(self._text, written.place, "a channel analysis, commentary or final", where=self._where)

    def _note(self, key: str, written: _Written) -> None:
        if key in self._open:
            raise refuse(self._text, written.place, f"one {written.channel} message per answer", where=self._where)
        self._open[key] = written.content

    def _call(self, written: _Written) -> None:
        name = written.recipient or ""
        if not name.startswith(_FUNCTIONS):
            raise refuse(self._text, written.place, "a call to=functions.NAME", where=self._where)
        function = {"name": name.removeprefix(_FUNCTIONS), "arguments": _arguments(written.content)}
        call = {"type": "function", "function": function}
        self._close({"content": self._open.get("content", ""), "tool_calls": [call]})

    def _close(self, found: dict[str, Any]) -> None:
        self._messages.append({"role": "assistant", **self._open, **found})
        self._open = {}


def _arguments(text: str) -> Any:
    """The JSON object of a call; a function that takes bare text gets the text."""
    try:
        value = parse_json(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text
