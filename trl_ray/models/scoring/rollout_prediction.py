"""What `compute_metrics` is given of answers to held-out prompts: transformers' `EvalPrediction`, with more by name.

answers of a set, prompt by prompt ─► RolloutPrediction: predictions [N, T], prompts, completions, rewards, columns ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

from trl_ray.algorithms.batches.prediction_batches import IGNORED
from trl_ray.types import FloatArray, IntArray


class RolloutPrediction(EvalPrediction):
    """The N completions of a held-out set, those of one prompt after those of another.

    ``predictions`` [N, T] are the completions' token ids, filled up with -100; ``label_ids`` is None, as prompts have
    no labels; ``inputs`` [N, P] are the prompts' token ids, filled up in the same way.

    Args:
        prompts, completions: [N] as reward functions are given them: texts, or conversations.
        prompt_ids, completion_ids: [N] of token ids.
        prompt_indices: [N] which prompt of the set a completion answers, counted from 0.
        rewards: [N] in total; NaN where nobody gave one.
        reward_parts: [N] of each reward function by its name.
        columns: [N] the rows' other columns by name; None where a row has no such column.
        is_truncated: [N] whether a completion was cut off before its end.
        logprobs: [N] of [L] log-probs of its tokens under the distribution that they were drawn from, in nats; where
            `distillation_objective=iw_opd` has reshaped sampling, those of the policy at the temperature.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[IntArray],
        completion_ids: Sequence[IntArray],
        prompt_indices: IntArray,
        rewards: NDArray[np.float64],
        reward_parts: Mapping[str, NDArray[np.float64]],
        columns: Mapping[str, Sequence[Any]],
        is_truncated: NDArray[np.bool_],
        logprobs: Sequence[FloatArray],
    ) -> None:
        super().__init__(predictions=_filled(completion_ids), label_ids=None)  # type: ignore[arg-type]
        # Set afterwards: it would be a third one of the pair that this is unpacked to.
        self.inputs = _filled(prompt_ids)
        self.prompts, self.completions = list(prompts), list(completions)
        self.prompt_ids = [ids.tolist() for ids in prompt_ids]
        self.completion_ids = [ids.tolist() for ids in completion_ids]
        self.prompt_indices = prompt_indices
        self.rewards, self.reward_parts = rewards, dict(reward_parts)
        self.columns = {name: list(values) for name, values in columns.items()}
        self.is_truncated = is_truncated
        self.logprobs = list(logprobs)


def _filled(rows: Sequence[IntArray]) -> NDArray[np.int64]:
    filled = np.full((len(rows), max(map(len, rows), default=0)), IGNORED, np.int64)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return filled
