"""Ends a run in which groups are given up and nothing else happens any more.

events of the queue: GROUP_DROPPED {reason, in_a_row or since_step} --count--> RewardError, TeacherError, StallError
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.errors import EngineError, RewardError, RunError, StallError, TeacherError
from trl_ray.types import DropReason, Event, EventKind

_REFUSED_IN_A_ROW = 20
_MANY = 100
_BOUNDED_ELSEWHERE = frozenset(
    {DropReason.ZERO_VARIANCE, DropReason.TRUNCATED, DropReason.END_OF_RUN, DropReason.NUMERICS, DropReason.BAD_ROW}
)
"""The first two by `max_resampled_groups`; the others follow a step, or are no groups."""


class FailuresInARow:
    """How many groups may be given up; the queue counts groups, not attempts, and begins anew with each that is ready.

    Args:
        config: of the run; says how many may be.
    """

    def __init__(self, config: RolloutRunConfig) -> None:
        patience = min((source.options.max_failures_in_a_row for source in config.teacher_sources), default=None)
        self._in_a_row: dict[str, tuple[int | None, type[RunError], str, str]] = {
            DropReason.REWARD_FAILED: (
                config.reward.max_failures_in_a_row,
                RewardError,
                "lose their rewards (reward.max_failures_in_a_row)",
                "Mend the reward function, then resume.",
            ),
            DropReason.TEACHER_FAILED: (
                patience,
                TeacherError,
                "lose their teacher (max_failures_in_a_row)",
                "Bring the teacher back, then resume.",
            ),
            DropReason.REFUSED: (
                _REFUSED_IN_A_ROW,
                EngineError,
                "be refused",
                "Mend the prompts or the options of sampling, then resume.",
            ),
        }
        self._resampled, self._groups = config.resampled_limit, config.groups_per_step
        self._since_step: Counter[str] = Counter()

    def next_step(self) -> None:
        """The groups of a step are there: begin to count what is dropped anew."""
        self._since_step.clear()

    def count(self, events: Sequence[Event]) -> None:
        """Take what the actors have told.

        Raises:
            RewardError, TeacherError, EngineError: too many groups in a row were given up for one reason, or one that
                would be the same for every group.
            StallError: of too many groups of one step there is nothing to learn, or too many were dropped otherwise.
        """
        for event in events:
            if event.kind is EventKind.REWARD_FAILED and event.detail.get("is_final"):
                raise RewardError(f"{event.detail.get('detail')} No group can be scored: mend it, then resume.")
            if event.kind is not EventKind.GROUP_DROPPED:
                continue
            reason, because = str(event.detail.get("reason")), event.detail.get("because")
            allowed, error, what, remedy = self._in_a_row.get(reason, (None, RunError, "", ""))
            number = int(event.detail.get("in_a_row", 0))
            if allowed is not None and number >= allowed:
                raise error(
                    f"fewer than {allowed} groups in a row may {what}, but {number} did without one that was ready. "
                    f"The last one: {because}. {remedy}"
                )
            self._check_resampled(reason, int(event.detail.get("since_step", 0)))
            self._check_dropped(reason, because, allowed or 0)

    def _check_dropped(self, reason: str, because: object, in_a_row: int) -> None:
        """No reason drops without end, also where some groups get ready between the others."""
        if reason in _BOUNDED_ELSEWHERE:
            return
        self._since_step[reason] += 1
        number, bound = self._since_step[reason], max(_MANY, 10 * self._groups, in_a_row)
        if number > bound:
            raise StallError(
                f"at most {bound} groups may be dropped for one reason between two steps of {self._groups} groups, but "
                f"{number} were, as {reason}. The last one: {because}. Mend that, then resume."
            )

    def _check_resampled(self, reason: str, number: int) -> None:
        if self._resampled is None or number <= self._resampled:
            return
        remedies = {
            DropReason.ZERO_VARIANCE: "all their rewards being equal: look at the reward functions (a reward that is "
            "always the same teaches nothing) and at how hard the prompts are, or set zero_variance_groups=keep",
            DropReason.TRUNCATED: "all their completions being cut off: raise max_completion_length, or set "
            "mask_truncated_completions=false",
        }
        raise StallError(
            f"a step of {self._groups} groups may replace at most {self._resampled} of which there is nothing to learn "
            f"(max_resampled_groups), but {number} were dropped since the last one, the last as {reason}, "
            f"{remedies.get(DropReason(reason), '')}. Then resume."
        )
