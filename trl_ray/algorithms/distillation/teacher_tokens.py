"""What teachers say of samples, at the tokens that are trained on.

    TrainingSample.teacher: logprobs [L], top_ids [L,K] ... --loss_mask, joined--> TeacherTokens [N], [N,K]

Samples without a teacher, and lists of tokens shorter than the longest, are filled with entries for no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trl_ray.types import BoolArray, FloatArray, TeacherScores, TrainingSample

NO_TOKEN = -1
"""An id that no vocabulary has."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTokens:
    """What teachers say of the N trained tokens of B samples; without gradient."""

    has_teacher: Tensor
    """[B] bool: a teacher has scored this sample."""
    logprobs: Tensor
    """[N] float32 of the samples' own tokens; 0 without a teacher."""
    top_ids: Tensor | None
    """[N, K] int64; `NO_TOKEN` where an entry stands for none. None: no teacher was asked about other tokens."""
    top_logprobs: Tensor | None
    """[N, K] float32; -inf where an entry stands for no token."""
    tail: Tensor | None
    """[N] float32 log of the mass that those K leave out; None where some teacher did not say."""


def teacher_tokens(samples: Sequence[TrainingSample], *, device: torch.device | str = "cpu") -> TeacherTokens:
    """Join what teachers say of the trained tokens of samples, in order."""
    said = [_Said(sample.teacher, sample.loss_mask) for sample in samples]
    width = max((part.width for part in said if part.width is not None), default=None)
    ids = logprobs = tail = None
    if width is not None:
        logprobs = np.concatenate([part.top_logprobs(width) for part in said])
        ids = np.where(np.isneginf(logprobs), NO_TOKEN, np.concatenate([part.top_ids(width) for part in said]))
        if all(part.has_tail for part in said):
            tail = np.concatenate([part.tail() for part in said])

    def moved(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(device)

    own = np.concatenate([part.logprobs() for part in said]) if said else np.zeros(0, np.float32)
    return TeacherTokens(
        has_teacher=torch.tensor([sample.teacher is not None for sample in samples], dtype=torch.bool, device=device),
        logprobs=torch.from_numpy(own).to(device),
        top_ids=moved(ids),
        top_logprobs=moved(logprobs),
        tail=moved(tail),
    )


class _Said:
    """What a teacher, or none, says of the trained tokens of one sample."""

    def __init__(self, scores: TeacherScores | None, mask: BoolArray) -> None:
        self._scores, self._mask = scores, mask
        self._top = None if scores is None else scores.top_logprobs
        self.width = None if self._top is None else self._top.shape[1]
        self.has_tail = scores is None or scores.tail is not None

    def logprobs(self) -> NDArray[np.float32]:
        return self._filled(None if self._scores is None else self._scores.logprobs, 0.0)

    def tail(self) -> NDArray[np.float32]:
        return self._filled(None if self._scores is None else self._scores.tail, 0.0)

    def top_logprobs(self, width: int) -> NDArray[np.float32]:
        found = np.full((int(self._mask.sum()), width), -np.inf, np.float32)
        if self._top is not None:
            found[:, : self.width] = self._top[self._mask]
        return found

    def top_ids(self, width: int) -> NDArray[np.int64]:
        found = np.full((int(self._mask.sum()), width), NO_TOKEN, np.int64)
        if self._scores is not None and self._scores.top_ids is not None:
            found[:, : self.width] = self._scores.top_ids[self._mask]
        return found

    def _filled(self, values: FloatArray | None, default: float) -> NDArray[np.float32]:
        if values is None:
            return np.full(int(self._mask.sum()), default, np.float32)
        return values[self._mask].astype(np.float32)
