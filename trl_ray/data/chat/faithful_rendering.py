"""Renders a conversation so that all it holds is in the text, and tells what the chat template leaves out.

    messages ─► shape, with a probe for every content, thought and argument ─ render ─► which probes are missing?
                                                                                              │
    messages ◄── Spelling (once per shape): thoughts under another key, in the content, word for word ◄─┘
        └─ render ─► text, spans, findings (what a user must know)

Templates read thoughts from one key, from the content, or not at all, and some take them out of the content. What a row
holds is what is to be trained, so a thought without a place stays where the model would have written it: before the
content, between <think> and </think>.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from trl_ray.data.chat.chat_rendering import ChatFormat, ChatTokenizer, RenderedChat, render_chat
from trl_ray.data.chat.turn_spans import THOUGHT_KEYS, TurnTokenizer, locate_turns
from trl_ray.errors import ModelError
from trl_ray.types import Message

_IN_CONTENT = re.compile(r"\s*(?:<think>)?(?P<thoughts>.*?)</think>(?P<rest>.*)", re.DOTALL)
_FOR_THE_LOSS = ("weight", "train")
"""Keys of a message that are meant for the loss and not for a template."""
_TOLD_ELSEWHERE = ("role", "content", "tool_calls", "tool_call_id", *THOUGHT_KEYS)


class Unrendered(enum.StrEnum):
    """What a template does not write as a row has it."""

    MOVED_THOUGHT = "moved_thought"
    """A thought has no place in the template and is written into the content."""
    EARLIER_THOUGHT = "earlier_thought"
    """A thought is written in the last turn alone."""
    THOUGHT = "thought"
    """A thought has no place at all."""
    CONTENT = "content"
    """An assistant's content."""
    CONTEXT = "context"
    """The content of another role."""
    ARGUMENTS = "arguments"
    CHANGED = "changed"
    """A content is written otherwise than it is in the row."""
    UNREAD = "unread"
    """A key of a message is not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a template does with a part of a message."""

    kind: Unrendered
    message: int
    field: str


class _How(enum.Enum):
    AS_IS = enum.auto()
    KEY = enum.auto()
    CONTENT = enum.auto()
    VERBATIM = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """How a message is given to the template."""

    how: _How = _How.AS_IS
    key: str = ""
    silent_calls: bool = False
    """A message that only calls has the content None."""
    text_arguments: bool = False
    """Arguments are JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelling:
    changes: tuple[_Change, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaithfulChat:
    """A conversation as text, and what the template does not write of it."""

    rendered: RenderedChat
    findings: tuple[Finding, ...]


def render_faithfully(
    tokenizer: TurnTokenizer,
    messages: Sequence[Message],
    chat: ChatFormat,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    locate: bool = False,
    where: str = "a conversation",
) -> FaithfulChat:
    """Render a conversation with all that it holds; `locate` finds the assistant's turns without markers.

    The text ends with the header of a new turn, or where the last one stops, as in `render_chat`.

    Raises:
        ModelError: the template refuses it, or its turns cannot be told apart; names `where`.
    """
    given = tuple({key: value for key, value in message.items() if key not in _FOR_THE_LOSS} for message in messages)
    spelling = _spelling(tokenizer, given, chat, every_turn=locate)
    verbatim: dict[str, str] = {}
    spelled = [_spelled(given[i], change, i, verbatim) for i, change in enumerate(spelling.changes)]
    if locate and not (add_generation_prompt or continue_final_message):
        rendered = locate_turns(tokenizer, spelled, chat, where=where)
    else:
        rendered = render_chat(
            tokenizer,
            spelled,
            chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            where=where,
        )
    rendered = _with_texts(rendered, verbatim)
    changed = tuple(_changed(given, spelling, rendered.text))
    return FaithfulChat(rendered=rendered, findings=(*spelling.findings, *changed))


def require_trained(messages: Sequence[Message], findings: Sequence[Finding], *, where: str) -> None:
    """Check that the template writes the arguments of calls, and something of every turn of the assistant.

    Raises:
        ModelError: names the message and its field.
    """
    for finding in findings:
        if finding.kind is Unrendered.ARGUMENTS or (
            finding.kind is Unrendered.CONTENT and not _says_more(messages[finding.message])
        ):
            raise ModelError(
                f"The chat template must render all that is trained, and of {where}, message {finding.message}, it "
                f"leaves out the field {finding.field!r}. Set a chat_template that renders it, or remove the row."
            )


def thoughts_of(message: Message) -> tuple[str, str] | None:
    """An assistant's thoughts and the content without them; None where there are none."""
    content = message["content"] if isinstance(message.get("content"), str) else ""
    for key in THOUGHT_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return message[key], content
    found = _IN_CONTENT.match(content)
    if found is None or not found["thoughts"].strip():
        return None
    return found["thoughts"].strip("\n"), found["rest"].lstrip("\n")


