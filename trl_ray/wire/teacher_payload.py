"""A teacher's scores as bytes: the same through Ray's object store and over HTTP, checked where they arrive.

    TeacherScores x B --encode_scores--> frame: lengths [B] | logprobs [T] | ids [T, K] | logprobs [T, K] | tail [T]
    frame --decode_scores--> read where it lies, checked against what was asked --> TeacherScores x B

float32 log-probs and int32 ids are views of the frame; 16-bit ones are widened, compact ids unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.types import FloatArray, IntArray, TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.number_formats import from_bits, to_bits
from trl_ray.wire.teacher_answers import TeacherAnswer, check_answer, split_answer, width_of
from trl_ray.wire.teacher_frames import (
    Frame,
    FrameArray,
    FrameHeader,
    FrameKind,
    as_frame,
    damaged,
    open_frame,
    read_arrays,
    read_header,
    seal_frame,
)

_LOW_IDS = 2**16
_COMPACT_IDS = 2**24
"""Vocabularies beyond it have no compact form."""
_PIECE = 65536
"""Numbers converted together, so that they stay in the cache."""


def encode_scores(
    scores: Sequence[TeacherScores],
    *,
    question: TeacherQuestion,
    dtype: PayloadDtype = PayloadDtype.FLOAT32,
    ids: PayloadIds = PayloadIds.INT32,
) -> Frame:
    """Scores of one batch, all of one version of the teacher's weights, as a frame [bytes].

    Args:
        scores: [B] at least one; as `question` asks.
        question: what was asked.
        dtype: of log-probs; 16 bits round to nearest, and what is finite stays finite.
        ids: of token ids. Compact ones take 2 bytes instead of 4 in vocabularies up to 65536, and 3 up to 2^24.
    """
    first = scores[0]
    width = 0 if first.top_ids is None else first.top_ids.shape[1]
    assert len({each.version for each in scores}) == 1, "scores of one batch are of one version of the weights"
    header = FrameHeader(
        kind=FrameKind.SCORES,
        dtype=dtype,
        ids=ids,
        has_tail=first.tail is not None,
        num_completions=len(scores),
        top_k=question.top_k,
        width=width,
        vocab_size=question.vocab_size,
        temperature=question.temperature,
        version=first.version,
        num_tokens=sum(len(each.logprobs) for each in scores),
        num_prompt_tokens=0,
    )
    frame, views = open_frame(header, _arrays(header))
    views["lengths"][...] = [len(each.logprobs) for each in scores]
    _write_numbers(views["logprobs"], [each.logprobs for each in scores], dtype)
    if header.width:
        _write_ids(views, _whole([each.top_ids for each in scores]))
        _write_numbers(views["top_logprobs"], _whole([each.top_logprobs for each in scores]), dtype)
    if header.has_tail:
        _write_numbers(views["tail"], _whole([each.tail for each in scores]), dtype)
    return seal_frame(frame)


def decode_scores(
    body: Frame | bytes | bytearray | memoryview,
    *,
    teacher: str,
    requests: Sequence[TeacherRequest],
    question: TeacherQuestion,
) -> list[TeacherScores]:
    """The scores in a frame, checked.

    Args:
        body: the frame; what is returned may be views of it.
        teacher: the name of the one that was asked.
        requests: [B] what it was asked, in order.
        question: how it was asked.

    Raises:
        TeacherError: not a frame, damaged, or not an answer to these requests (`check_answer`).
    """
    frame = as_frame(body)
    header = read_header(frame, kind=FrameKind.SCORES, teacher=teacher)
    asked = {
        "completions": (header.num_completions, len(requests)),
        "top_k": (header.top_k, question.top_k),
        "tokens at each place": (header.width, width_of(requests, question)),
        "vocabulary": (header.vocab_size, question.vocab_size),
        "temperature": (header.temperature, question.temperature),
        "tail": (header.has_tail, question.tail),
    }
    for what, (given, wanted) in asked.items():
        if given != wanted:
            raise damaged(teacher, what, f"must be {wanted} as asked, got {given}")
    views = read_arrays(frame, _arrays(header), teacher=teacher)
    lengths = views["lengths"].astype(np.int64)
    if lengths.sum() != header.num_tokens:
        raise damaged(teacher, "lengths", f"must sum to the frame's {header.num_tokens} tokens, got {lengths.sum()}")
    answer = TeacherAnswer(
        lengths=lengths,
        logprobs=_widen(views["logprobs"], header.dtype),
        top_ids=_read_ids(views) if header.width else None,
        top_logprobs=_widen(views["top_logprobs"], header.dtype) if header.width else None,
        tail=_widen(views["tail"], header.dtype) if header.has_tail else None,
        version=header.version,
    )
    check_answer(answer, teacher=teacher, requests=requests, question=question, dtype=header.dtype)
    return split_answer(answer, teacher=teacher)


def _arrays(header: FrameHeader) -> list[FrameArray]:
    """What follows the header."""
    number = "<f4" if header.dtype is PayloadDtype.FLOAT32 else "<u2"
    one, top = (header.num_tokens,), (header.num_tokens, header.width)
    arrays = [
        FrameArray(name="lengths", dtype="<u4", shape=(header.num_completions,)),
        FrameArray(name="logprobs", dtype=number, shape=one),
    ]
    if header.width:
        arrays += [FrameArray(name=name, dtype=dtype, shape=top) for name, dtype in _id_arrays(header).items()]
        arrays.append(FrameArray(name="top_logprobs", dtype=number, shape=top))
    if header.has_tail:
        arrays.append(FrameArray(name="tail", dtype=number, shape=one))
    return arrays


def _id_arrays(header: FrameHeader) -> dict[str, str]:
    if header.ids is PayloadIds.INT32 or header.vocab_size > _COMPACT_IDS:
        return {"top_ids": "<i4"}
    return {"low_ids": "<u2"} if header.vocab_size <= _LOW_IDS else {"low_ids": "<u2", "high_ids": "u1"}


def _whole(arrays: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:
    present = [array for array in arrays if array is not None]
    assert len(present) == len(arrays), "scores of one batch have the same fields"
    return present


def _pieces(arrays: Sequence[NDArray[Any]]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """The arrays one after the other, short ones together, with the rows that they fill."""
    waiting: list[NDArray[Any]] = []
    start = numbers = 0
    for index, array in enumerate(arrays):
        waiting.append(array)
        numbers += array.size
        if numbers < _PIECE and index + 1 < len(arrays):
            continue
        piece = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
        yield slice(start, start + len(piece)), piece
        start += len(piece)
        waiting, numbers = [], 0


def _write_numbers(view: NDArray[Any], arrays: Sequence[FloatArray], dtype: PayloadDtype) -> None:
    for rows, piece in _pieces(arrays):
        view[rows] = piece if dtype is PayloadDtype.FLOAT32 else to_bits(piece, dtype)


def _write_ids(views: Mapping[str, NDArray[Any]], arrays: Sequence[IntArray]) -> None:
    if "top_ids" in views:
        for rows, piece in _pieces(arrays):
            views["top_ids"][rows] = piece
        return
    for rows, piece in _pieces(arrays):
        # An int32 is four bytes in a row: its low half, its third byte, and nothing.
        words = np.ascontiguousarray(piece, dtype="<i4")
        views["low_ids"][rows] = words.view("<u2")[:, 0::2]
        if "high_ids" in views:
            views["high_ids"][rows] = words.view(np.uint8)[:, 2::4]


def _read_ids(views: Mapping[str, NDArray[Any]]) -> IntArray:
    if "top_ids" in views:
        return views["top_ids"]
    if "high_ids" not in views:
        return views["low_ids"].astype(np.int32)
    ids: IntArray = np.empty(views["low_ids"].shape, dtype=np.int32)
    step = max(1, _PIECE * len(ids) // max(1, ids.size))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        piece = views["high_ids"][rows].astype(np.int32)
        piece <<= 16
        np.bitwise_or(piece, views["low_ids"][rows], out=ids[rows])
    return ids


def _widen(values: NDArray[Any], dtype: PayloadDtype) -> FloatArray:
    return values if dtype is PayloadDtype.FLOAT32 else from_bits(values, dtype)
