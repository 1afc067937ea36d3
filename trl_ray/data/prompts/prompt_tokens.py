"""Turns prompts that are plain text into the tokens that a completion goes on from.

    text ─ without special tokens ─► ids ─ what the tokenizer begins a text with, unless it is there ─► ids [P]

What the tokenizer puts behind a text, such as an end-of-sequence token, would end the prompt before its answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trl_ray.data.chat.chat_rendering import ChatTokenizer
from trl_ray.types import IntArray

_PROBE = "a"


def encode_prompts(tokenizer: ChatTokenizer, texts: Sequence[str]) -> list[IntArray]:
    """Token ids ``[P]`` of each text: one beginning of sequence where the tokenizer writes one, and no end."""
    opening = _opening(tokenizer)
    plain = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [_opened(np.asarray(ids, np.int32), opening) for ids in plain]


def _opening(tokenizer: ChatTokenizer) -> IntArray:
    """What the tokenizer puts before a text."""
    plain, whole = (list(tokenizer([_PROBE], add_special_tokens=special)["input_ids"][0]) for special in (False, True))
    places = range(len(whole) - len(plain) + 1)
    start = next((place for place in places if whole[place : place + len(plain)] == plain), 0)
    return np.asarray(whole[:start], np.int32)


def _opened(ids: IntArray, opening: IntArray) -> IntArray:
    if np.array_equal(ids[: len(opening)], opening):
        return ids
    return np.concatenate([opening, ids])