def _says_more(message: Message) -> bool:
    return bool(message.get("tool_calls")) or thoughts_of(message) is not None


def _folded(message: Message) -> str:
    """The content with the thoughts in it; as it was written, where they are there already."""
    found = thoughts_of(message)
    assert found is not None, "only thoughts are moved"
    thoughts, rest = found
    written = any(message.get(key) for key in THOUGHT_KEYS)
    return f"<think>\n{thoughts}\n</think>\n\n{rest}" if written else message["content"]


def _spelled(message: Message, change: _Change, place: int, verbatim: dict[str, str]) -> Message:
    """The message as the template is to read it; what is put in after rendering goes into `verbatim`."""
    made: dict[str, Any] = dict(message)
    if change.how is not _How.AS_IS:
        found = thoughts_of(message)
        assert found is not None, "only thoughts are moved"
        made = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
        if change.how is _How.KEY:
            made |= {"content": found[1], change.key: found[0]}
        elif change.how is _How.CONTENT:
            made["content"] = _folded(message)
        else:
            made["content"] = f"\ue000verbatim{place}\ue001"
            verbatim[made["content"]] = _folded(message)
    if change.silent_calls and not made.get("content"):
        made["content"] = None
    if change.text_arguments:
        made["tool_calls"] = [_with_text_arguments(call) for call in made["tool_calls"]]
    return made


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    written = {**function, "arguments": text}
    return {**call, "function": written} if "function" in call else written


def _with_texts(rendered: RenderedChat, texts: Mapping[str, str]) -> RenderedChat:
    text, spans = rendered.text, list(rendered.spans)
    for mark, content in texts.items():
        place = text.find(mark)
        longer = len(content) - len(mark)
        spans = [(a + longer * (a > place), b + longer * (b > place)) for a, b in spans]
        text = text.replace(mark, content, 1)
    return RenderedChat(text=text, spans=tuple(spans))


def _changed(messages: Sequence[Message], spelling: _Spelling, text: str) -> Iterator[Finding]:
    """Contents that are rendered, but in other words; those that are not rendered at all are told already."""
    told = {finding.message for finding in spelling.findings}
    for place, (message, change) in enumerate(zip(messages, spelling.changes, strict=True)):
        content = message.get("content")
        if place in told or change.how is not _How.AS_IS or not isinstance(content, str):
            continue
        found = thoughts_of(message) if message["role"] == "assistant" else None
        for part in found or (content,):
            said = part.strip()
            if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
                yield Finding(kind=Unrendered.CHANGED, message=place, field="content")
                break


def _spelling(
    tokenizer: TurnTokenizer, messages: Sequence[Message], chat: ChatFormat, *, every_turn: bool
) -> _Spelling:
    shape = json.dumps(
        [_shape(message, place) for place, message in enumerate(messages)], ensure_ascii=False, default=str
    )
    return _spelling_of_shape(shape, template_reader(tokenizer, chat), every_turn)


def template_reader(tokenizer: ChatTokenizer, chat: ChatFormat) -> TemplateReader:
    """A template with all that it reads besides messages."""
    return TemplateReader(
        tokens=tuple(sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())),
        template=chat.template,
        # Which tools there are says nothing of what is rendered of the messages, whether there are some does.
        tools=json.dumps([_tool_shape(tool) for tool in list(chat.tools or ())[:1]]),
        values=json.dumps(dict(chat.template_kwargs), sort_keys=True, default=str),
    )


