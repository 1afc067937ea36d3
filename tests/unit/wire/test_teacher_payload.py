"""Scores and questions survive as bytes; damaged or made-up bytes end in TeacherError, never in anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from teacher_batches import make_requests, make_scores
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.errors import TeacherError
from trl_ray.types import TeacherQuestion, TeacherScores
from trl_ray.wire import teacher_frames
from trl_ray.wire.teacher_frames import HEADER_BYTES, Frame
from trl_ray.wire.teacher_payload import decode_scores, encode_scores
from trl_ray.wire.teacher_requests import TeacherCall, decode_requests, encode_requests

LENGTHS = [3, 1, 7]
CHECKSUM = slice(HEADER_BYTES - 8, HEADER_BYTES)
ROUNDING = {PayloadDtype.FLOAT32: 0.0, PayloadDtype.FLOAT16: 2.0**-11, PayloadDtype.BFLOAT16: 2.0**-8}
FIELDS = ("logprobs", "top_ids", "top_logprobs", "tail")

questions = st.builds(
    TeacherQuestion,
    vocab_size=st.sampled_from([50, 2**16, 2**16 + 1, 2**17]),
    temperature=st.sampled_from([0.7, 1.0]),
    top_k=st.integers(1, 5),
    tail=st.booleans(),
)


def sealed(frame: Frame) -> Frame:
    """A frame with the right checksum, whatever is in it."""
    digest = xxhash.xxh3_64(frame[: CHECKSUM.start].tobytes() + frame[HEADER_BYTES:].tobytes()).intdigest()
    frame[CHECKSUM] = np.frombuffer(digest.to_bytes(8, "little"), dtype=np.uint8)
    return frame


def same(one: TeacherScores, other: TeacherScores, rounding: float = 0.0) -> None:
    assert one.version == other.version
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-7 if rounding else 0)


@given(
    question=questions,
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    support=st.integers(0, 3),
    dtype=st.sampled_from(PayloadDtype),
    ids=st.sampled_from(PayloadIds),
    version=st.none() | st.integers(0, 2**40),
)
def test_scores_come_back_as_they_were_sent(
    question: TeacherQuestion,
    lengths: list[int],
    support: int,
    dtype: PayloadDtype,
    ids: PayloadIds,
    version: int | None,
) -> None:
    requests = make_requests(lengths, support=support, vocab_size=question.vocab_size)
    scores = make_scores(requests, question, version=version)
    frame = encode_scores(scores, question=question, dtype=dtype, ids=ids)
    # Through HTTP as bytes, through the object store as an array.
    for body in (frame, frame.tobytes(), memoryview(frame)):
        again = decode_scores(body, teacher="ours", requests=requests, question=question)
        assert [each.teacher for each in again] == ["ours"] * len(lengths)
        for one, other in zip(again, scores, strict=True):
            same(one, other, ROUNDING[dtype])


@given(
    question=questions, support=st.integers(0, 3), dtype=st.sampled_from(PayloadDtype), ids=st.sampled_from(PayloadIds)
)
def test_questions_come_back_as_they_were_sent(
    question: TeacherQuestion, support: int, dtype: PayloadDtype, ids: PayloadIds
) -> None:
    requests = make_requests(LENGTHS, support=support, vocab_size=question.vocab_size)
    call = TeacherCall(requests=tuple(requests), question=question, dtype=dtype, ids=ids)
    again = decode_requests(encode_requests(call).tobytes())
    assert (again.question, again.dtype, again.ids) == (question, dtype, ids)
    for one, other in zip(again.requests, requests, strict=True):
        np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
        np.testing.assert_array_equal(one.completion_ids, other.completion_ids)
        assert (one.support_ids is None) == (other.support_ids is None)
        if one.support_ids is not None:
            np.testing.assert_array_equal(one.support_ids, other.support_ids)


QUESTION = TeacherQuestion(vocab_size=70_000, top_k=3, tail=True)
REQUESTS = make_requests(LENGTHS, vocab_size=70_000)
SCORES = make_scores(REQUESTS, QUESTION)


def frame_of(dtype: PayloadDtype = PayloadDtype.FLOAT32, ids: PayloadIds = PayloadIds.INT32) -> Frame:
    return encode_scores(SCORES, question=QUESTION, dtype=dtype, ids=ids)


def decode(body: Any, requests: Any = REQUESTS, question: TeacherQuestion = QUESTION) -> list[TeacherScores]:
    return decode_scores(body, teacher="big", requests=requests, question=question)


@given(
    place=st.integers(0, len(frame_of()) - 1),
    flip=st.integers(1, 255),
)
def test_any_changed_byte_is_noticed(place: int, flip: int) -> None:
    frame = frame_of()
    frame[place] ^= flip
    with pytest.raises(TeacherError, match="teacher big"):
        decode(frame)


@given(cut=st.integers(0, len(frame_of()) - 1), more=st.binary(min_size=1, max_size=9))
def test_a_frame_cut_short_or_continued_is_noticed(cut: int, more: bytes) -> None:
    for body in (frame_of().tobytes()[:cut], frame_of().tobytes() + more):
        with pytest.raises(TeacherError, match="teacher big"):
            decode(body)
        with pytest.raises(TeacherError):
            decode(sealed(np.frombuffer(body.ljust(HEADER_BYTES, b"\0"), dtype=np.uint8).copy()))


@given(body=st.binary(max_size=300), seal=st.booleans())
def test_garbage_is_never_read(body: bytes, seal: bool) -> None:
    frame = np.frombuffer(body.ljust(HEADER_BYTES, b"\0"), dtype=np.uint8).copy()
    garbage: Any = sealed(frame) if seal else body
    with pytest.raises(TeacherError):
        decode(garbage)
    with pytest.raises(TeacherError):
        decode_requests(garbage)


@given(data=st.data(), dtype=st.sampled_from(PayloadDtype), ids=st.sampled_from(PayloadIds))
def test_a_wrong_answer_with_the_right_checksum_is_refused_or_within_what_an_answer_may_be(
    data: st.DataObject, dtype: PayloadDtype, ids: PayloadIds
) -> None:
    frame = frame_of(dtype, ids)
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        scores = decode(sealed(frame))
    except TeacherError:
        return
    assert [len(each.logprobs) for each in scores] == LENGTHS
    for each in scores:
        assert each.top_ids is not None and each.top_logprobs is not None and each.tail is not None
        assert np.isfinite(each.logprobs).all() and (each.logprobs <= 1e-3).all()
        assert (each.top_ids >= 0).all() and (each.top_ids < 70_000).all()
        np.testing.assert_allclose(np.exp(each.top_logprobs).sum(1) + np.exp(each.tail), 1, atol=0.051)


@given(data=st.data())
def test_a_wrong_question_with_the_right_checksum_is_refused_or_can_be_answered(data: st.DataObject) -> None:
    requests = make_requests(LENGTHS, support=2, vocab_size=70_000)
    frame = encode_requests(TeacherCall(requests=tuple(requests), question=QUESTION))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        call = decode_requests(sealed(frame))
    except TeacherError:
        return
    assert call.question.temperature > 0
    for request in call.requests:
        assert len(request.prompt_ids) and len(request.completion_ids)
        for ids in (request.prompt_ids, request.completion_ids, request.support_ids):
            assert ids is None or ((ids >= 0) & (ids < call.question.vocab_size)).all()


@pytest.mark.parametrize(
    ("question", "lengths", "message"),
    [
        (dataclasses.replace(QUESTION, top_k=2), LENGTHS, "top_k: must be 2 as asked, got 3"),
        (dataclasses.replace(QUESTION, vocab_size=80_000), LENGTHS, "vocabulary: must be 80000 as asked, got 70000"),
        (dataclasses.replace(QUESTION, temperature=0.5), LENGTHS, "temperature: must be 0.5 as asked, got 1.0"),
        (dataclasses.replace(QUESTION, tail=False), LENGTHS, "tail: must be False as asked, got True"),
        (QUESTION, [3, 1], "completions: must be 2 as asked, got 3"),
        (QUESTION, [3, 2, 6], "completion 1, length: must be 2 tokens, got 1"),
    ],
)
def test_the_answer_to_another_question_is_refused(question: TeacherQuestion, lengths: list[int], message: str) -> None:
    with pytest.raises(TeacherError, match=f"teacher big: {message}"):
        decode(frame_of(), requests=make_requests(lengths, vocab_size=70_000), question=question)


def test_the_answer_about_other_completions_is_refused_where_their_tokens_are_among_the_top() -> None:
    question = TeacherQuestion(vocab_size=50, top_k=50)
    requests = make_requests(LENGTHS)
    frame = encode_scores(make_scores(requests, question), question=question)
    with pytest.raises(TeacherError, match="completion 0, token 0, logprobs: must be that of the same token"):
        decode_scores(frame, teacher="big", requests=make_requests(LENGTHS, seed=9), question=question)


def test_float32_scores_are_read_where_they_lie_and_cannot_be_written_to() -> None:
    frame = frame_of()
    for each in decode(frame):
        for name in FIELDS:
            assert np.shares_memory(getattr(each, name), frame)
            assert not getattr(each, name).flags.writeable


def test_bytes_per_token_are_what_the_formats_say() -> None:
    requests = make_requests([800], vocab_size=70_000)
    scores = make_scores(requests, QUESTION)
    for dtype, ids, per_token in [
        (PayloadDtype.FLOAT32, PayloadIds.INT32, 4 + 3 * (4 + 4) + 4),
        (PayloadDtype.FLOAT16, PayloadIds.INT32, 2 + 3 * (4 + 2) + 2),
        (PayloadDtype.BFLOAT16, PayloadIds.COMPACT, 2 + 3 * (3 + 2) + 2),
    ]:
        # Header and one length, at a multiple of 8.
        assert len(encode_scores(scores, question=QUESTION, dtype=dtype, ids=ids)) == 72 + 8 + 800 * per_token


def test_only_the_tokens_of_the_completions_can_be_asked_about() -> None:
    question = TeacherQuestion(vocab_size=50)
    requests = make_requests(LENGTHS)
    scores = make_scores(requests, question)
    for one, other in zip(
        decode_scores(encode_scores(scores, question=question), teacher="big", requests=requests, question=question),
        scores,
        strict=True,
    ):
        assert one.top_ids is None
        same(one, other)


@pytest.mark.parametrize("field", ["prompt_ids", "completion_ids"])
def test_a_question_about_nothing_or_behind_nothing_is_refused(field: str) -> None:
    empty = dataclasses.replace(REQUESTS[1], **{field: np.empty(0, np.int32)})
    frame = encode_requests(TeacherCall(requests=(REQUESTS[0], empty), question=QUESTION))
    with pytest.raises(TeacherError, match="must be at least 1"):
        decode_requests(frame)


def test_a_frame_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_frames, "_FORMAT", 2)
    frame = frame_of()
    monkeypatch.undo()
    with pytest.raises(TeacherError, match="run the same version of trl_ray on both"):
        decode(frame)


def test_scores_are_no_question_and_a_question_is_no_scores() -> None:
    with pytest.raises(TeacherError, match="kind REQUESTS"):
        decode_requests(frame_of())
    with pytest.raises(TeacherError, match="kind SCORES"):
        decode(encode_requests(TeacherCall(requests=tuple(REQUESTS), question=QUESTION)))
