"""Prompts and groups survive the trip through bytes exactly, and damaged bytes are refused."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

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
from trl_ray.wire.group_payload import decode_group, decode_prompt, encode_group, encode_prompt

PROMPT = Prompt(
    prompt_id="0:17",
    token_ids=np.array([5, 0, 2**31 - 1], dtype=np.int32),
    messages=({"role": "user", "content": "Grüße, 世界\n"},),
    columns={"answer": 0.1, "tags": ["a", None, True], "nested": {"n": 2**60}},
)


def completion(length: int = 3, **changes: Any) -> Completion:
    fields: dict[str, Any] = {
        "token_ids": np.arange(length, dtype=np.int32),
        "logprobs": np.linspace(-1, 0, length, dtype=np.float32),
        "versions": (VersionSpan(version=4, start=0, end=1), VersionSpan(version=5, start=1, end=length)),
        "finish_reason": FinishReason.STOP,
        "text": "done",
        **changes,
    }
    return Completion(**fields)


def group(*completions: Completion, **changes: Any) -> RolloutGroup:
    fields: dict[str, Any] = {
        "ticket": GroupTicket(group_id=3, attempt=1, prompt=PROMPT, admitted_at_version=2),
        "completions": completions,
        "rewards": tuple(Reward(total=0.5, parts={"f": 0.5}) for _ in completions),
        "worker": "rollout-0",
        **changes,
    }
    return RolloutGroup(**fields)


def scores(length: int = 3, width: int = 2, **changes: Any) -> TeacherScores:
    fields: dict[str, Any] = {
        "teacher": "maths",
        "version": 4,
        "logprobs": np.linspace(-2, -1, length, dtype=np.float32),
        "top_ids": np.arange(length * width, dtype=np.int32).reshape(length, width),
        "top_logprobs": np.linspace(-9, -1, length * width, dtype=np.float32).reshape(length, width),
        "tail": np.full(length, -np.inf, dtype=np.float32),
        **changes,
    }
    return TeacherScores(**fields)


def context(**changes: Any) -> TeacherContext:
    return TeacherContext(
        **{"prompt_ids": np.array([7, 8], dtype=np.int32), "demonstration": 1, "num_cut": 3} | changes
    )


def taught(*teachings: TeacherScores | None, **changes: Any) -> RolloutGroup:
    """One completion of three tokens for each teaching."""
    fields: dict[str, Any] = {
        "contexts": tuple(context(demonstration=None, is_distilled=each is not None) for each in teachings),
        "teachings": teachings,
        **changes,
    }
    return group(*(completion() for _ in teachings), **fields)


def same(left: Any, right: Any) -> bool:
    """Equal in type, dtype, bits and every field."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if dataclasses.is_dataclass(left):
        names = [field.name for field in dataclasses.fields(left)]
        return type(left) is type(right) and all(same(getattr(left, n), getattr(right, n)) for n in names)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


def test_a_group_survives_exactly_with_everything_in_it() -> None:
    mask = np.array([True, False, True])
    tricky = np.array([-0.0, -1e-45, -np.inf], dtype=np.float32)
    original = group(
        completion(loss_mask=mask, logprobs=tricky, finish_reason=FinishReason.LENGTH, text="\x00é"),
        completion(1, versions=(VersionSpan(version=0, start=0, end=1),)),
        rewards=(
            Reward(total=None, parts={"f": None, "g": 1.0}, extra={"why": "no answer", "n": [1, 2]}),
            Reward(total=1 / 3, parts={"f": 0.1, "g": -2.5}),
        ),
        spans=(Span(actor="rollout-0", name="generate", start=1.5, end=1e9 + 0.125),),
        metrics={"accuracy": 0.25},
    )
    assert same(decode_group(encode_group(original)), original)


def test_a_prompt_of_text_and_one_of_messages_survive() -> None:
    text = Prompt(prompt_id="1:0", token_ids=np.array([1], dtype=np.int32), text="2 + 2 =")
    assert same(decode_prompt(encode_prompt(text)), text)
    assert same(decode_prompt(encode_prompt(PROMPT)), PROMPT)


def test_an_empty_completion_survives() -> None:
    empty = completion(0, versions=(VersionSpan(version=0, start=0, end=0),))
    assert same(decode_group(encode_group(group(empty))), group(empty))


def test_decoded_arrays_may_be_written_to() -> None:
    decoded = decode_prompt(encode_prompt(PROMPT))
    decoded.token_ids[0] = 9
    assert decoded.token_ids.flags.aligned


@given(
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20),
    columns=st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    ),
)
@settings(max_examples=50)
def test_any_prompt_survives(tokens: list[int], columns: dict[str, Any]) -> None:
    prompt = Prompt(prompt_id="0:0", token_ids=np.array(tokens, dtype=np.int32), text="", columns=columns)
    assert same(decode_prompt(encode_prompt(prompt)), prompt)