@dataclass(frozen=True, slots=True)
class TemplateReader:
    """All that a rendering depends on besides the messages, as what can be compared."""

    tokens: tuple[tuple[str, str], ...]
    template: str
    tools: str
    values: str

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        return dict(self.tokens)

    def text(self, messages: Sequence[Message]) -> str | None:
        """What the template makes of the messages; None where it refuses them."""
        values = json.loads(self.values)
        chat = ChatFormat(template=self.template, tools=json.loads(self.tools), template_kwargs=values)
        try:
            return render_chat(self, messages, chat).text
        except ModelError:
            return None


def _probe(kind: str, place: int, number: int = 0) -> str:
    return f"\ue000{kind}{place}.{number}\ue001"


def _shape(message: Message, place: int) -> dict[str, Any]:
    """The message with a probe in the place of everything that it says."""
    shape: dict[str, Any] = {}
    for key, value in message.items():
        if key == "content":
            shape[key] = _content_shape(message, place)
        elif key in THOUGHT_KEYS:
            shape[key] = _probe("thought", place) if isinstance(value, str) and value.strip() else value
        elif key == "tool_calls":
            shape[key] = [_call_shape(call, place, number) for number, call in enumerate(value or ())]
        elif key == "tool_call_id":
            shape[key] = "a1b2c3d4e"  # Mistral's templates ask for nine characters
        else:
            shape[key] = value if key in ("role", "name") else _plain(value)
    return shape


def _tool_shape(tool: Any) -> dict[str, Any]:
    function = {"name": "x", "description": "x", "parameters": {"type": "object", "properties": {}, "required": []}}
    wrapped = isinstance(tool, Mapping) and "function" in tool
    return {"type": "function", "function": function} if wrapped else function


def _plain(value: Any) -> Any:
    """What stands for a value that rows have each their own of; a template may ask whether something holds."""
    if isinstance(value, str):
        return "x"
    return 0 if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _content_shape(message: Message, place: int) -> Any:
    content = message["content"]
    if not isinstance(content, str) or not content.strip():
        return content
    found = thoughts_of(message) if message["role"] == "assistant" else None
    if found is None or any(message.get(key) for key in THOUGHT_KEYS):
        return _probe("content", place)
    rest = _probe("content", place) if found[1].strip() else ""
    return f"<think>\n{_probe('thought', place)}\n</think>\n\n{rest}"


def _call_shape(call: Mapping[str, Any], place: int, number: int) -> dict[str, Any]:
    function = call.get("function", call)
    arguments: Any = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = {"key": _probe("argument", place, number)} if arguments else {}
    elif isinstance(arguments, str):
        arguments = _probe("argument", place, number)
    shape = {**function, "arguments": arguments}
    if isinstance(call.get("id"), str):
        shape |= {} if "function" in call else {"id": "a1b2c3d4e"}
    outer = {key: "a1b2c3d4e" if key == "id" else value for key, value in call.items()}
    return {**outer, "function": shape} if "function" in call else shape


@lru_cache(maxsize=4096)
def _spelling_of_shape(shape: str, reader: TemplateReader, every_turn: bool) -> _Spelling:
    messages: list[Message] = json.loads(shape)
    calls = _call_change(messages, reader)
    changes = [calls if message.get("tool_calls") else _Change() for message in messages]
    findings: list[Finding] = []
    whole = reader.text([_spelled(message, change, 0, {}) for message, change in zip(messages, changes, strict=True)])
    if whole is None:  # the conversation itself tells why
        return _Spelling(changes=tuple(changes), findings=())
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or thoughts_of(message) is None or _probe("thought", place) in whole:
            continue
        change, kind = _thought_change(messages, changes, place, reader)
        changes[place] = change
        if kind is not None and not (every_turn and kind is Unrendered.EARLIER_THOUGHT):
            findings.append(Finding(kind=kind, message=place, field=_thought_field(message)))
    marks: dict[str, str] = {}
    spelled = [_spelled(message, changes[i], i, marks) for i, message in enumerate(messages)]
    text = reader.text(spelled) or whole
    for mark, content in marks.items():
        text = text.replace(mark, content)
    findings += [*_missing(messages, text), *_unread(messages, spelled, text, marks, reader)]
    return _Spelling(changes=tuple(changes), findings=tuple(findings))


