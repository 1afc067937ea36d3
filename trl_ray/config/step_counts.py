"""Numbers of optimizer steps that may be given as a fraction of the run, as transformers takes them.

warmup_steps: 20 --> 20        warmup_steps: 0.1 --steps_of(total 200)--> 20
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator


def _as_count(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a number of steps, or a fraction of the run's steps below 1, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise ValueError(
            f"must be a whole number of steps, at least 0, or a fraction of the run's steps below 1, got {value!r}."
        )
    return int(value) if value == int(value) else value


def _above_zero(value: Any) -> Any:
    count = _as_count(value)
    if count == 0:
        raise ValueError("must be at least 1 step, or a fraction of the run's steps above 0, got 0.")
    return count


StepCount = Annotated[int | float, BeforeValidator(_as_count)]
"""A whole number of steps, or a fraction of the run's below 1."""
PositiveStepCount = Annotated[int | float, BeforeValidator(_above_zero)]
"""The same, above 0."""


def steps_of(count: int | float, total_steps: int) -> int:
    """The number of steps; a fraction of the run is rounded up.

    Args:
        count: a whole number of steps, or a fraction below 1.
        total_steps: optimizer steps of the run.
    """
    return math.ceil(count * total_steps) if 0 < count < 1 else int(count)
