"""Slots, ages and overtaking, by hand."""

import pytest

from trl_ray.config.slot_bounds import SlotBounds


@pytest.mark.parametrize(
    ("p", "s", "w", "slots", "age"),
    [
        (8, 2, 1, 24, 2),
        (8, 0, 1, 8, 0),
        (1, 3, 1, 4, 3),
        (4, 1, 2, 8, 2),
        (4, 1, 5, 8, 2),
        (4, 1, 6, 8, 3),
        (1, 0, 2, 1, 1),
    ],
)
def test_slots_and_the_oldest_age_by_hand(p: int, s: int, w: int, slots: int, age: int) -> None:
    bounds = SlotBounds(groups_per_step=p, max_staleness=s, max_look_ahead=w)
    assert (bounds.capacity, bounds.max_age_at_use) == (slots, age)


def test_without_overtaking_the_oldest_age_is_max_staleness() -> None:
    bounds = [SlotBounds(groups_per_step=p, max_staleness=s) for p in range(1, 9) for s in range(5)]
    assert all(each.max_age_at_use == each.max_staleness for each in bounds)


@pytest.mark.parametrize(("w", "steps"), [(1, [0, 0, 0, 1, 1, 1, 2]), (3, [0, 1, 1, 1, 2, 2, 2])])
def test_older_groups_and_those_that_overtake_fill_the_steps_before(w: int, steps: list[int]) -> None:
    bounds = SlotBounds(groups_per_step=3, max_staleness=1, max_look_ahead=w)
    assert [bounds.max_steps_before(older) for older in range(7)] == steps


@pytest.mark.parametrize("wrong", [{"groups_per_step": 0}, {"max_staleness": -1}, {"max_look_ahead": 0}])
def test_bounds_of_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SlotBounds(**{"groups_per_step": 1, "max_staleness": 1, **wrong})