def _missing(messages: Sequence[Message], text: str) -> Iterator[Finding]:
    for place, message in enumerate(messages):
        if _probe("content", place) in str(message.get("content")) and _probe("content", place) not in text:
            kind = Unrendered.CONTENT if message["role"] == "assistant" else Unrendered.CONTEXT
            yield Finding(kind=kind, message=place, field="content")
        for probe in _arguments(message, place):
            if probe not in text:
                yield Finding(kind=Unrendered.ARGUMENTS, message=place, field="tool_calls")
                break


def _unread(
    messages: Sequence[Message], spelled: Sequence[Message], text: str, marks: Mapping[str, str], reader: TemplateReader
) -> Iterator[Finding]:
    """Keys without which the template writes the same; those of all messages of a role are looked at together."""
    first: dict[tuple[str, str], int] = {}
    for place, message in enumerate(messages):
        for key, value in message.items():
            # A tool's result is told apart by its place: few templates write the name beside it.
            names_tool = key == "name" and message["role"] == "tool"
            if key not in _TOLD_ELSEWHERE and value not in (None, "", [], {}) and not names_tool:
                first.setdefault((message["role"], key), place)
    for (role, key), place in first.items():
        without = [{k: v for k, v in m.items() if k != key or m["role"] != role} for m in spelled]
        found = reader.text(without)
        for mark, content in marks.items():
            found = found and found.replace(mark, content)
        if found == text:
            yield Finding(kind=Unrendered.UNREAD, message=place, field=key)


def _arguments(message: Message, place: int) -> list[str]:
    probes = [_probe("argument", place, number) for number in range(len(message.get("tool_calls") or ()))]
    written = json.dumps(message.get("tool_calls"), ensure_ascii=False)
    return [probe for probe in probes if probe in written]


def _thought_field(message: Message) -> str:
    return next((key for key in THOUGHT_KEYS if message.get(key)), "content")


def _call_change(messages: Sequence[Message], reader: TemplateReader) -> _Change:
    """How calls are written so that the template renders them; as they are, where no way helps."""
    if not any(message.get("tool_calls") for message in messages):
        return _Change()
    for silent, as_text in ((False, False), (True, False), (False, True), (True, True)):
        change = _Change(silent_calls=silent, text_arguments=as_text)
        spelled = [_spelled(m, change if m.get("tool_calls") else _Change(), 0, {}) for m in messages]
        text = reader.text(spelled)
        if text is not None and all(p in text for i, m in enumerate(messages) for p in _call_words(m, i)):
            return change
    return _Change()


def _call_words(message: Message, place: int) -> list[str]:
    names = [call.get("function", call).get("name") for call in message.get("tool_calls") or ()]
    return [*_arguments(message, place), *(name for name in names if isinstance(name, str))]


def _thought_change(
    messages: Sequence[Message], changes: Sequence[_Change], place: int, reader: TemplateReader
) -> tuple[_Change, Unrendered | None]:
    """Where a thought is put that the whole rendering does not show, and what is to be told of it."""
    before = [_spelled(messages[i], changes[i], i, {}) for i in range(place)]
    base, message = changes[place], messages[place]
    wanted = [_probe("thought", place), _probe("content", place)]
    wanted = [probe for probe in wanted if probe in json.dumps(message, ensure_ascii=False)]
    now = reader.text([*before, _spelled(message, base, place, {})]) or ""
    wanted += [probe for probe in _arguments(message, place) if probe in now]

    def shows(change: _Change) -> bool:
        marks: dict[str, str] = {}
        text = reader.text([*before, _spelled(message, change, place, marks)])
        for mark, content in marks.items():
            text = text and text.replace(mark, content)
        return text is not None and all(probe in text for probe in wanted)

    if shows(base):
        return base, Unrendered.EARLIER_THOUGHT
    for key in THOUGHT_KEYS:
        change = replace(base, how=_How.KEY, key=key)
        if shows(change):
            return change, None
    for how in (_How.CONTENT, _How.VERBATIM):
        change = replace(base, how=how)
        if shows(change):
            written = any(message.get(key) for key in THOUGHT_KEYS)
            return change, Unrendered.MOVED_THOUGHT if written else None
    return base, Unrendered.THOUGHT
