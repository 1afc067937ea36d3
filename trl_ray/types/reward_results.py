"""What reward functions answer, and how they fail."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class RewardErrorKind(enum.StrEnum):
    """How a reward function failed; each kind is told apart because each asks for another remedy."""

    NONE = "none"
    """It returned None for every completion of the group (nothing to score)."""
    NAN = "nan"
    """It returned NaN or infinity."""
    WRONG_LENGTH = "wrong_length"
    """It returned another number of rewards than completions."""
    WRONG_TYPE = "wrong_type"
    """It returned something that is not a list of numbers."""
    EXCEPTION = "exception"
    """It raised."""
    TIMEOUT = "timeout"
    """It did not return within its deadline and was killed."""
    CRASH = "crash"
    """Its process died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The score of one completion."""

    total: float | None
    """Weighted sum over the functions that answered; None when none did."""
    parts: Mapping[str, float | None]
    """Raw value by function name."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns the functions logged with `log_extra`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """A reward function failed for a whole group: infrastructure or user code, never a reward of 0."""

    function: str
    kind: RewardErrorKind
    detail: str
    is_final: bool = False
    """No group can ever be scored: the function cannot even be loaded where it is to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """What a reward worker answers: G rewards, or the failure that explains why there are none."""

    rewards: tuple[Reward, ...] = ()
    """[G] in the order of the completions; empty when `failure` is set."""
    failure: RewardFailure | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values the functions logged with `log_metric`, averaged over the group."""
