"""Completions that nobody samples: the dataset's own, in the form that sampled ones have.

Prompt.given_ids [L] --> G x Completion, at once: log-probs 0, the current weight version, not sampled
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from trl_ray.types import Completion, FinishReason, IntArray, VersionSpan


class TextDecoder(Protocol):
    """The part of a Hugging Face tokenizer that turns tokens into text."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """The text of some tokens."""
        ...


def given_completions(
    token_ids: IntArray, *, n: int, version: int, tokenizer: TextDecoder
) -> Future[tuple[Completion, ...]]:
    """The dataset's completion in place of `n` sampled ones.

    Args:
        token_ids: [L] its tokens.
        n: how often; more than one are all alike.
        version: the engine's weights, which stand for its age.
        tokenizer: of the policy.

    Returns:
        A settled future, as an engine gives for what it samples.
    """
    length = len(token_ids)
    completion = Completion(
        token_ids=token_ids,
        logprobs=np.zeros(length, dtype=np.float32),
        versions=(VersionSpan(version=version, start=0, end=length),),
        finish_reason=FinishReason.STOP,
        text=str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)),
        is_sampled=False,
    )
    future: Future[tuple[Completion, ...]] = Future()
    future.set_result((completion,) * n)
    return future
