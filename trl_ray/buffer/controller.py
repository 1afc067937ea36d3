"""The slot controller: fewer groups on their way while the learner never waits, more while it idles.

    observe(wait_s, step_s, ready) once per step --> limit in [P, B]

Fewer slots make younger samples; too few make the learner wait. The controller therefore grows at the first
sign of hunger, shrinks only after a run of steps with work to spare, and takes longer to try again each time a
smaller limit has proved too small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HUNGRY = 0.05
"""Waiting longer than this share of a step means that the learner idles."""
_SATED = 0.01
"""Waiting less than this share of a step counts as not waiting; between the two nothing changes."""
_PATIENCE = 4
"""Sated steps in a row before the first shrink."""
_MAX_PATIENCE = 64


class SlotController:
    """Moves the slot limit between P and B from what each step saw.

    controller = SlotController(groups_per_step=8, capacity=24)
    slots.limit = controller.observe(wait_s=0.0, step_s=2.0, ready=9)
    """

    def __init__(self, *, groups_per_step: int, capacity: int) -> None:
        """Start at B: nothing is known yet, and an idle learner costs more than an older sample."""
        self._floor = groups_per_step
        self._capacity = capacity
        self._stride = max(1, groups_per_step // 4)
        self.limit = capacity
        self._sated_steps = 0
        self._patience = _PATIENCE

    def observe(self, *, wait_s: float, step_s: float, ready: int) -> int:
        """Take in one step and answer the new limit.

        Args:
            wait_s: seconds the learner waited for its batch.
            step_s: seconds the whole step took, the wait included.
            ready: groups that were left waiting for the learner.
        """
        share = wait_s / step_s if step_s > 0 else 0.0
        if share > _HUNGRY:
            self._grow()
        elif share <= _SATED and ready > 0:
            self._maybe_shrink()
        else:
            self._sated_steps = 0
        return self.limit

    def _grow(self) -> None:
        self._sated_steps = 0
        if self.limit == self._capacity:
            return
        # Hunger below B means that the last shrink went too far: be slower to try the same again.
        self._patience = min(_MAX_PATIENCE, 2 * self._patience)
        self.limit = min(self._capacity, self.limit + 2 * self._stride)

    def _maybe_shrink(self) -> None:
        self._sated_steps += 1
        if self._sated_steps < self._patience:
            return
        self._sated_steps = 0
        self.limit = max(self._floor, self.limit - self._stride)

    def to_state(self) -> dict[str, Any]:
        """What must survive a restart, as JSON values."""
        return {"limit": self.limit, "sated_steps": self._sated_steps, "patience": self._patience}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `to_state`; a limit outside [P, B] (the rules changed) is brought back inside."""
        self.limit = min(self._capacity, max(self._floor, int(state["limit"])))
        self._sated_steps = int(state["sated_steps"])
        self._patience = int(state["patience"])
