"""Finds what the assistant wrote in the rendering of any chat template, without markers in it.

    messages[:i], header ──┐
    messages[:i+1] ────────┼─ render ─► header | body | end of turn i ─┐
    the same with a probe ─┘                                          ├─► text, spans ─ check ─ the whole rendering
    what follows the probe when the conversation goes on ─────────────┘

Every assistant's turn is taken from the rendering in which it is the last one, because some templates take the thoughts
out of earlier turns. Where a template does not, the pieces are the whole rendering, character by character; where it
does, they may differ from it in beginnings of turns alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl_ray.data.chat.chat_rendering import ChatFormat, ChatTokenizer, RenderedChat, render_chat
from trl_ray.errors import ModelError
from trl_ray.types import Message

PROBE = "\ue000probe7f3a9c\ue001"
"""Stands in for a content; no template writes its first character."""
_NEXT_PROBE = "\ue002next7f3a9c\ue003"
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Where a message may keep its thoughts."""
_OPEN_THOUGHT = re.compile(r"\s*<think>\s*(?:</think>\s*)?\Z")


class TurnTokenizer(ChatTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that finding turns needs."""

    def get_added_vocab(self) -> Mapping[str, int]:
        """Tokens outside the base vocabulary; those that end a turn are among them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """An assistant's turn, cut out of the rendering in which it is the last one."""

    header: str
    """All up to where the model begins to write."""
    body: str
    end: str
    """What follows the body."""
    messages: tuple[Message, ...]
    """The conversation up to this turn; its last message has `mark` in the place of the body."""
    mark: str
    opening: int = 0
    """Characters of the generation prompt that the turn does not show, because it has thoughts of its own."""


def locate_turns(
    tokenizer: TurnTokenizer, messages: Sequence[Message], chat: ChatFormat, *, where: str = "a conversation"
) -> RenderedChat:
    """The conversation, with a span for each of the assistant's messages: what it wrote and what ends its turn.

    Raises:
        ModelError: the template refuses the conversation, or its turns cannot be told apart; names `where`.
    """
    finder = _Finder(tokenizer, tuple(messages), chat, where, added_tokens(tokenizer))
    try:
        return finder.find()
    except _NotApartError as error:
        try:
            return finder.find(calls_stay=True)
        except _NotApartError:
            raise error from None


def added_tokens(tokenizer: TurnTokenizer) -> re.Pattern[str]:
    """What finds the tokens of the added vocabulary in a text."""
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


class _NotApartError(ModelError):
    """The turns cannot be told apart."""


@dataclass(frozen=True, slots=True)
class _Finder:
    tokenizer: TurnTokenizer
    messages: tuple[Message, ...]
    chat: ChatFormat
    where: str
    tokens: re.Pattern[str]

    def find(self, *, calls_stay: bool = False) -> RenderedChat:
        """`calls_stay`: calls are rendered alike whatever follows, so that they are found by what stands before."""
        whole = self._render(self.messages)
        places = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not places:
            return RenderedChat(text=whole, spans=())
        turns = [self._turn(place, calls_stay=calls_stay) for place in places]
        pieces, appended = [turns[0].header], ""
        for number, (place, turn) in enumerate(zip(places, turns, strict=True)):
            if number + 1 < len(turns):
                after = self._until_next(place, places[number + 1], turn, turns[number + 1])
                # An answer right behind another one: what begins that is no end of this.
                adjacent = places[number + 1] == place + 1
                end = self._stop(turn.end, after, place, may_lack=adjacent)
            else:
                after = self._rest(place, turn)
                end = self._last_stop(turn, after, place)
                # Some families end a turn with the token that begins the next one; the last turn gets one, too.
                appended = "" if after.startswith(end) else end
            pieces += [turn.body + end, after.removeprefix(end)]
        rendered = [*pieces[:-2], pieces[-2].removesuffix(appended), pieces[-1]]
        if not _is_rendering(whole, rendered):
            raise self._refuse(places[-1], "renders earlier turns differently from the last one")
        return RenderedChat(text="".join(pieces), spans=tuple(_every_second(pieces)))

    def _render(self, messages: Sequence[Message], *, header: bool = False) -> str:
        return render_chat(self.tokenizer, messages, self.chat, add_generation_prompt=header, where=self.where).text

    def _try(self, messages: Sequence[Message], *, header: bool = False) -> str | None:
        try:
            return self._render(messages, header=header)
        except ModelError:
            return None

    def _turn(self, place: int, *, calls_stay: bool) -> _Turn:
        before, message = self.messages[:place], self.messages[place]
        last = self._render((*before, message))
        if calls_stay and message.get("tool_calls"):
            header = self._try(before, header=True) or ""
            if header and last.startswith(header):
                end = last.removeprefix(header)
                return _Turn(header=header, body="", end=end, messages=(*before, message), mark=header)
        for probe in _probes(message):
            text = self._try((*before, probe))
            if text is None or text.count(PROBE) != 1:
                continue
            start, end = self._start(before, text, PROBE), text.partition(PROBE)[2]
            opening = 0 if last.startswith(text[:start]) else start - _closed(text[:start], last)
            start -= opening
            if last.startswith(text[:start]) and last.endswith(end) and start + len(end) <= len(last):
                body = last[start : len(last) - len(end)]
                turn = (*before, probe)
                return _Turn(header=last[:start], body=body, end=end, messages=turn, mark=PROBE, opening=opening)
        raise self._refuse(place, "does not render its content between the header and the end of a turn")

    def _start(self, before: Sequence[Message], text: str, probe: str) -> int:
        """Where the model begins to write: after as much of the generation prompt as the finished turn shows."""
        content = text.index(probe)
        closed, opened = self._try(before) if before else "", self._try(before, header=True)
        if closed is None or opened is None or opened == closed:
            return content
        return min(content, len(opened) if text.startswith(opened) else _closed(opened, text))

    def _until_next(self, place: int, following: int, turn: _Turn, later: _Turn) -> str:
        """What stands between the body of a turn and where the model writes again."""
        before = (*turn.messages, *self.messages[place + 1 : following])
        text = self._try((*before, {"role": "assistant", "content": _NEXT_PROBE}))
        if text is None or text.count(turn.mark) != 1 or text.count(_NEXT_PROBE) != 1:
            raise self._refuse(place, "does not render the next answer")
        start = self._start(before, text, _NEXT_PROBE) - later.opening
        return text[text.index(turn.mark) + len(turn.mark) : start]

    def _rest(self, place: int, turn: _Turn) -> str:
        """What follows the body of the last turn."""
        text = self._try((*turn.messages, *self.messages[place + 1 :]))
        if text is None or text.count(turn.mark) != 1:
            raise self._refuse(place, "does not render what follows")
        return text.partition(turn.mark)[2]

    def _last_stop(self, turn: _Turn, after: str, place: int) -> str:
        if place + 1 < len(self.messages):
            return self._stop(turn.end, after, place)
        calls = self.messages[place].get("tool_calls")
        follower = {"role": "tool", "name": "hi", "content": "hi"} if calls else {"role": "user", "content": "hi"}
        more = self._try((*turn.messages, follower))
        going_on = more.partition(turn.mark)[2] if more is not None and more.count(turn.mark) == 1 else turn.end
        shared = self._shared(turn.end, going_on)
        # What a template writes at the end of a conversation alone is no part of a turn, unless nothing else ends it.
        own = self._first_token(turn.end[len(shared) :])
        return shared + own if own and not self._ends_turn(shared) else self._stop(turn.end, going_on, place)

    def _stop(self, end: str, after: str, place: int, *, may_lack: bool = False) -> str:
        """What of `after` belongs to the turn: what is there at the end of a conversation as well, up to a token."""
        shared = self._shared(end, after)
        if self._ends_turn(shared) or may_lack:
            return shared
        token = self._first_token(after[len(shared) :])
        if token is None:
            raise self._refuse(place, "writes no token of the added vocabulary at its end")
        return shared + token

    def _shared(self, first: str, second: str) -> str:
        cut = _shared_length(first, second)
        for text in (first, second):
            for token in self.tokens.finditer(text):
                if token.start() < cut < token.end():
                    cut = token.start()
        return first[:cut]

    def _ends_turn(self, text: str) -> bool:
        return re.search(rf"(?:{self.tokens.pattern})\s*\Z", text) is not None

    def _first_token(self, text: str) -> str | None:
        token = re.match(rf"\s*(?:{self.tokens.pattern})", text)
        return token[0] if token else None

    def _refuse(self, place: int, why: str) -> _NotApartError:
        return _NotApartError(
            f"The chat template must write each turn of the assistant in one piece, and of message {place} of "
            f"{self.where} it {why}. Set a chat_template with {{% generation %}} markers, or set "
            "assistant_only_loss to False."
        )


def _probes(message: Message) -> Iterator[Message]:
    """The message with a probe as content: without its calls, then with them."""
    plain: dict[str, Any] = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
    plain["content"] = PROBE
    if plain.get("tool_calls"):
        yield {key: value for key, value in plain.items() if key != "tool_calls"}
    yield plain


def _closed(header: str, text: str) -> int:
    """How much of a header the text shows; thoughts that it opens otherwise are no part of it."""
    shared = header[: _shared_length(header, text)]
    opening = re.search(r"<think>\s*\Z", shared)
    return opening.start() if opening else len(shared)


def _shared_length(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _every_second(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    place = 0
    for number, piece in enumerate(pieces):
        if number % 2:
            yield place, place + len(piece)
        place += len(piece)


def _is_rendering(whole: str, pieces: Sequence[str]) -> bool:
    """Whether the pieces (header, turn, header, turn, ..., rest) are a text, but for what it lacks before turns' ends.

    A turn's thoughts may be missing in it, and the opening of thoughts at the end of a header. Read from the end.
    """
    if whole == "".join(pieces):
        return True
    rest = whole.removesuffix(pieces[-1]) if whole.endswith(pieces[-1]) else None
    for number in range(len(pieces) - 2, 0, -2):
        if rest is None:
            return False
        rest = _without_turn(rest, pieces[number - 1], pieces[number])
    return rest == ""


def _without_turn(text: str, header: str, turn: str) -> str | None:
    """The text without a header and the end of a turn that it ends with; None where it does not."""
    opening = _OPEN_THOUGHT.search(header)
    headers = [header, header[: opening.start()], header[: opening.start()] + "\n"] if opening else [header]
    shared = _shared_length(text[::-1], turn[::-1])
    # A turn and the header before it may begin and end alike.
    for length in range(shared, max(0, shared - 64), -1):
        kept = text[: len(text) - length]
        for shown in (kept, re.sub(r"<think>\s*\Z", "", kept), re.sub(r"\s*<think>\s*\Z", "", kept)):
            for candidate in headers:
                if shown.endswith(candidate):
                    return shown.removesuffix(candidate)
    return None
