"""Prompts and rollout groups as bytes and back, exactly; no pickle.

    b"TRLP" or b"TRLG" | header length, 4 bytes little endian | header, JSON | arrays, raw little endian

The header holds everything that is not an array, and the length of each array; the arrays follow in the order
in which the header mentions them. Decoding checks every length and range before anything is returned, so a
damaged file cannot become a training sample.

What a group brings from its teachers is checked before it is stored and when it is read again, so that a damaged file
teaches nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trl_ray.errors import DataError, JournalError
from trl_ray.types import (
    Completion,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    Span,
    TeacherContext,
    TeacherScores,
    VersionSpan,
)

_FLAGS = ("is_distilled", "has_feedback", "uses_feedback")


def check_teaching(group: RolloutGroup, where: str) -> None:
    """Check contexts and teachings of a group against its completions.

    Args:
        group: with or without teachers.
        where: names it in messages.

    Raises:
        DataError: another number of them than completions, teachings without contexts, a fact of a wrong type,
            another length or shape than the completion has, or NaN.
    """
    count = len(group.completions)
    for name, items in (("contexts", group.contexts), ("teachings", group.teachings)):
        if len(items) not in {0, count}:
            raise DataError(f"A group must hold no {name} or one per completion; {where} holds {len(items)}.")
    if group.teachings and not group.contexts:
        raise DataError(f"Teachings must come with their contexts; {where} holds none.")
    for index, context in enumerate(group.contexts):
        _check_context(context, count, f"context {index} of {where}")
    for index, (scores, completion) in enumerate(zip(group.teachings, group.completions, strict=False)):
        if scores is None:
            if group.contexts[index].is_distilled:
                raise DataError(f"A completion that is distilled must be taught; completion {index} of {where} is not.")
            continue
        _check_scores(scores, completion, f"teaching {index} of {where}")


def _check_context(context: TeacherContext, count: int, where: str) -> None:
    for name in _FLAGS:
        if type(getattr(context, name)) is not bool:
            raise DataError(f"{name} must be true or false, got {getattr(context, name)!r} in {where}.")
    shown, cut = context.demonstration, context.num_cut
    if shown is not None and (type(shown) is not int or not 0 <= shown < count):
        raise DataError(f"demonstration must be a completion of {count} or None, got {shown!r} in {where}.")
    if type(cut) is not int or cut < 0:
        raise DataError(f"num_cut must be at least 0, got {cut!r} in {where}.")


def _check_scores(scores: TeacherScores, completion: Completion, where: str) -> None:
    length = len(completion.token_ids)
    if scores.version is not None and type(scores.version) is not int:
        raise DataError(f"version must be a whole number or None, got {scores.version!r} in {where}.")
    if len(scores.logprobs) != length or (scores.tail is not None and len(scores.tail) != length):
        raise DataError(f"A teacher must score all {length} tokens, {where} has {len(scores.logprobs)}.")
    ids, logprobs = scores.top_ids, scores.top_logprobs
    if (ids is None) != (logprobs is None):
        raise DataError(f"top_ids must come with top_logprobs, {where} has one of the two.")
    if (
        ids is not None
        and logprobs is not None
        and (ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != length)
    ):
        raise DataError(
            f"top_ids and top_logprobs must have one shape [{length}, K], {where} has {ids.shape} and {logprobs.shape}."
        )
    if not np.isfinite(scores.logprobs).all():
        raise DataError(f"A teacher's logprobs must be finite, those of {where} are not.")
    for name, numbers in (("top_logprobs", logprobs), ("tail", scores.tail)):
        if numbers is not None and np.isnan(numbers).any():
            raise DataError(f"A teacher's {name} must be numbers, those of {where} hold NaN.")


T = TypeVar("T")

_PROMPT = b"TRLP"
_GROUP = b"TRLG"
_CONTEXT_FACTS = ("is_distilled", "demonstration", "has_feedback", "uses_feedback", "num_cut")
"""What a teacher's context says of itself, beside its tokens."""


