"""Counts groups that lose their rewards or their teachers, and ends a run in which nothing else happens any more.

events of the actors --count--> RewardError, TeacherError          a step that trained --forget--> 0
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.errors import RewardError, TeacherError
from trl_ray.types import Event, EventKind


class FailuresInARow:
    """How many groups were dropped for want of rewards or teachers since the last step that trained.

    Args:
        config: of the run; says how many may be.
    """

    def __init__(self, config: RolloutRunConfig) -> None:
        self._rewards: int | None = config.reward.max_failures_in_a_row
        self._teachers = min((source.options.max_failures_in_a_row for source in config.teacher_sources), default=None)
        self._counts = {EventKind.REWARD_FAILED: 0, EventKind.TEACHER_FAILED: 0}

    def forget(self) -> None:
        """A step was trained."""
        self._counts = dict.fromkeys(self._counts, 0)

    def count(self, events: Sequence[Event]) -> None:
        """Take what the actors have told.

        Raises:
            RewardError, TeacherError: it happened too often in a row.
        """
        what = "their rewards (reward.max_failures_in_a_row)"
        if (told := self._too_many(EventKind.REWARD_FAILED, events, self._rewards, what)) is not None:
            raise RewardError(f"{told} Mend the reward function, then resume.")
        what = "their teacher (max_failures_in_a_row)"
        if (told := self._too_many(EventKind.TEACHER_FAILED, events, self._teachers, what)) is not None:
            raise TeacherError(f"{told} Bring the teacher back, then resume.")

    def _too_many(self, kind: EventKind, events: Sequence[Event], allowed: int | None, what: str) -> str | None:
        """What must hold, and what was given, if it does not."""
        failed = [event for event in events if event.kind is kind]
        self._counts[kind] += len(failed)
        if not failed or allowed is None or self._counts[kind] < allowed:
            return None
        return (
            f"fewer than {allowed} groups in a row may lose {what}, but {self._counts[kind]} did without one trained "
            f"step. The last one: {dict(failed[-1].detail)}."
        )
