"""Admission slots: how many groups may be on their way at once, which is what bounds their age.

admit --charge--> [ slot ] --trained or skipped--> [ still charged ] --release, after the weight pull--> free
                     `--------------------- drop ------------------------------------------------------> free
"""

from __future__ import annotations

from collections.abc import Iterable

from trl_ray.config.slot_bounds import SlotBounds


class AdmissionSlots:
    """The charged slots by group id.

        slots = AdmissionSlots(SlotBounds(groups_per_step=8, max_staleness=2))     # B = 24
        slots.charge(range(slots.free))
        slots.discharge([3])                                            # a drop, or a release after the pull

    NOTE: at most B slots are charged, save after `reset`: a restore may bring back more groups than B. Then
    nothing is admitted until their number falls, and only the oldest B (`horizon`) may be generated, so that the
    proof of `SlotBounds.max_age_at_use` still holds: it counts the older groups, and of these there are at most B-1.
    """

    def __init__(self, bounds: SlotBounds) -> None:
        """Start with no slot charged and the limit at B."""
        self._floor = bounds.groups_per_step
        self.capacity = bounds.capacity
        self._limit = self.capacity
        self._charged: set[int] = set()

    @property
    def limit(self) -> int:
        """How many slots admission may fill now; between P and B."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        if not self._floor <= value <= self.capacity:
            raise ValueError(f"The slot limit must lie in [{self._floor}, {self.capacity}], got {value}.")
        self._limit = value

    @property
    def in_use(self) -> int:
        """Charged slots."""
        return len(self._charged)

    @property
    def free(self) -> int:
        """How many groups may be admitted now."""
        return max(0, self._limit - self.in_use)

    @property
    def horizon(self) -> int | None:
        """The youngest group that may be generated; None when every charged group may."""
        if self.in_use <= self.capacity:
            return None
        return sorted(self._charged)[self.capacity - 1]

    @property
    def charged(self) -> frozenset[int]:
        """The groups that hold a slot."""
        return frozenset(self._charged)

    def charge(self, group_ids: Iterable[int]) -> None:
        """Charge one slot per group.

        The check is against B, not against the limit: the limit may have moved since the caller asked.
        """
        new = set(group_ids)
        assert not new & self._charged, f"A group is charged once, yet {sorted(new & self._charged)} came again."
        assert self.in_use + len(new) <= self.capacity, (
            f"At most {self.capacity} slots may be charged; {self.in_use} are, and {len(new)} more were asked for. "
            "Wait for free slots before admitting."
        )
        self._charged |= new

    def discharge(self, group_ids: Iterable[int]) -> None:
        """Free the slots of these groups; a group without a slot is passed over."""
        self._charged.difference_update(group_ids)

    def reset(self, group_ids: Iterable[int]) -> None:
        """Make exactly these groups hold slots, even beyond B: for a restore only."""
        self._charged = set(group_ids)
