"""The time of day by a clock that cannot jump: what is measured with it has lasted as long as it says.

A machine's clock is set by hand, by a time server, after a suspension; a duration taken from it may be negative, a
lease may end before it begins.
"""

from __future__ import annotations

import time

_AHEAD = time.time() - time.monotonic()


def steady_time() -> float:
    """Seconds since the epoch, as the machine's clock stood when this process began, and as many as went by since."""
    return time.monotonic() + _AHEAD
