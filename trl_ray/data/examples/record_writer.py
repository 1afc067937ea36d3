"""Writes what a record says as texts that are ready to be tokenised.

    text ────────────────────────────────────────────────────────┐
    text + end of sequence ──────────────────────────────────────┼─► Text: characters, the model's and muted spans
    messages ─ chat template ─┬──────────────────────────────────┘
    text they were read from ─┘ where it is in the template's own markup and says something else

Nothing that a row holds gets lost on the way without a word: see `faithful_rendering`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from trl_ray.data.chat.chat_rendering import ChatFormat, own_template, render_chat
from trl_ray.data.chat.faithful_rendering import (
    FaithfulChat,
    TemplateReader,
    render_faithfully,
    require_trained,
    template_reader,
)
from trl_ray.data.chat.row_format import row_format
from trl_ray.data.examples.tokenisation import ExampleTokenizer, Text, TextRules
from trl_ray.data.formats.records import Record, Said
from trl_ray.data.formats.transcripts import TextFormat, assistant_places, recognise
from trl_ray.data.validation import show
from trl_ray.errors import DataError, ModelError
from trl_ray.types import Message

_ANSWERS = ("completion", "chosen", "rejected")
_Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Writes what one record says; `where` names it in messages."""

    record: Record
    tokenizer: ExampleTokenizer
    rules: TextRules
    where: str

    def prompt(self, prompt: Said) -> Text:
        """A prompt by itself, with the header of the turn that answers it."""
        if isinstance(prompt, str):
            return self.text(prompt)
        return self._prompt_as_written(prompt) or self.chat(prompt, add_generation_prompt=True)

    def opened(self, prompt: Said) -> Text:
        """A prompt that is gone on from: by a new turn, or where the assistant's last one stops (TRL's rule)."""
        if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
            return self.prompt(prompt)
        found = render_faithfully(self.tokenizer, prompt, self._chat(), continue_final_message=True, where=self.where)
        return self._checked(prompt, found)

    def answered(self, prompt: Said, answer: Said) -> Text:
        """A prompt and what follows it; a plain answer ends with the end-of-sequence token."""
        if isinstance(prompt, str):
            assert isinstance(answer, str), "a record is text or messages throughout"
            return self.text(prompt + self.with_end(answer))
        assert not isinstance(answer, str), "a record is text or messages throughout"
        column = next((name for name in _ANSWERS if getattr(self.record, name, None) is answer), "")
        return self.chat((*prompt, *answer), written=self._written(column))

    def text(self, text: str, *, special_tokens: bool = True) -> Text:
        """A plain text."""
        return Text(text=self._require_unicode(text), special_tokens=special_tokens)

    def with_end(self, text: str) -> str:
        """A text that ends with the end-of-sequence token, where the tokenizer has one; never with two."""
        end = self.tokenizer.eos_token
        return text if end is None or text.endswith(end) else text + end

    def document(self, messages: Sequence[Message]) -> Text:
        """A whole conversation."""
        return self.chat(messages, written=self._written("text"))

    def chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, written: str | None = None
    ) -> Text:
        """A conversation as its template renders it, or as the text `written` has it.

        Raises:
            ModelError: there is no template, it refuses the conversation, or it leaves out what is trained.
            DataError: a weight is none.
        """
        muted: list[int] = []
        if not add_generation_prompt:  # of a prompt by itself nothing is trained
            muted = [n for n, message in enumerate(messages) if is_muted(message, f"{self.where}, message {n}")]
        found = self._rendered(messages, add_generation_prompt, locate=self.rules.locate_turns)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if muted and len(found.rendered.spans) != len(answers):
            found = self._rendered(messages, add_generation_prompt, locate=True)
        rendered, text = found.rendered, self._checked(messages, found)
        spans = dict(zip(answers, rendered.spans, strict=False))
        silent = tuple(spans[n] if n in spans else self._context(messages, n, rendered.text) for n in muted)
        heard = tuple(span for span in rendered.spans if span not in silent) if muted else rendered.spans
        text = replace(text, spans=heard, muted=silent)
        if written is None or muted or not self._is_own_markup():
            return text
        return self._as_written(text, written, messages)

    def _checked(self, messages: Sequence[Message], found: FaithfulChat) -> Text:
        rendered = found.rendered
        self._require_unicode(rendered.text)
        self._require_functions(messages, rendered.text)
        require_trained(messages, found.findings, where=self.where)
        return Text(text=rendered.text, spans=rendered.spans, special_tokens=False, findings=found.findings)

    def _rendered(self, messages: Sequence[Message], header: bool, *, locate: bool) -> FaithfulChat:
        return render_faithfully(
            self.tokenizer, messages, self._chat(), add_generation_prompt=header, locate=locate, where=self.where
        )

    def _chat(self) -> ChatFormat:
        chat = ChatFormat(
            template=self.rules.chat_template or own_template(self.tokenizer),
            template_kwargs=self.rules.template_kwargs,
        )
        return row_format(chat, self.record.columns, where=self.where, tools=self.record.tools)

    def _context(self, messages: Sequence[Message], place: int, text: str) -> tuple[int, int]:
        """Where a message of another role than the assistant's stands in the text."""
        before = render_chat(self.tokenizer, messages[:place], self._chat(), where=self.where).text if place else ""
        until = render_chat(self.tokenizer, messages[: place + 1], self._chat(), where=self.where).text
        if not (until.startswith(before) and text.startswith(until)):
            raise ModelError(
                f"The chat template must write message {place} of {self.where} by itself, because it has the weight 0, "
                "and it does not. Set assistant_only_loss, or give weights to the assistant's messages alone."
            )
        return len(before), len(until)

    def _require_functions(self, messages: Sequence[Message], text: str) -> None:
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        for what, field_name, functions in (("tool", "tools", self.record.tools), ("call of", "tool_calls", calls)):
            self._require_rendered(what, field_name, functions, text)

    def _require_rendered(self, what: str, field_name: str, functions: Iterable[Any], text: str) -> None:
        """Many templates leave out tools and calls without a word; the model would learn to call what it cannot see."""
        for name, count in Counter(map(_function_name, functions)).items():
            if name is not None and len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text)) < count:
                raise ModelError(
                    f"The chat template must render every tool and call, and it leaves out the {what} {name!r} of "
                    f"{self.where}, field {field_name!r}. Set a chat_template that renders tools and as many calls per "
                    "turn, or remove the row."
                )

    def _require_unicode(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where} must be text that can be written as UTF-8, and character {error.start} of it, "
                f"{text[error.start : error.end]!r}, cannot. Mend or remove the row."
            ) from error
        return text

    def _written(self, column: str) -> str | None:
        """The text that the prompt and the answer in a column were read from."""
        texts = self.record.written.texts if self.record.written is not None else {}
        return texts.get("prompt", "") + texts[column] if column in texts else None

    def _is_own_markup(self) -> bool:
        """Whether the record was read from text in the markup that the template writes."""
        assert self.record.written is not None, "the text that messages were read from is there"
        own = _markup(template_reader(self.tokenizer, self._chat()))
        # A single exchange looks alike in both.
        alike = {TextFormat.LLAMA2: {TextFormat.LLAMA2, TextFormat.MISTRAL}}
        return own is not None and self.record.written.kind in alike.get(own, {own})

    def _as_written(self, text: Text, written: str, messages: Sequence[Message]) -> Text:
        assert self.record.written is not None, "the text that messages were read from is there"
        written = self._begin(text.text) + _ended(written, text.text, messages)
        if written == text.text:
            return text
        # Line ends belong to a turn where the template's markers say so.
        tails = {text.text[:stop][len(text.text[:stop].rstrip()) :] for _, stop in text.spans}
        tail = tails.pop() if len(tails) == 1 else ""
        places = assistant_places(written, self.record.written.kind)
        spans = tuple((start, stop + len(tail) * written.startswith(tail, stop)) for start, stop in places)
        return replace(text, text=self._require_unicode(written), spans=spans, findings=())

    def _prompt_as_written(self, prompt: Sequence[Message]) -> Text | None:
        """The beginning of the text that the prompt and its first answer were read from, up to the answer."""
        column = next((name for name in _ANSWERS if hasattr(self.record, name)), "")
        written = self._written(column)
        if written is None or self.record.written is None or not self._is_own_markup():
            return None
        places = assistant_places(written, self.record.written.kind)
        answers = sum(message["role"] == "assistant" for message in prompt)
        if len(places) <= answers:
            return None
        rendered = self.chat(prompt, add_generation_prompt=True)
        return replace(rendered, text=self._begin(rendered.text) + written[: places[answers][0]], spans=())

    def _begin(self, rendered: str) -> str:
        """The begin-of-sequence token, where the template writes it and the text does not."""
        assert self.record.written is not None, "the text that messages were read from is there"
        token = str(self.tokenizer.special_tokens_map.get("bos_token") or "")
        given = next(iter(self.record.written.texts.values()))
        given = self.record.written.texts.get("prompt", given)
        return token if token and rendered.startswith(token) and not given.startswith(token) else ""


