"""Turns many texts into tokens at once, and says which of them the model wrote.

    record_writer.py ─► Text ─┐
                              ├─ encode, all texts of many rows ─► token ids [T], assistant mask [T], muted mask [T]
                        Text ─┘

Plain texts get the tokenizer's special tokens, but none that they bring themselves; a template has written its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash

from trl_ray.config.example_options import TruncationMode
from trl_ray.data.chat.chat_rendering import assistant_mask
from trl_ray.data.chat.faithful_rendering import Finding
from trl_ray.data.chat.turn_spans import TurnTokenizer
from trl_ray.errors import ConfigError, ModelError
from trl_ray.types import BoolArray, IntArray


class ExampleTokenizer(TurnTokenizer, Protocol):
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
    max_prompt_length: int | None = None
    """Tokens of a prompt, the last are kept; None keeps all."""
    chat_template: str | None = None
    """The template's source; None takes the tokenizer's own. `training_templates` finds one with markers."""
    locate_turns: bool = False
    """The template has no markers, and the assistant's turns are found without."""
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

    def num_cut_off_prompt(self, length: int) -> int:
        """How many of a prompt's `length` tokens are not kept, whatever `max_length` cuts."""
        return 0 if self.max_prompt_length is None else max(0, length - self.max_prompt_length)

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
    muted: tuple[tuple[int, int], ...] = ()
    """Characters ``[start, stop)`` that are not to be trained."""
    findings: tuple[Finding, ...] = ()
    """What the chat template does not write as the row has it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A text as tokens."""

    token_ids: IntArray
    """``[T]``"""
    assistant_mask: BoolArray | None = None
    """``[T]``, True where the model wrote the token; None where nobody asked."""
    muted_mask: BoolArray | None = None
    """``[T]``, True where the token is not to be trained; None where all may be."""


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
    places = masks or any(text.muted for text in texts)
    options = {"return_offsets_mapping": True} if places else {}
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
            "assistant_only_loss and messages of weight 0 need a tokenizer that knows which characters a token stands "
            "for, and this one does not: it is not a fast tokenizer. Load it with use_fast=True, or set "
            "assistant_only_loss to False and remove the weights."
        ) from error
    for index, text in enumerate(texts):
        ids = np.asarray(batch["input_ids"][index], dtype=np.int32)
        kept = _without_doubles(ids, text.text, tokenizer) if special else slice(None)
        offsets = batch["offset_mapping"][index] if places else ()
        yield Encoded(
            token_ids=ids[kept],
            assistant_mask=assistant_mask(offsets, text.spans)[kept] if masks else None,
            muted_mask=assistant_mask(offsets, text.muted)[kept] if text.muted else None,
        )


def _without_doubles(ids: IntArray, text: str, tokenizer: ExampleTokenizer) -> slice:
    """Which tokens are kept of a text that brings the begin or end token that the tokenizer adds as well."""
    start, stop = 0, len(ids)
    for token_id, name in ((tokenizer.bos_token_id, "bos_token"), (tokenizer.eos_token_id, "eos_token")):
        token = str(tokenizer.special_tokens_map.get(name) or "")
        if token_id is None or not token or stop - start < 2:
            continue
        if text.startswith(token) and not text.startswith(token * 2) and (ids[start : start + 2] == token_id).all():
            start += 1
        if text.endswith(token) and not text.endswith(token * 2) and (ids[stop - 2 : stop] == token_id).all():
            stop -= 1
    return slice(start, stop)


def common_prefix_length(first: IntArray, second: IntArray) -> int:
    """How many leading tokens two sequences ``[A]`` and ``[B]`` share."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter


def tokenizer_key(tokenizer: ExampleTokenizer) -> str | None:
    """A hash of all that the tokens of a tokenizer, and of its chat template, depend on; None where it has none."""
    kind = type(tokenizer)
    facts = [
        f"{kind.__module__}.{kind.__qualname__}",
        repr(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr((tokenizer.eos_token_id, tokenizer.bos_token_id, getattr(tokenizer, "split_special_tokens", None))),
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_known = kind.__module__.partition(".")[0] == "transformers"
    if is_known and callable(getattr(backend, "to_str", None)):
        facts.append(backend.to_str())  # type: ignore[union-attr]
    else:
        from datasets.fingerprint import Hasher

        try:
            facts.append(Hasher.hash(tokenizer))
        except (TypeError, AttributeError, ValueError, RecursionError, pickle.PicklingError):
            return None
    return xxhash.xxh3_128("\0".join(facts).encode(errors="surrogatepass")).hexdigest()
