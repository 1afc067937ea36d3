"""Turns records of supervised data into token ids and the mask of what is trained.

    Document, PromptCompletion (records.py), or plain columns:
    {text}                   ─┐                                          every token
    {messages, tools?}        ├─ render, tokenise ─► ids [T], mask [T] ◄─ what the assistant wrote
    {prompt, completion, …}  ─┘        │                                  what follows the prompt
                                    truncate ─► SupervisedSample, or the row and why nothing of it is trained

A token is trained when it is a target: the mask of the first token is always False, for nothing predicts it. Texts
without roles end with the tokenizer's end-of-sequence token, conversations with whatever their template says.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.examples import TruncationMode
from trl_ray.data.chat_rendering import ChatFormat, ChatTokenizer, EncodedChat, encode_chat, own_template, render_chat
from trl_ray.data.records import Document, PromptCompletion
from trl_ray.errors import ConfigError, DataError, ModelError
from trl_ray.types import BoolArray, IntArray

IGNORED_LABEL = -100
_SHOWN_ROWS = 10


SupervisedRecord: TypeAlias = Mapping[str, Any] | Document | PromptCompletion
"""A record that has been checked, or a row's columns as they came."""


class SupervisedTokenizer(ChatTokenizer, Protocol):
    """The part of a Hugging Face fast tokenizer that supervised data needs."""

    @property
    def eos_token(self) -> Any:
        """The text of the end-of-sequence token, or None."""
        ...


