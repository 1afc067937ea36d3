"""What the learner answers, and how its numbers are joined over micro-batches and ranks."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Reduce(enum.StrEnum):
    """How values of one metric from several micro-batches, ranks or groups become one."""

    MEAN = "mean"
    """Weighted by `weight`."""
    SUM = "sum"
    MAX = "max"
    MIN = "min"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number and the rule that joins it with its like."""

    value: float
    reduce: Reduce = Reduce.MEAN
    weight: float = 1.0
    """Only for MEAN: how much this value counts (tokens, samples)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the learner answers after one optimizer step."""

    version: int
    """Weight version after the step: the step number. A skipped step has a version too, with the same weights."""
    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False
    """True when gradients were not finite and the weights were left as they were."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the learner answers about held-out examples; the weights stay as they are."""

    loss: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seconds: float = 0.0