def encode_prompt(prompt: Prompt) -> bytes:
    """A prompt as bytes.

    Raises:
        DataError: a column or message is not made of JSON values, or the token ids are not int32 [P].
    """
    arrays = _ArrayWriter()
    return _pack(_PROMPT, _prompt_head(prompt, arrays), arrays)


def decode_prompt(data: bytes) -> Prompt:
    """The inverse of `encode_prompt`.

    Raises:
        JournalError: the bytes are not those of a prompt.
    """
    return _decode(_PROMPT, data, _read_prompt)


def encode_group(group: RolloutGroup) -> bytes:
    """A finished group as bytes, its prompt included.

    Raises:
        DataError: an array has the wrong type or shape, lengths contradict each other, or a value is not JSON.
    """
    _check_group(group)
    arrays = _ArrayWriter()
    ticket = group.ticket
    head = {
        "group_id": ticket.group_id,
        "attempt": ticket.attempt,
        "admitted_at_version": ticket.admitted_at_version,
        "draw": ticket.draw,
        "prompt": _prompt_head(ticket.prompt, arrays),
        "completions": [_completion_head(completion, arrays) for completion in group.completions],
        "rewards": [_reward_head(reward) for reward in group.rewards],
        "worker": group.worker,
        "spans": [[span.actor, span.name, span.start, span.end] for span in group.spans],
        "metrics": _plain(group.metrics, "metrics"),
        "contexts": [_context_head(context, arrays) for context in group.contexts],
        "teachings": [None if scores is None else _scores_head(scores, arrays) for scores in group.teachings],
    }
    return _pack(_GROUP, head, arrays)


def decode_group(data: bytes) -> RolloutGroup:
    """The inverse of `encode_group`.

    Raises:
        JournalError: the bytes are not those of a group.
    """
    return _decode(_GROUP, data, _read_group)


# ---- heads -----------------------------------------------------------------------------------------------


def _prompt_head(prompt: Prompt, arrays: _ArrayWriter) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "tokens": arrays.add(prompt.token_ids, "<i4", "token_ids of the prompt"),
        "messages": None if prompt.messages is None else _plain(prompt.messages, "messages"),
        "text": prompt.text,
        "columns": _plain(prompt.columns, "columns"),
        "given": arrays.add_if(prompt.given_ids, "<i4", "given_ids of the prompt"),
        "num_cut": prompt.num_cut,
    }


def _completion_head(completion: Completion, arrays: _ArrayWriter) -> dict[str, Any]:
    return {
        "tokens": arrays.add(completion.token_ids, "<i4", "token_ids of a completion"),
        "logprobs": arrays.add(completion.logprobs, "<f4", "logprobs of a completion"),
        "mask": arrays.add_if(completion.loss_mask, "|b1", "loss_mask of a completion"),
        "versions": [[span.version, span.start, span.end] for span in completion.versions],
        "finish_reason": completion.finish_reason.value,
        "text": completion.text,
        "is_sampled": completion.is_sampled,
    }


def _reward_head(reward: Reward) -> dict[str, Any]:
    return {
        "total": _plain(reward.total, "total"),
        "parts": _plain(reward.parts, "parts"),
        "extra": _plain(reward.extra, "extra"),
    }


def _context_head(context: TeacherContext, arrays: _ArrayWriter) -> dict[str, Any]:
    return {
        "tokens": arrays.add(context.prompt_ids, "<i4", "prompt_ids of a teacher's context"),
        **{name: getattr(context, name) for name in _CONTEXT_FACTS},
    }


def _scores_head(scores: TeacherScores, arrays: _ArrayWriter) -> dict[str, Any]:
    return {
        "teacher": scores.teacher,
        "version": scores.version,
        "logprobs": arrays.add(scores.logprobs, "<f4", "logprobs of a teacher"),
        "top_ids": arrays.add_if(scores.top_ids, "<i4", "top_ids of a teacher", axes=2),
        "top_logprobs": arrays.add_if(scores.top_logprobs, "<f4", "top_logprobs of a teacher", axes=2),
        "tail": arrays.add_if(scores.tail, "<f4", "tail of a teacher"),
    }