def test_every_cut_and_every_surplus_byte_is_refused() -> None:
    data = encode_group(group(completion(loss_mask=np.array([True, True, False]))))
    for cut in range(len(data)):
        with pytest.raises(JournalError, match="stored bytes"):
            decode_group(data[:cut])
    with pytest.raises(JournalError, match="1 bytes are left over"):
        decode_group(data + b"\x00")
    with pytest.raises(JournalError, match="TRLP"):
        decode_prompt(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"tokens":3,"logprobs":3', b'"tokens":2,"logprobs":4'),
        (b"[5,1,3]", b"[5,2,3]"),
        (b'"finish_reason":"stop"', b'"finish_reason":"halt"'),
        (b'"logprobs":3', b'"logprobs":"'),
        (b'"mask":3', b'"mask":-'),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(old: bytes, new: bytes) -> None:
    data = encode_group(group(completion(loss_mask=np.array([True, True, False]))))
    assert old in data
    with pytest.raises(JournalError):
        decode_group(data.replace(old, new, 1))


def test_a_mask_byte_other_than_0_and_1_is_refused() -> None:
    data = encode_group(group(completion(loss_mask=np.array([True, True, False]))))
    with pytest.raises(JournalError, match="neither 0 nor 1"):
        decode_group(data[:-1] + b"\x02")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (completion(token_ids=np.arange(3)), "token_ids of a completion must be int32"),
        (completion(logprobs=np.zeros(3)), "logprobs of a completion must be float32"),
        (completion(logprobs=np.zeros(2, dtype=np.float32)), "equally long"),
        (completion(versions=()), "cover all 3 tokens"),
        (completion(versions=(VersionSpan(version=0, start=1, end=3),)), "without gaps"),
        (completion(loss_mask=np.ones(4, dtype=np.bool_)), "equally long"),
    ],
)
def test_a_group_that_contradicts_itself_is_not_stored(wrong: Completion, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_group(group(wrong))


def test_rewards_and_completions_must_match_and_exist() -> None:
    with pytest.raises(DataError, match="0 rewards for 1 completions"):
        encode_group(group(completion(), rewards=()))
    with pytest.raises(DataError, match="at least one completion"):
        encode_group(group())


@pytest.mark.parametrize("value", [b"bytes", {1: "a"}, {"deep": [object()]}])
def test_a_column_that_is_not_json_is_named(value: Any) -> None:
    prompt = dataclasses.replace(PROMPT, columns={"image": value})
    with pytest.raises(DataError, match=r"columns\.image"):
        encode_prompt(prompt)


def test_numpy_scalars_in_columns_become_numbers() -> None:
    prompt = dataclasses.replace(PROMPT, columns={"n": np.int64(3), "x": np.float32(0.5)})
    assert decode_prompt(encode_prompt(prompt)).columns == {"n": 3, "x": 0.5}


def test_what_teachers_say_survives_exactly() -> None:
    tricky = np.array([[-0.0, -np.inf], [-1e-45, -88.0], [-np.inf, -np.inf]], dtype=np.float32)
    original = group(
        completion(),
        completion(is_sampled=False),
        completion(),
        contexts=(
            context(has_feedback=True, uses_feedback=True),
            context(prompt_ids=np.zeros(0, dtype=np.int32), is_distilled=False, demonstration=None, num_cut=0),
            context(),
        ),
        teachings=(
            scores(top_logprobs=tricky),
            None,
            TeacherScores(teacher="base", version=None, logprobs=np.array([-1, -2, -3], dtype=np.float32)),
        ),
    )
    decoded = decode_group(encode_group(original))
    assert same(decoded, original)
    assert decoded.teachings[0] is not None and decoded.teachings[0].top_ids is not None
    assert decoded.teachings[0].top_ids.flags.writeable


def test_contexts_travel_without_teachings_and_prompts_with_their_completion() -> None:
    given_prompt = dataclasses.replace(PROMPT, given_ids=np.array([1, 2**31 - 1], dtype=np.int32), num_cut=5)
    ticket = GroupTicket(group_id=3, attempt=1, prompt=given_prompt, admitted_at_version=2)
    original = group(completion(), ticket=ticket, contexts=(context(demonstration=0),))
    assert same(decode_group(encode_group(original)), original)
    assert same(decode_prompt(encode_prompt(given_prompt)), given_prompt)


@st.composite
def any_scores(draw: st.DrawFn, length: int) -> TeacherScores:
    numbers = st.floats(max_value=0, allow_nan=False, allow_infinity=False, width=32)
    width = draw(st.integers(0, 3))

    def drawn(elements: st.SearchStrategy[Any], *shape: int, dtype: type) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(elements, min_size=size, max_size=size)), dtype=dtype).reshape(shape)

    return TeacherScores(
        teacher=draw(st.text()),
        version=draw(st.none() | st.integers(0, 2**40)),
        logprobs=drawn(numbers, length, dtype=np.float32),
        top_ids=drawn(st.integers(0, 2**31 - 1), length, width, dtype=np.int32) if width else None,
        top_logprobs=drawn(numbers | st.just(-np.inf), length, width, dtype=np.float32) if width else None,
        tail=drawn(numbers | st.just(-np.inf), length, dtype=np.float32) if draw(st.booleans()) else None,
    )


