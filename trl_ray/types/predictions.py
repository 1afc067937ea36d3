"""What a model predicts of held-out rows, token by token, for metrics of the user's own.

Example --> PredictionBatch --learner.predict--> PredictedBatch: logits, or what the user's function makes of them
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.types.arrays import IntArray


class PredictionForm(enum.StrEnum):
    """What stands in predictions and labels; each is that of the trainer of this kind in TRL."""

    LABELLED = "labelled"
    """Logits [B, T, V]; labels [B, T] are the trained tokens, -100 elsewhere (SFT)."""
    COMPARED = "compared"
    """Logits [2B, T, V] of all chosen, then of all rejected; labels [2B, T] are the tokens that were read (DPO)."""
    RATED = "rated"
    """Logits [B, T, V]; labels [B, T] are the tokens that were read (KTO)."""
    MEANS = "means"
    """Two numbers, the mean logit of chosen and of rejected; labels are two zeros (CPO)."""
    SHIFTED_MEANS = "shifted_means"
    """The same without the last place of every row (ORPO)."""
    SCORED = "scored"
    """Rewards [2B, 1] of all chosen, then of all rejected; no labels (reward models)."""
    STEPPED = "stepped"
    """Logits [B, T, 2]; labels [B, T] are 1 and 0 where right and wrong steps end, -100 elsewhere (PRM)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionPiece:
    """Tokens that see each other and nothing else."""

    token_ids: IntArray
    """[T]"""
    labels: IntArray
    """[T] -100 where nothing is to be predicted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionBatch:
    """Rows that one rank reads at once."""

    form: PredictionForm
    rows: tuple[tuple[PredictionPiece, ...], ...]
    """Each of one piece, or of those that are packed in it."""
    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictedBatch:
    """The answer: arrays, or tuples, lists and dicts of them where the user's function makes such."""

    predictions: Any
    label_ids: Any
    inputs: NDArray[np.int64]
    """[rows, T] the tokens that were read, padded."""
