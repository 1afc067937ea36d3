"""Writes what a record says as texts, and turns many texts into tokens at once.

    text ──────────────────────────┐
    text + end of sequence ────────┼─► Text ─┐
    messages ─ chat template ──────┘         ├─ encode, all texts of many rows ─► token ids [T], assistant mask [T]
                                     Text ───┘

Plain texts get the tokenizer's special tokens; a template has written its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trl_ray.config.example_options import TruncationMode
from trl_ray.data.chat.chat_rendering import ChatFormat, ChatTokenizer, assistant_mask, own_template, render_chat
from trl_ray.data.formats.records import Record, Said
from trl_ray.data.validation import show
from trl_ray.errors import ConfigError, DataError, ModelError
from trl_ray.types import BoolArray, IntArray, Message


class ExampleTokenizer(ChatTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that datasets need; a fast one where assistant turns are told apart."""

    @property
    def eos_token(self) -> Any:
        """The text of the end-of-sequence token, or None."""
        ...

    @property
    def eos_token_id(self) -> Any:
        """Its id, or None."""
        ...

    @property
    def bos_token_id(self) -> Any:
        """The id of the beginning-of-sequence token, or None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How conversations are rendered, and how much of an example is kept."""

    max_length: int | None = None
    """Tokens of an example; None keeps all, as packing wants it."""
    truncation_mode: TruncationMode = TruncationMode.KEEP_START
    chat_template: str | None = None
    """The template's source; None takes the tokenizer's own. `training_templates` finds one with markers."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Values the template reads; a row's `chat_template_kwargs` go before them."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2 or None, got {self.max_length}: a target needs a context."
            )

    def kept(self, length: int) -> slice:
        """Which of `length` tokens are kept."""
        if self.max_length is None or length <= self.max_length:
            return slice(0, length)
        if self.truncation_mode is TruncationMode.KEEP_START:
            return slice(0, self.max_length)
        return slice(length - self.max_length, length)

    def num_cut(self, length: int) -> int:
        """How many of `length` tokens are not kept."""
        return 0 if self.max_length is None else max(0, length - self.max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text that is ready to be tokenised."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """Characters ``[start, stop)`` that the model wrote, where the template marks them."""
    special_tokens: bool = True
    """The tokenizer adds its special tokens; False where they are written already, or must not be there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A text as tokens."""

    token_ids: IntArray
    """``[T]``"""
    assistant_mask: BoolArray | None = None
    """``[T]``, True where the model wrote the token; None where nobody asked."""


def encode(tokenizer: ExampleTokenizer, texts: Sequence[Text], *, masks: bool = False) -> list[Encoded]:
    """All texts as tokens, in few calls: a call for each text costs a fast tokenizer several times as much.

    Raises:
        ModelError: masks are asked of a tokenizer that cannot tell which characters a token stands for.
    """
    found: list[Encoded | None] = [None] * len(texts)
    for special in (True, False):
        chosen = [index for index, text in enumerate(texts) if text.special_tokens is special]
        if chosen:
            for index, encoded in zip(
                chosen, _encode([texts[i] for i in chosen], tokenizer, special, masks), strict=True
            ):
                found[index] = encoded
    return [encoded for encoded in found if encoded is not None]


def _encode(texts: Sequence[Text], tokenizer: ExampleTokenizer, special: bool, masks: bool) -> Iterable[Encoded]:
    options = {"return_offsets_mapping": True} if masks else {}
    try:
        batch = tokenizer(
            [text.text for text in texts],
            add_special_tokens=special,
            return_attention_mask=False,
            verbose=False,  # longer than the model takes: what is too long is cut, or told, by us
            **options,
        )
    except NotImplementedError as error:
        raise ModelError(
            "assistant_only_loss needs a tokenizer that knows which characters a token stands for, and this one does "
            "not: it is not a fast tokenizer. Load it with use_fast=True, or set assistant_only_loss to False."
        ) from error
    for index, text in enumerate(texts):
        mask = assistant_mask(batch["offset_mapping"][index], text.spans) if masks else None
        yield Encoded(token_ids=np.asarray(batch["input_ids"][index], dtype=np.int32), assistant_mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Writes what one record says; `where` names it in messages."""

    record: Record
    tokenizer: ExampleTokenizer
    rules: TextRules
    where: str

    def prompt(self, prompt: Said) -> Text:
        """A prompt by itself, with the header of the turn that answers it."""
        return self.text(prompt) if isinstance(prompt, str) else self.chat(prompt, add_generation_prompt=True)

    def answered(self, prompt: Said, answer: Said) -> Text:
        """A prompt and what follows it; a plain answer ends with the end-of-sequence token."""
        if isinstance(prompt, str):
            assert isinstance(answer, str), "a record is text or messages throughout"
            return self.text(prompt + self.with_end(answer))
        assert not isinstance(answer, str), "a record is text or messages throughout"
        return self.chat((*prompt, *answer))

    def text(self, text: str, *, special_tokens: bool = True) -> Text:
        """A plain text."""
        return Text(text=self._require_unicode(text), special_tokens=special_tokens)

    def with_end(self, text: str) -> str:
        """A text that ends with the end-of-sequence token, where the tokenizer has one; never with two."""
        end = self.tokenizer.eos_token
        return text if end is None or text.endswith(end) else text + end

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Text:
        """A conversation as its template renders it.

        Raises:
            ModelError: there is no template, it refuses the conversation, or it leaves out a tool or a call.
        """
        tools = list(self.record.tools) or None
        chat = ChatFormat(
            template=self.rules.chat_template or own_template(self.tokenizer),
            tools=tools,
            template_kwargs={**self.rules.template_kwargs, **self._template_values()},
        )
        rendered = render_chat(
            self.tokenizer, messages, chat, add_generation_prompt=add_generation_prompt, where=self.where
        )
        self._require_unicode(rendered.text)
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        for what, field_name, functions in (("tool", "tools", tools or ()), ("call of", "tool_calls", calls)):
            self._require_rendered(what, field_name, functions, rendered.text)
        return Text(text=rendered.text, spans=rendered.spans, special_tokens=False)

    def _template_values(self) -> Mapping[str, Any]:
        values = self.record.columns.get("chat_template_kwargs")
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            raise DataError(
                f"{self.where}, field 'chat_template_kwargs', must be an object with values for the chat template, got "
                f"{show(values)}. Mend or remove the column."
            )
        return {key: value for key, value in values.items() if value is not None}

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


def common_prefix_length(first: IntArray, second: IntArray) -> int:
    """How many leading tokens two sequences ``[A]`` and ``[B]`` share."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter


def _function_name(described: Any) -> str | None:
    """The name in a tool's schema or in a call, both of which may be wrapped in `function`."""
    if isinstance(described, Mapping):
        described = described.get("function", described)
    name = described.get("name") if isinstance(described, Mapping) else None
    return name if isinstance(name, str) else None
