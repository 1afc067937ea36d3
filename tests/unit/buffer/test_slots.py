"""Slots by hand."""

import pytest

from trl_ray.buffer.slots import AdmissionSlots
from trl_ray.config.slot_bounds import SlotBounds


def test_slots_are_charged_and_freed() -> None:
    slots = AdmissionSlots(SlotBounds(groups_per_step=2, max_staleness=1))
    slots.charge([0, 1, 2])
    assert (slots.in_use, slots.free) == (3, 1)
    slots.discharge([1, 7])
    assert slots.charged == {0, 2}


def test_more_groups_than_slots_cannot_be_admitted() -> None:
    slots = AdmissionSlots(SlotBounds(groups_per_step=2, max_staleness=1))
    slots.charge([0, 1, 2])
    with pytest.raises(AssertionError, match="At most 4 slots"):
        slots.charge([3, 4])
    with pytest.raises(AssertionError, match="charged once"):
        slots.charge([2])


def test_the_limit_holds_admission_back_and_stays_within_its_bounds() -> None:
    slots = AdmissionSlots(SlotBounds(groups_per_step=2, max_staleness=2))
    slots.charge([0, 1, 2])
    slots.limit = 2
    assert slots.free == 0
    slots.limit = 4
    assert slots.free == 1
    for wrong in (1, 7):
        with pytest.raises(ValueError, match=r"\[2, 6\]"):
            slots.limit = wrong


def test_after_a_restore_beyond_capacity_only_the_oldest_groups_may_be_generated() -> None:
    slots = AdmissionSlots(SlotBounds(groups_per_step=1, max_staleness=1))
    assert slots.horizon is None
    slots.reset([4, 9, 6, 8])
    assert (slots.free, slots.horizon) == (0, 6)
    slots.discharge([4])
    assert slots.horizon == 8
    slots.discharge([6])
    assert slots.horizon is None