@lru_cache(maxsize=64)
def _markup(template: TemplateReader) -> TextFormat | None:
    """The markup that a template writes; None for one that is not known."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = template.text([*turns, *turns])
    try:
        found = recognise(text or "", where="a template")
    except DataError:
        return None
    return None if found is TextFormat.PLAIN else found


def _ended(written: str, rendered: str, messages: Sequence[Message]) -> str:
    """The text with the end of its last turn, which an answer may lack."""
    content = str(messages[-1].get("content") or "").strip()
    if not content or messages[-1]["role"] != "assistant" or content not in rendered:
        return written
    if written.rpartition(content)[2].strip() or content not in written:
        return written
    return written.rstrip() + rendered.rpartition(content)[2]


def is_muted(message: Message, where: str) -> bool:
    """Whether `weight` or `train` say that a message is not to be trained."""
    for field_name in ("weight", "train"):
        value = message.get(field_name)
        if value is None:
            continue
        if value not in (0, 1):
            raise DataError(
                f"{where}, field {field_name!r}, must be 0 or 1 (or false or true), got {show(value)}. A message is "
                "trained or it is not; mend the row."
            )
        if value == 0:
            return True
    return False


def _function_name(described: Any) -> str | None:
    """The name in a tool's schema or in a call, both of which may be wrapped in `function`."""
    if isinstance(described, Mapping):
        described = described.get("function", described)
    name = described.get("name") if isinstance(described, Mapping) else None
    return name if isinstance(name, str) else None
