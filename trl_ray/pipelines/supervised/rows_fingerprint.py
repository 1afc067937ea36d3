"""Tells the examples of one dataset from those of another, so that a run goes on with the rows that it began with.

examples ─ all, or as many as tell, evenly spaced ─ token ids and targets ─► hex digest
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from trl_ray.types import Example, TrainingSample

_LOOKED_AT = 4096


def rows_fingerprint(examples: Sequence[Example]) -> str:
    """Hex digest over the number of examples, and over tokens, targets and labels of up to 4096 of them."""
    count = len(examples)
    places = np.unique(np.linspace(0, max(0, count - 1), min(count, _LOOKED_AT)).astype(np.int64))
    digest = hashlib.sha256(str(count).encode())
    for place in places.tolist():
        example = examples[place]
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
