"""What is waited before something that failed is tried again, and what is left in the end; for tenacity.

attempt ─► first_s ─► attempt ─► 2 * first_s ─► attempt ─► 4 * first_s ─► ...        never more than 10 s
"""

from __future__ import annotations

from typing import Any

from tenacity import RetryCallState, wait_exponential

_MAX_DELAY_S = 10.0


def doubling_delays(first_s: float) -> wait_exponential:
    """Seconds before the second attempt, doubled before each further one, up to 10 s."""
    return wait_exponential(multiplier=first_s, max=_MAX_DELAY_S)


def last_result(state: RetryCallState) -> Any:
    """What the last attempt answered, where a failure is an answer and no exception."""
    assert state.outcome is not None, "there was an attempt"
    return state.outcome.result()
