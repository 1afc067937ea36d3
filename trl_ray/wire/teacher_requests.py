"""Questions to a teacher as bytes, in the frame that its answers have.

TeacherRequest x B --encode_requests--> frame: prompt lengths [B] | lengths [B] | prompts | completions | support
frame --decode_requests--> checked --> TeacherRequest x B, the question, the number formats wanted back
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.types import IntArray, TeacherQuestion, TeacherRequest
from trl_ray.wire.teacher_answers import width_of
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

_CLIENT = "(asked by a client)"
"""Stands for the teacher's name in errors about requests."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherCall:
    """One question about some completions."""

    requests: tuple[TeacherRequest, ...]
    """[B]"""
    question: TeacherQuestion
    dtype: PayloadDtype = PayloadDtype.FLOAT32
    """Of log-probs in the answer."""
    ids: PayloadIds = PayloadIds.INT32
    """Of token ids in the answer."""


def encode_requests(call: TeacherCall) -> Frame:
    """The call as a frame [bytes]; at least one request, and no empty prompt or completion."""
    requests, question = call.requests, call.question
    assert requests, "a call holds at least one request"
    header = FrameHeader(
        kind=FrameKind.REQUESTS,
        dtype=call.dtype,
        ids=call.ids,
        has_tail=question.tail,
        num_completions=len(requests),
        top_k=question.top_k,
        width=width_of(requests, question),
        vocab_size=question.vocab_size,
        temperature=question.temperature,
        version=None,
        num_tokens=sum(len(request.completion_ids) for request in requests),
        num_prompt_tokens=sum(len(request.prompt_ids) for request in requests),
    )
    frame, views = open_frame(header, _arrays(header))
    views["prompt_lengths"][...] = [len(request.prompt_ids) for request in requests]
    views["lengths"][...] = [len(request.completion_ids) for request in requests]
    np.concatenate([request.prompt_ids for request in requests], out=views["prompt_ids"])
    np.concatenate([request.completion_ids for request in requests], out=views["completion_ids"])
    supports = [request.support_ids for request in requests if request.support_ids is not None]
    if supports:
        np.concatenate(supports, out=views["support_ids"])
    return seal_frame(frame)


def decode_requests(body: Frame | bytes | bytearray | memoryview) -> TeacherCall:
    """The call in a frame; what it holds may be views of the frame.

    Raises:
        TeacherError: not a frame, damaged, an empty prompt or completion, an id outside the vocabulary, or a question
            that cannot be answered.
    """
    frame = as_frame(body)
    header = read_header(frame, kind=FrameKind.REQUESTS, teacher=_CLIENT)
    _check_question(header)
    views = read_arrays(frame, _arrays(header), teacher=_CLIENT)
    prompts, completions = (views[name].astype(np.int64) for name in ("prompt_lengths", "lengths"))
    for name, lengths, total in (
        ("prompt lengths", prompts, header.num_prompt_tokens),
        ("lengths", completions, header.num_tokens),
    ):
        if lengths.sum() != total or not lengths.all():
            raise damaged(_CLIENT, name, f"must be at least 1 and sum to {total}, got {lengths.tolist()[:8]}")
    for name in ("prompt_ids", "completion_ids", "support_ids"):
        if name in views and views[name].view("<u4").max(initial=0) >= header.vocab_size:
            raise damaged(_CLIENT, name, f"must be ids of a vocabulary of {header.vocab_size}, and one is not")
    return TeacherCall(
        requests=tuple(
            TeacherRequest(prompt_ids=prompt, completion_ids=completion, support_ids=support)
            for prompt, completion, support in zip(
                _split(views["prompt_ids"], prompts),
                _split(views["completion_ids"], completions),
                _split(views["support_ids"], completions) if "support_ids" in views else [None] * len(completions),
                strict=True,
            )
        ),
        question=TeacherQuestion(
            vocab_size=header.vocab_size,
            temperature=header.temperature,
            top_k=header.top_k,
            tail=header.has_tail,
        ),
        dtype=header.dtype,
        ids=header.ids,
    )


def _check_question(header: FrameHeader) -> None:
    wrong = {
        "completions": header.num_completions < 1,
        "temperature": not (header.temperature > 0 and math.isfinite(header.temperature)),
        "top_k": header.top_k > min(header.width, header.vocab_size),
        "tail": header.has_tail and not header.width,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise damaged(_CLIENT, name, f"cannot be answered as asked: {header}")


def _arrays(header: FrameHeader) -> list[FrameArray]:
    """What follows the header."""
    arrays = [
        FrameArray(name="prompt_lengths", dtype="<u4", shape=(header.num_completions,)),
        FrameArray(name="lengths", dtype="<u4", shape=(header.num_completions,)),
        FrameArray(name="prompt_ids", dtype="<i4", shape=(header.num_prompt_tokens,)),
        FrameArray(name="completion_ids", dtype="<i4", shape=(header.num_tokens,)),
    ]
    support = header.width - header.top_k
    if support:
        arrays.append(FrameArray(name="support_ids", dtype="<i4", shape=(header.num_tokens, support)))
    return arrays


def _split(ids: IntArray, lengths: np.ndarray) -> Sequence[IntArray]:
    return np.split(ids, np.cumsum(lengths)[:-1])
