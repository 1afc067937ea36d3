"""How long a step has come no nearer: groups that are dropped and replaced, or leased again and again, are no progress.

balance of the ledger --> per state, how many groups have come at least so far --more than ever?--> the clock restarts
"""

from __future__ import annotations

from collections.abc import Mapping

_ORDER = ("issued", "leased", "generated", "scored", "ready", "taken")
"""States of `trl_ray.buffer.entry.State`, the nearest to training last."""


class StallClock:
    """Of one step that is waited for.

    Args:
        now: seconds of the clock that is asked.
    """

    def __init__(self, now: float) -> None:
        self._moved = now
        self._most: dict[str, int] = {}
        self._restarts: int | None = None

    def still_for(self, live: Mapping[str, int], *, restarts: int, now: float) -> float:
        """Seconds since the step has come nearer.

        Args:
            live: groups by state.
            restarts: of actors so far; who comes back is given time once more, and may not come back for ever.
            now: of the same clock.
        """
        is_nearer = self._restarts is not None and restarts > self._restarts
        self._restarts = restarts
        so_far = 0
        for state in reversed(_ORDER):
            so_far += live.get(state, 0)
            is_nearer |= so_far > self._most.get(state, 0)
            self._most[state] = max(so_far, self._most.get(state, 0))
        if is_nearer:
            self._moved = now
        return now - self._moved
