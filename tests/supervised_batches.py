"""Examples of every supervised objective with random tokens, as `trl_ray.data` makes them, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_ray.algorithms.batches.example_batches import example_batch
from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.algorithms.loss_registry import build_loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.types import Example, IntArray, SampleLabel, TrainBatch, TrainingSample

END = 258
"""The tiny models' end-of-sequence token."""
COUNT = 8


def tokens(rng: np.random.Generator, count: int) -> IntArray:
    return rng.integers(0, 250, count).astype(np.int32)


def sample(group: int, prompt: IntArray, completion: IntArray, **options: Any) -> TrainingSample:
    """All of the completion is trained, unless `loss_mask` says otherwise."""
    mask = options.pop("loss_mask", np.ones(len(completion), dtype=np.bool_))
    return TrainingSample(group_id=group, prompt_ids=prompt, completion_ids=completion, loss_mask=mask, **options)


def texts(seed: int) -> list[Example]:
    """Eight texts of which 1 to 9 tokens are trained, some of them with a gap."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(COUNT):
        length = int(rng.integers(1, 10))
        mask = np.ones(length, dtype=np.bool_)
        mask[1 : 1 + row % 2] = False
        one = sample(row, tokens(rng, 3 + row % 4), tokens(rng, length), loss_mask=mask)
        made.append(Example(row=row, samples=(one,)))
    return made


def pairs(seed: int, *, with_prompt: bool = False) -> list[Example]:
    """Eight pairs with completions of 1 to 9 tokens; `with_prompt` adds the rest of the prompt, as ORPO wants it."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(COUNT):
        prompt = tokens(rng, 1 + row % 5)
        samples = [sample(row, prompt, tokens(rng, int(rng.integers(1, 10)))) for _ in range(2)]
        if with_prompt and len(prompt) > 1:
            samples.append(sample(row, prompt[:1], prompt[1:]))
        made.append(Example(row=row, samples=tuple(samples)))
    return made


def rated(seed: int) -> list[Example]:
    """Eight completions, found good or bad in turn, each with the completion of the row before."""
    rng = np.random.default_rng(seed)
    parts = [(tokens(rng, 3 + row % 4), tokens(rng, int(rng.integers(1, 10)))) for row in range(COUNT)]
    return [
        Example(
            row=row,
            samples=(sample(row, prompt, completion, label=SampleLabel(desirable=row % 2 == 0)),),
            mismatched=sample(row, prompt, parts[row - 1][1]),
        )
        for row, (prompt, completion) in enumerate(parts)
    ]


def reward_pairs(seed: int) -> list[Example]:
    """Eight pairs of texts, each read at its last token; every other pair has a margin."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(COUNT):
        prompt, label = tokens(rng, 2 + row % 3), SampleLabel(margin=0.5 if row % 2 else None)
        sides = [np.append(tokens(rng, int(rng.integers(1, 10))), np.int32(END)) for _ in range(2)]
        samples = [
            sample(row, prompt, side.astype(np.int32), loss_mask=np.arange(len(side)) == len(side) - 1, label=label)
            for side in sides
        ]
        made.append(Example(row=row, samples=tuple(samples)))
    return made


def solutions(seed: int) -> list[Example]:
    """Eight solutions of 1 to 3 steps of two tokens each."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(COUNT):
        steps = 1 + row % 3
        mask = np.array([False, False, True] + [False, True] * (steps - 1))
        label = SampleLabel(steps=rng.random(steps) < 0.5)
        one = sample(row, tokens(rng, 3), tokens(rng, len(mask)), loss_mask=mask, label=label)
        made.append(Example(row=row, samples=(one,)))
    return made


def packed(seed: int) -> Example:
    """The eight texts as one row."""
    return Example(row=0, samples=tuple(one for text in texts(seed) for one in text.samples), num_rows=COUNT)


def batch_of(
    options: LossSection,
    examples: Sequence[Example],
    *,
    step: int = 1,
    size: int = COUNT,
    **more: float,
) -> TrainBatch:
    """An update whose micro-batches hold `size` examples; `more` are totals of a first pass."""
    samples = [one for example in examples for one in example.samples]
    totals = {**build_loss(options).totals(samples), **more}
    return example_batch(examples, step=step, rules=CutRules(max_examples=size), totals=totals)