@given(data=st.data(), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=50)
def test_any_teaching_survives(data: st.DataObject, lengths: list[int]) -> None:
    spans = [(VersionSpan(version=0, start=0, end=length),) for length in lengths]
    teachings = tuple(data.draw(st.none() | any_scores(length)) for length in lengths)
    facts = st.fixed_dictionaries(
        {
            "has_feedback": st.booleans(),
            "uses_feedback": st.booleans(),
            "num_cut": st.integers(0, 2**40),
            "demonstration": st.none() | st.integers(0, len(lengths) - 1),
        }
    )
    original = group(
        *(completion(length, versions=span) for length, span in zip(lengths, spans, strict=True)),
        contexts=tuple(context(is_distilled=each is not None, **data.draw(facts)) for each in teachings),
        teachings=teachings,
    )
    assert same(decode_group(encode_group(original)), original)


def test_every_cut_of_a_taught_group_is_refused() -> None:
    data = encode_group(taught(scores(), None))
    for cut in range(len(data)):
        with pytest.raises(JournalError, match="stored bytes"):
            decode_group(data[:cut])
    with pytest.raises(JournalError, match="4 bytes are left over"):
        decode_group(data + bytes(4))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"top_ids":[3,2]', b'"top_ids":[2,3]'),
        (b'"top_ids":[3,2]', b'"top_ids":[6]'),
        (b'"top_ids":[3,2]', b'"top_ids":[]'),
        (b'"top_ids":[3,2]', b'"top_ids":[-3,-2]'),
        (b'"tail":3', b'"tail":true'),
        (b'"version":4,', b'"version":"4",'),
        (b'"num_cut":3', b'"num_cut":-3'),
        (b'"num_cut":3', b'"num_cut":0.5'),
        (b'"num_cut":0', b'"num_cut":-1'),
        (b'"num_cut":0', b'"num_cut":true'),
        (b'"is_distilled":true', b'"is_distilled":1'),
        (b'"is_distilled":false', b'"is_distilled":true'),
        (b'"demonstration":null', b'"demonstration":2'),
        (b'"is_sampled":true', b'"is_sampled":"yes"'),
        (b'"has_feedback":false,', b""),
        (b'"contexts":[', b'"contexts":7,"more":['),
    ],
)
def test_a_header_that_contradicts_itself_about_teachers_is_refused(old: bytes, new: bytes) -> None:
    data = encode_group(taught(scores(), None))
    assert old in data
    changed = data.replace(old, new)
    # The header's length is true, so that only what it says is wrong.
    length = int.from_bytes(data[4:8], "little") + len(changed) - len(data)
    with pytest.raises(JournalError):
        decode_group(changed[:4] + length.to_bytes(4, "little") + changed[8:])


def test_damaged_numbers_are_refused() -> None:
    data = encode_group(taught(scores(top_ids=None, top_logprobs=None, tail=None)))
    with pytest.raises(JournalError, match="finite"):
        decode_group(data[:-4] + np.array(np.nan, dtype="<f4").tobytes())
    with_tail = encode_group(taught(scores(top_ids=None, top_logprobs=None)))
    with pytest.raises(JournalError, match="tail must be numbers"):
        decode_group(with_tail[:-4] + np.array(np.nan, dtype="<f4").tobytes())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (taught(scores(4)), "must score all 3 tokens"),
        (taught(scores(tail=np.zeros(2, np.float32))), "must score all 3 tokens"),
        (taught(scores(top_ids=None)), "must come with top_logprobs"),
        (taught(scores(top_ids=np.zeros((3, 1), np.int32))), "one shape"),
        (taught(scores(top_ids=np.zeros((3, 2), np.int64))), "top_ids of a teacher must be int32 with two axes"),
        (taught(scores(top_ids=np.zeros(6, np.int32), top_logprobs=np.zeros(6, np.float32))), "one shape"),
        (taught(scores(logprobs=np.full(3, -np.inf, np.float32))), "finite"),
        (taught(scores(top_logprobs=np.full((3, 2), -1.0))), "top_logprobs of a teacher must be float32"),
        (taught(scores(), contexts=()), "with their contexts"),
        (taught(scores(), contexts=(context(),) * 2), "no contexts or one per completion"),
        (taught(scores(), teachings=(scores(),) * 2), "no teachings or one per completion"),
        (taught(None, contexts=(context(demonstration=0),)), "that is distilled must be taught"),
        (taught(scores(), contexts=(context(demonstration=1),)), "a completion of 1 or None"),
    ],
)
def test_a_teaching_that_contradicts_its_group_is_not_stored(wrong: RolloutGroup, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_group(wrong)
