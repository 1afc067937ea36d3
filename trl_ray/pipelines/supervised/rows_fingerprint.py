"""Tells the examples of one dataset from those of another, so that a run goes on with the rows that it began with.

examples ─┬─ made of a table of tokens ─ its columns, on disk or in memory ─┬─► hex digest, of all rows
          └─ others ─ one by one: tokens, targets, labels ──────────────────┘
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from trl_ray.data.examples.made_examples import MadeExamples
from trl_ray.types import Example, TrainingSample


def rows_fingerprint(examples: Sequence[Example]) -> str:
    """Hex digest over the number of examples, and over tokens, targets and labels of all of them.

    A gigabyte of tokens takes about a second, most of which is reading them from disk.
    """
    digest = hashlib.sha256(str(len(examples)).encode())
    if isinstance(examples, MadeExamples):
        digest.update(examples.content_key().encode())
        return digest.hexdigest()
    for example in examples:
        for sample in (*example.samples, *([] if example.mismatched is None else [example.mismatched])):
            digest.update(_bytes_of(sample))
    return digest.hexdigest()


def _bytes_of(sample: TrainingSample) -> bytes:
    label = sample.label
    told = None if label is None else (label.desirable, label.margin, label.length)
    steps = b"" if label is None or label.steps is None else label.steps.tobytes()
    ids = np.concatenate([sample.prompt_ids, sample.completion_ids]).astype(np.int32)
    sizes = (len(sample.prompt_ids), len(sample.completion_ids))
    return repr((sizes, told)).encode() + ids.tobytes() + sample.loss_mask.tobytes() + steps