class Untrained(enum.StrEnum):
    """Why nothing of a row is trained."""

    NO_TARGET = "no_target"
    """Its mask is empty before anything is cut: an empty completion, no assistant turn, or a single token."""
    TRUNCATED = "truncated"
    """Only what `max_length` cuts off would have been trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedRules:
    """Which tokens are kept, and which of them are trained."""

    completion_only_loss: bool | None = None
    """Train only what follows the prompt; None: where a row has a prompt, TRL's default."""
    assistant_only_loss: bool = False
    """Train only what stands between the template's generation markers; needs conversations."""
    max_length: int | None = None
    """Tokens of an example; None keeps all, as packing wants it."""
    truncation_mode: TruncationMode = TruncationMode.KEEP_START
    text_field: str = "text"
    """The column of rows that are plain text."""
    chat_template: str | None = None
    """The template's source; None takes the tokenizer's own. `training_templates` finds one with markers."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Values the template reads; a row's `chat_template_kwargs` go before them."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2 or None, got {self.max_length}: a target needs a context."
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupervisedSample:
    """One example: its tokens and which of them are targets."""

    row: int
    token_ids: IntArray
    """``[T]``"""
    loss_mask: BoolArray
    """``[T]``, the first is False"""
    cut_tokens: int
    """Tokens beyond `max_length` that were cut off."""
    prompt_diverges: bool
    """The prompt alone is tokenised differently from the prompt within the example: the model is trained on a
    context that it will not see. Tokens merge across the border, or the template renders the two differently."""

    def labels(self) -> NDArray[np.int64]:
        """``[T]``: the token where it is trained, elsewhere -100, not shifted: what transformers calls labels."""
        return np.where(self.loss_mask, self.token_ids, IGNORED_LABEL).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupervisedData:
    """All examples of a data set of which something is trained, and what became of the others."""

    name: str
    samples: tuple[SupervisedSample, ...]
    untrained: Mapping[int, Untrained]
    """Why, by row number."""

    def report(self) -> tuple[str, ...]:
        """One sentence for each thing a user should know about the rows; none when all is well."""
        total = len(self.samples) + len(self.untrained)
        return tuple(f"{len(rows)} of {total} rows of {self.name} {what}" for what, rows in self._findings() if rows)

    def require_samples(self) -> None:
        """Check that there is something to train.

        Raises:
            DataError: every row is untrained; says why, by row.
        """
        if not self.samples:
            reasons = " ".join(self.report()) or "It has no row."
            raise DataError(f"At least one row of {self.name} must have a token to train, and none has. {reasons}")

    def _findings(self) -> list[tuple[str, list[int]]]:
        empty = [row for row, reason in self.untrained.items() if reason is Untrained.NO_TARGET]
        late = [row for row, reason in self.untrained.items() if reason is Untrained.TRUNCATED]
        cut = [sample.row for sample in self.samples if sample.cut_tokens]
        diverging = [sample.row for sample in self.samples if sample.prompt_diverges]
        return [
            (f"have no token to train and are left out ({_numbers(empty)}): fill them or remove them.", empty),
            (f"have none within max_length and are left out ({_numbers(late)}): raise max_length.", late),
            (f"are longer than max_length and cut ({_numbers(cut)}).", cut),
            (
                f"have a prompt that is tokenised differently when its completion follows ({_numbers(diverging)}): end "
                "prompts at a token border, or take a template that renders a prompt alike in both cases.",
                diverging,
            ),
        ]


def _numbers(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    more = len(rows) - _SHOWN_ROWS
    return f"row{'s' * (len(rows) != 1)} {shown}" + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tokens:
    """An example before it is cut."""

    token_ids: IntArray
    loss_mask: BoolArray
    prompt_diverges: bool = False


def tokenize_records(
    records: Iterable[SupervisedRecord], tokenizer: SupervisedTokenizer, rules: SupervisedRules, *, name: str
) -> SupervisedData:
    """Tokenise every record; rows with nothing to train are left out and listed.

    Raises:
        DataError: a record has none of the columns, or a value of the wrong kind; names row and column.
        ModelError: the chat template is missing, refuses a record, or leaves out a tool or a call of it.
    """
    samples, untrained = [], {}
    for row, record in enumerate(records):
        found = tokenize_record(record, tokenizer, rules, row=row, name=name)
        if isinstance(found, Untrained):
            untrained[row] = found
        else:
            samples.append(found)
    return SupervisedData(name=name, samples=tuple(samples), untrained=untrained)


def tokenize_record(
    record: SupervisedRecord, tokenizer: SupervisedTokenizer, rules: SupervisedRules, *, row: int, name: str
) -> SupervisedSample | Untrained:
    """One record as tokens and targets, or why there is nothing to train in it.

    A pure function of its arguments, so that rows may be tokenised ahead of training, in any order.

    Raises:
        DataError, ModelError: see `tokenize_records`.
    """
    columns = record if isinstance(record, Mapping) else _columns(record, rules)
    reader = _Reader(record=columns, tokenizer=tokenizer, rules=rules, where=f"row {row} of {name}")
    tokens = reader.read()
    tokens.loss_mask[:1] = False
    if not tokens.loss_mask.any():
        return Untrained.NO_TARGET
    kept = _kept(len(tokens.token_ids), rules)
    mask = tokens.loss_mask[kept].copy()
    mask[0] = False
    if not mask.any():
        return Untrained.TRUNCATED
    token_ids = tokens.token_ids[kept]
    return SupervisedSample(
        row=row,
        token_ids=token_ids,
        loss_mask=mask,
        cut_tokens=len(tokens.token_ids) - len(token_ids),
        prompt_diverges=tokens.prompt_diverges,
    )


def _columns(record: Document | PromptCompletion, rules: SupervisedRules) -> dict[str, Any]:
    more = {"tools": list(record.tools) or None, "chat_template_kwargs": record.columns.get("chat_template_kwargs")}
    if isinstance(record, PromptCompletion):
        return {"prompt": record.prompt, "completion": record.completion, **more}
    column = rules.text_field if isinstance(record.content, str) else "messages"
    return {column: record.content, **more}


def _kept(length: int, rules: SupervisedRules) -> slice:
    if rules.max_length is None or length <= rules.max_length:
        return slice(None)
    if rules.truncation_mode is TruncationMode.KEEP_START:
        return slice(None, rules.max_length)
    return slice(length - rules.max_length, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads one record; `where` names it in messages."""

    record: Mapping[str, Any]
    tokenizer: SupervisedTokenizer
    rules: SupervisedRules
    where: str

    def read(self) -> _Tokens:
        if "prompt" in self.record and "completion" in self.record:
            return self._prompt_completion()
        if "messages" in self.record:
            return self._conversation()
        if self.rules.text_field in self.record:
            return self._text()
        raise DataError(
            f"{self.where} must have the columns prompt and completion, or messages, or {self.rules.text_field}; it "
            f"has {', '.join(map(str, self.record)) or 'none'}. Rename a column, or set dataset_text_field."
        )

    def _text(self) -> _Tokens:
        ids = self._encode(self._with_end(self._require_text(self.rules.text_field)))
        return _Tokens(token_ids=ids, loss_mask=np.ones(len(ids), dtype=np.bool_))

    def _conversation(self) -> _Tokens:
        encoded = self._encode_chat(self._require_messages("messages"), self._chat())
        everything = np.ones(len(encoded.token_ids), dtype=np.bool_)
        mask = encoded.assistant_mask if self.rules.assistant_only_loss else everything
        return _Tokens(token_ids=encoded.token_ids, loss_mask=mask)

    def _prompt_completion(self) -> _Tokens:
        if isinstance(self.record["prompt"], str):
            prompt, completion = self._require_text("prompt"), self._require_text("completion")
            prompt_ids = self._encode(prompt)
            ids = self._encode(prompt + self._with_end(completion))
            mask = np.ones(len(ids), dtype=np.bool_)
        else:
            messages, answer = self._require_messages("prompt"), self._require_messages("completion")
            chat = self._chat()
            prompt_ids = self._encode_chat(messages, chat, add_generation_prompt=True).token_ids
            encoded = self._encode_chat([*messages, *answer], chat)
            ids, mask = encoded.token_ids, np.ones(len(encoded.token_ids), dtype=np.bool_)
            if self.rules.assistant_only_loss:
                mask = encoded.assistant_mask
        shared = common_prefix_length(prompt_ids, ids)
        if self.rules.completion_only_loss is not False:
            mask[:shared] = False
        return _Tokens(token_ids=ids, loss_mask=mask, prompt_diverges=shared < len(prompt_ids))

    def _chat(self) -> ChatFormat:
        values = self.record.get("chat_template_kwargs") or {}
        return ChatFormat(
            template=self.rules.chat_template or own_template(self.tokenizer),
            tools=self._tools(),
            template_kwargs={**self.rules.template_kwargs, **values},
        )

    def _tools(self) -> Sequence[Any] | None:
        tools = self.record.get("tools")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{self.where}, column tools, must be a list of JSON schemas, or one as JSON text; the text is "
                    f"broken at character {error.pos}: {error.msg}, got {str(self.record['tools'])[:80]!r}. Mend it."
                ) from error
        if tools is not None and not isinstance(tools, list):
            raise DataError(
                f"{self.where}, column tools, must be a list of JSON schemas, got a {type(tools).__name__}. Mend it."
            )
        return tools

    def _require_text(self, column: str) -> str:
        if self.rules.assistant_only_loss:
            raise DataError(
                f"assistant_only_loss needs conversations, and {self.where}, column {column}, is "
                f"{_kind(self.record[column])}. Set assistant_only_loss to False, or write the rows as messages."
            )
        text = self.record[column]
        if not isinstance(text, str):
            raise DataError(f"{self.where}, column {column}, must be text, got {_kind(text)}. Mend or remove the row.")
        return text

    def _require_messages(self, column: str) -> Sequence[Mapping[str, Any]]:
        messages = self.record[column]
        if not isinstance(messages, (list, tuple)) or not messages:
            raise DataError(
                f"{self.where}, column {column}, must be a list of messages with at least one, got {_kind(messages)}. "
                "Mend or remove the row."
            )
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise DataError(
                    f"{self.where}, column {column}, message {number} must be an object with a role, got "
                    f"{_kind(message)}. Mend or remove the row."
                )
        return messages

    def _with_end(self, text: str) -> str:
        end = self.tokenizer.eos_token
        return text if end is None or text.endswith(end) else text + end

    def _encode(self, text: str) -> IntArray:
        return np.asarray(self.tokenizer(self._require_unicode(text))["input_ids"], dtype=np.int32)

    def _encode_chat(
        self, messages: Sequence[Mapping[str, Any]], chat: ChatFormat, *, add_generation_prompt: bool = False
    ) -> EncodedChat:
        rendered = render_chat(
            self.tokenizer, messages, chat, add_generation_prompt=add_generation_prompt, where=self.where
        )
        self._require_unicode(rendered.text)
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        for what, functions in (("tool", chat.tools or ()), ("call of", calls)):
            self._require_rendered(what, functions, rendered.text)
        return encode_chat(self.tokenizer, rendered)

    def _require_rendered(self, what: str, functions: Iterable[Any], text: str) -> None:
        """Many templates leave out tools and calls without a word; the model would learn to call what it cannot see."""
        for name, count in Counter(map(_function_name, functions)).items():
            if name is not None and len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text)) < count:
                raise ModelError(
                    f"The chat template must render every tool and call, and it leaves out the {what} {name!r} of "
                    f"{self.where}. Set a chat_template that renders tools and as many calls per turn, or remove the "
                    "row."
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


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
