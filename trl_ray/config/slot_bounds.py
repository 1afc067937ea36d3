"""How many groups may be on their way at once, and what that says about their age: the one place with these formulas.

P groups make a step, S is `max_staleness`, W is `max_look_ahead`. A group holds a slot from its admission until the
weights of its step are pulled:

    (P, S, W) --> B = (S + 1) * P slots --> age at use <= (B + W - 2) // P      (S while W is 1)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotBounds:
    """The numbers a run's admission is bounded by.

    bounds = SlotBounds(groups_per_step=8, max_staleness=2)
    bounds.capacity, bounds.max_age_at_use                            # 24 slots, 2 optimizer steps
    """

    groups_per_step: int
    """P, at least 1."""
    max_staleness: int
    """S, at least 0: optimizer steps that generation may run ahead of training."""
    max_look_ahead: int = 1
    """W, at least 1: up to W-1 younger groups may overtake a straggler."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        for name, low in (("groups_per_step", 1), ("max_staleness", 0), ("max_look_ahead", 1)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}.")

    @property
    def capacity(self) -> int:
        """B = (S + 1) * P, the most slots ever charged at once."""
        return (self.max_staleness + 1) * self.groups_per_step

    @property
    def max_age_at_use(self) -> int:
        """The largest age at use, in weight versions: (B + W - 2) // P.

        Proof. Age at use is the learner's version when it starts step t, which is t-1, less the oldest version that
        sampled a token of the group g. Let r be the last released step when g was charged. Release follows the pull,
        so workers ran version r or younger from then on, and the age is at most t-1-r. Each of the steps r+1 .. t-1
        trained P groups, and none of these was released when g was charged. Those older than g held a slot at that
        moment, so there are at most B-1 of them. Those younger than g overtook it, and `max_look_ahead` allows W-1 of
        these in all. Hence (t-1-r) * P <= (B-1) + (W-1). A drop only removes a group from the count. A skipped step
        counts like a trained one: it makes a version (of the same weights), and its groups too hold their slots until
        its release.

        With W = 1 this is S exactly. Freeing slots when the step is trained, before the pull, breaks the second
        sentence and the bound with it.
        """
        return self.max_steps_before(self.capacity - 1)

    def max_steps_before(self, older: int) -> int:
        """Steps that may pass before the one that trains a group: so many older ones go first, W-1 may overtake."""
        return (older + self.max_look_ahead - 1) // self.groups_per_step