def _read_prompt(head: Mapping[str, Any], arrays: _ArrayReader) -> Prompt:
    messages, cut = head["messages"], head.get("num_cut", 0)  # journals of earlier releases know of none
    if type(cut) is not int or cut < 0:
        raise ValueError(f"num_cut of the prompt must be at least 0, got {cut!r}")
    return Prompt(
        prompt_id=head["prompt_id"],
        token_ids=arrays.take(head["tokens"], "<i4"),
        messages=None if messages is None else tuple(messages),
        text=head["text"],
        columns=head["columns"],
        given_ids=arrays.take_if(head["given"], "<i4"),
        num_cut=cut,
    )


def _read_completion(head: Mapping[str, Any], arrays: _ArrayReader) -> Completion:
    return Completion(
        token_ids=arrays.take(head["tokens"], "<i4"),
        logprobs=arrays.take(head["logprobs"], "<f4"),
        loss_mask=arrays.take_if(head["mask"], "|b1"),
        versions=tuple(VersionSpan(version=v, start=start, end=end) for v, start, end in head["versions"]),
        finish_reason=FinishReason(head["finish_reason"]),
        text=head["text"],
        is_sampled=head["is_sampled"],
    )


def _read_context(head: Mapping[str, Any], arrays: _ArrayReader) -> TeacherContext:
    return TeacherContext(
        prompt_ids=arrays.take(head["tokens"], "<i4"), **{name: head[name] for name in _CONTEXT_FACTS}
    )


def _read_scores(head: Mapping[str, Any], arrays: _ArrayReader) -> TeacherScores:
    return TeacherScores(
        teacher=head["teacher"],
        version=head["version"],
        logprobs=arrays.take(head["logprobs"], "<f4"),
        top_ids=arrays.take_if(head["top_ids"], "<i4"),
        top_logprobs=arrays.take_if(head["top_logprobs"], "<f4"),
        tail=arrays.take_if(head["tail"], "<f4"),
    )


def _read_group(head: Mapping[str, Any], arrays: _ArrayReader) -> RolloutGroup:
    ticket = GroupTicket(
        group_id=head["group_id"],
        attempt=head["attempt"],
        admitted_at_version=head["admitted_at_version"],
        draw=head.get("draw", 0),
        prompt=_read_prompt(head["prompt"], arrays),
    )
    group = RolloutGroup(
        ticket=ticket,
        completions=tuple(_read_completion(completion, arrays) for completion in head["completions"]),
        rewards=tuple(Reward(**reward) for reward in head["rewards"]),
        worker=head["worker"],
        spans=tuple(Span(actor=a, name=n, start=start, end=end) for a, n, start, end in head["spans"]),
        metrics=head["metrics"],
        contexts=tuple(_read_context(context, arrays) for context in head["contexts"]),
        teachings=tuple(None if scores is None else _read_scores(scores, arrays) for scores in head["teachings"]),
    )
    _check_group(group)
    return group


# ---- checks ----------------------------------------------------------------------------------------------


def _check_group(group: RolloutGroup) -> None:
    where = f"group {group.ticket.group_id} of worker {group.worker}"
    if not group.completions:
        raise DataError(f"A finished group must hold at least one completion, and {where} holds none.")
    if len(group.rewards) != len(group.completions):
        raise DataError(
            f"A group must hold one reward per completion, and {where} holds {len(group.rewards)} rewards for "
            f"{len(group.completions)} completions."
        )
    for index, completion in enumerate(group.completions):
        _check_completion(completion, f"completion {index} of {where}")
    check_teaching(group, where)


