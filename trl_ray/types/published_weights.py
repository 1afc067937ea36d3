"""Weights on their way from the learner to engines, and the proof that they are used.

TensorEntry x parameters + buffer = WeightPayload, named by its WeightVersion -> PullReport
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trl_ray.types.arrays import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one parameter lies in a weight buffer."""

    name: str
    """The Hugging Face parameter name."""
    shape: tuple[int, ...]
    dtype: str
    """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    offset: int
    """Bytes from the start of the buffer."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """The identity of one published set of weights."""

    version: int
    checksum: str
    """Hex digest over names, shapes, dtypes and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightPayload:
    """One published set of weights: a flat buffer and where each parameter lies in it."""

    identity: WeightVersion
    manifest: tuple[TensorEntry, ...]
    buffer: NDArray[np.uint8]
    """[bytes] read-only once published."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredSequence:
    """A token sequence and the learner's log-probs of it."""

    token_ids: IntArray
    """[T]"""
    logprobs: FloatArray
    """[T-1] natural log-prob of token t+1 given tokens ..t, temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGap:
    """How far the learner in training mode, in a packed row, is from itself in evaluation mode, one row a sequence."""

    mean: float
    """Mean |difference| of log-probs in nats, at the temperature of the run."""
    between_passes: float
    """The same between two passes in training mode: above 0 where dropout or noise is on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightCheck:
    """A fixed token sequence and the learner's log-probs of it under one version."""

    token_ids: IntArray
    """[T]"""
    logprobs: FloatArray
    """[T-1] natural log-prob of token t+1 given tokens ..t, temperature 1."""
    version: int
    further: tuple[ScoredSequence, ...] = ()
    """Shorter and longer ones, to be compared in the same way."""
    training: TrainingGap | None = None
    """None where the learner was not asked."""
    initial_logprobs: FloatArray | None = None
    """[T-1] of the weights that the run began with, which a fresh engine has, too; None: not known."""
    baseline: float | None = None
    """Mean |difference| in nats that engines showed after they had pulled version 0; None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingGap:
    """How far what an engine said of tokens as it sampled them is from what it says of them afterwards, with the same
    weights; x is the later log-prob less the one that came with the token, in nats."""

    version: int
    """Of the weights."""
    tokens: int
    abs_diff: float
    """Mean |x|."""
    diff: float
    """Mean x."""
    doubt: float
    """Mean of max(1 - p, 0.05), p the probability that the sampler gave to the token; what |x| is measured by."""

    @property
    def level(self) -> float:
        """Nats per unit of doubt, as `config.runs.agreement_rule` limits it."""
        return self.abs_diff / self.doubt


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a worker really runs after a weight pull."""

    version: int
    checksum: str
    seconds: float
    weight_check_mean: float | None = None
    """Mean |learner - engine| log-prob over the weight-check tokens, in nats; None when no weight check came along."""
    weight_check_max: float | None = None
    own_files_mean: float | None = None
    """The same before the first pull, both sides computing with what the run began with; None: not known."""
    sampling: SamplingGap | None = None
    """Of tokens that were sampled before the pull; None where none were compared."""
    disagreement: str | None = None
    """What is wrong where that does not stop the run; None: nothing."""
