"""Renders a conversation in jinja's sandbox and tells which of its characters the model wrote.

    messages, tools, template ─► text [C] and spans (start, stop) between generation markers
    text, spans ─ encode ─► token ids [T] and mask [T]: tokens that hold a character of a span

Transformers compiles and renders (an `ImmutableSandboxedEnvironment`, so a template reads no attribute that it should
not and changes nothing it is given). The mask is made here from the tokens' character offsets, because transformers'
own forgets the later tokens of a character that takes several, and runs to the end of the text where a tokenizer drops
the last character of a span.
"""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jinja2.exceptions import TemplateError

from trl_ray.errors import ModelError
from trl_ray.types import BoolArray, IntArray, Message

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_FUNCTION = "strftime_now"
"""What templates call for today's date; among the values given to a template it is a day in ISO's form."""
# Transformers keeps the spans of a rendering in the compiled template, which all callers share.
_RENDERING = threading.Lock()


class ChatTokenizer(Protocol):
    """The part of a Hugging Face fast tokenizer that conversations need."""

    chat_template: Any

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """``bos_token`` and its kin, which templates name."""
        ...

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Encode one text."""
        ...


class TokenNames(Protocol):
    """The part of a tokenizer that rendering needs."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """``bos_token`` and its kin, which templates name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """A conversation as text; `spans` are the characters ``[start, stop)`` between generation markers, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedChat:
    """A conversation as tokens."""

    token_ids: IntArray
    """``[T]``"""
    assistant_mask: BoolArray
    """``[T]``, True where the model wrote the token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How conversations are rendered: the template, the tools it is told of, and the values it reads."""

    template: str
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def own_template(tokenizer: ChatTokenizer) -> str:
    """The source of the tokenizer's chat template; of several, the one named `default`.

    Raises:
        ModelError: it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str) or not template:
        raise ModelError(
            "The tokenizer must have a chat template because the data are conversations, and it has none. Set "
            "chat_template to the path of a jinja file, or take an instruction-tuned model."
        )
    return template


def render_chat(
    tokenizer: TokenNames,
    messages: Sequence[Message],
    chat: ChatFormat,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    where: str = "a conversation",
) -> RenderedChat:
    """Render `messages`, with the header of a new assistant turn at the end, or without the last turn's end.

    Raises:
        ModelError: the template refuses the conversation; names `where`.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [dict(message) for message in messages]
    marked = GENERATION_MARKER.search(chat.template) is not None
    values = {**tokenizer.special_tokens_map, **chat.template_kwargs}
    try:
        day = values.get(DATE_FUNCTION)
        if day is not None and not callable(day):  # an unquoted one of a YAML file is no text
            values[DATE_FUNCTION] = datetime.datetime.fromisoformat(str(day)).strftime
        with _RENDERING:
            rendered: Any = render_jinja_template(
                conversations=[conversation],
                tools=list(chat.tools) if chat.tools else None,
                chat_template=chat.template,
                # Where a template has no markers, asking for them only makes transformers warn.
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **values,
            )
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(
            f"The chat template must accept every conversation, but it refused {where} with {type(error).__name__}: "
            f"{error}. Change the row's messages or tools, chat_template_kwargs ({dict(chat.template_kwargs)!r}), or "
            "set another chat_template."
        ) from error
    texts, spans = rendered
    return RenderedChat(text=texts[0], spans=tuple(spans[0]) if marked else ())


def encode_chat(tokenizer: ChatTokenizer, rendered: RenderedChat) -> EncodedChat:
    """Tokens of a rendered conversation; the template has already put special tokens where they belong.

    Raises:
        ModelError: the tokenizer cannot tell which characters a token stands for.
    """
    try:
        encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ModelError(
            "assistant_only_loss needs a tokenizer that knows which characters a token stands for, and this one does "
            "not: it is not a fast tokenizer. Load it with use_fast=True, or set assistant_only_loss to False."
        ) from error
    mask = assistant_mask(encoded["offset_mapping"], rendered.spans)
    return EncodedChat(token_ids=np.asarray(encoded["input_ids"], dtype=np.int32), assistant_mask=mask)


def assistant_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> BoolArray:
    """Which of the tokens, given by the characters ``[start, stop)`` each stands for, hold a character of a span."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(places), dtype=np.bool_)
    for start, stop in spans:
        mask |= (places[:, 0] < stop) & (places[:, 1] > start) & (places[:, 0] < places[:, 1])
    return mask
