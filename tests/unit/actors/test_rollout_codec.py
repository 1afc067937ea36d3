"""Prompts and groups survive the trip through bytes exactly, and damaged bytes are refused."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from trl_ray.actors.rollout_codec import decode_group, decode_prompt, encode_group, encode_prompt
from trl_ray.errors import DataError, JournalError
from trl_ray.types import Completion, FinishReason, GroupTicket, Prompt, Reward, RolloutGroup, Span, VersionSpan

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
