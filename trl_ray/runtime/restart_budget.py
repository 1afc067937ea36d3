"""How often an actor may be restarted, and how long before each restart.

lost --take(progress)--> seconds to wait first, or None: used up          progress: finished optimizer steps
used  1   2   3   4   5   6   ...     every `STEPS_PER_RESTART` finished steps give one back
wait  0   1   2   4   8  16   at most LONGEST_WAIT_S
"""

from __future__ import annotations

from dataclasses import dataclass

STEPS_PER_RESTART = 5
"""Finished optimizer steps that give one restart back, so that a long run does not die of rare faults."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0


@dataclass(slots=True, kw_only=True)
class RestartBudget:
    """The restarts of one actor; mutable.

    Progress alone gives restarts back, not time: an actor that is lost again and again before a step is finished
    uses its budget up, however long that takes.
    """

    allowed: int
    """Restarts without any progress."""
    used: int = 0
    """Restarts that count at `counted_at`."""
    counted_at: int = 0
    """Finished steps when restarts were given back last."""

    def take(self, steps: int) -> float | None:
        """Use one.

        Args:
            steps: finished optimizer steps.

        Returns:
            Seconds to wait before the restart; None when there is none left.
        """
        if not self.has_one(steps):
            return None
        self.used += 1
        return 0.0 if self.used == 1 else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self.used - 2))

    def has_one(self, steps: int) -> bool:
        """Whether one is left after so many finished steps."""
        self._give_back(steps)
        return self.used < self.allowed

    def _give_back(self, steps: int) -> None:
        back = max(0, steps - self.counted_at) // STEPS_PER_RESTART
        self.used = max(0, self.used - back)
        # What is left over counts towards the next one, unless there is nothing to give back.
        self.counted_at = steps if self.used == 0 else self.counted_at + back * STEPS_PER_RESTART


@dataclass(slots=True, kw_only=True)
class CheckpointBudget:
    """The restarts of a learner, each from the newest checkpoint; mutable.

    A newer checkpoint than at the last restart gives all of them back.
    """

    allowed: int
    """Restarts from one checkpoint."""
    used: int = 0
    step: int = 0
    """Of the checkpoint that was gone back to last."""

    def take(self, step: int) -> bool:
        """Use one; tell whether there was one left.

        Args:
            step: of the newest checkpoint; 0 without any.
        """
        self.used = 1 if step > self.step else self.used + 1
        self.step = step
        return self.used <= self.allowed