def _check_completion(completion: Completion, where: str) -> None:
    length = len(completion.token_ids)
    mask = completion.loss_mask
    if type(completion.is_sampled) is not bool:
        raise DataError(f"is_sampled must be true or false, got {completion.is_sampled!r} in {where}.")
    if len(completion.logprobs) != length or (mask is not None and len(mask) != length):
        raise DataError(
            f"Token ids, logprobs and loss mask must be equally long; {where} has {length} ids, "
            f"{len(completion.logprobs)} logprobs and {'no' if mask is None else len(mask)} mask values."
        )
    covered = 0
    for span in completion.versions:
        if span.start != covered or span.end < span.start:
            raise DataError(f"Version spans must cover the tokens without gaps; {where} has {completion.versions}.")
        covered = span.end
    if not completion.versions or covered != length:
        raise DataError(f"Version spans must cover all {length} tokens; {where} has {completion.versions}.")


def _plain(value: Any, where: str) -> Any:
    """The value as JSON gives it back, or an error that names where it stands."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise DataError(f"Keys must be strings to be stored, and {where} has {key!r}. Convert the column.")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise DataError(
        f"Values must be None, text, numbers, lists or mappings to be stored, and {where} is a "
        f"{type(value).__name__}. Convert the column before training."
    )


# ---- bytes -----------------------------------------------------------------------------------------------


class _ArrayWriter:
    """Gathers arrays in the order in which the header mentions them."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def add(self, array: NDArray[Any], dtype: str, where: str, *, axes: int = 1) -> int | list[int]:
        """Append an array; its length, or [rows, columns] of one with two axes."""
        array = np.asarray(array)
        if array.ndim != axes or array.dtype != np.dtype(dtype).newbyteorder("="):
            raise DataError(
                f"{where} must be {np.dtype(dtype).name} with {('one axis', 'two axes')[axes - 1]}, got "
                f"{array.dtype.name} with shape {array.shape}."
            )
        self.pieces.append(array.astype(dtype, copy=False).tobytes())
        return len(array) if axes == 1 else list(array.shape)

    def add_if(self, array: NDArray[Any] | None, dtype: str, where: str, *, axes: int = 1) -> int | list[int] | None:
        """The same, or None for None."""
        return None if array is None else self.add(array, dtype, where, axes=axes)


class _ArrayReader:
    """Hands the arrays out in the order in which they were written."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._at = start

    def take(self, shape: int | list[int], dtype: str) -> NDArray[Any]:
        """The next array, of one axis or two; raises ValueError when fewer bytes are left."""
        kind, sizes = np.dtype(dtype), shape if isinstance(shape, list) else [shape]
        if not sizes or any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"an array has the length {shape}")
        length = math.prod(sizes)
        end = self._at + length * kind.itemsize
        if dtype == "|b1" and self._data[self._at : end].translate(None, b"\x00\x01"):
            raise ValueError("a mask holds a byte that is neither 0 nor 1")
        array = np.frombuffer(self._data, dtype=kind, count=length, offset=self._at)
        self._at = end
        # A copy in native byte order: aligned, writable, and not tied to the record's bytes.
        return array.astype(kind.newbyteorder("=")).reshape(sizes)

    def take_if(self, shape: int | list[int] | None, dtype: str) -> NDArray[Any] | None:
        """The same, or None for None."""
        return None if shape is None else self.take(shape, dtype)

    def finish(self) -> None:
        """Raise ValueError unless every byte was used."""
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes are left over")


def _pack(magic: bytes, head: Mapping[str, Any], arrays: _ArrayWriter) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode("ascii")
    return b"".join([magic, len(text).to_bytes(4, "little"), text, *arrays.pieces])


def _decode(magic: bytes, data: bytes, read: Callable[[Mapping[str, Any], _ArrayReader], T]) -> T:
    try:
        if data[:4] != magic:
            raise ValueError(f"they begin with {data[:4]!r}, expected {magic!r}")
        start = 8 + int.from_bytes(data[4:8], "little")
        arrays = _ArrayReader(data, start)
        value = read(json.loads(data[8:start]), arrays)
        arrays.finish()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise JournalError(f"The stored bytes must be those of a prompt or group: {error}.") from error
    return value
