"""The slot controller over sequences made by hand."""

from trl_ray.buffer.controller import SlotController


def observe(controller: SlotController, steps: int, *, wait_s: float = 0.0, ready: int = 3) -> list[int]:
    return [controller.observe(wait_s=wait_s, step_s=1.0, ready=ready) for _ in range(steps)]


def test_it_starts_with_all_slots_and_shrinks_after_four_steps_with_work_to_spare() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    assert observe(controller, 5) == [24, 24, 24, 22, 22]


def test_it_never_goes_below_one_step_of_groups() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    assert observe(controller, 100)[-1] == 8


def test_it_grows_at_once_when_the_learner_waits_and_never_beyond_capacity() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    observe(controller, 8)
    assert controller.limit == 20
    assert observe(controller, 3, wait_s=0.5) == [24, 24, 24]


def test_after_a_shrink_too_far_it_waits_twice_as_long_before_the_next() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    observe(controller, 4)
    observe(controller, 1, wait_s=0.5)
    assert observe(controller, 8) == [24] * 7 + [22]


def test_a_step_between_hungry_and_sated_changes_nothing_and_starts_the_count_anew() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    observe(controller, 3)
    assert observe(controller, 1, wait_s=0.03) == [24]
    assert observe(controller, 3) == [24] * 3


def test_it_does_not_shrink_while_nothing_is_left_waiting_for_the_learner() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    assert observe(controller, 20, ready=0) == [24] * 20


def test_without_staleness_there_is_one_limit() -> None:
    controller = SlotController(groups_per_step=8, capacity=8)
    assert set(observe(controller, 20) + observe(controller, 5, wait_s=0.9)) == {8}


def test_it_settles_instead_of_swinging() -> None:
    """The learner waits whenever fewer than 18 slots are in use: in 400 steps it should wait in few of them."""
    controller = SlotController(groups_per_step=8, capacity=24)
    hungry = 0
    for _ in range(400):
        starving = controller.limit < 18
        hungry += starving
        controller.observe(wait_s=0.5 if starving else 0.0, step_s=1.0, ready=0 if starving else 2)
    assert hungry <= 6


def test_its_state_survives_and_is_brought_inside_new_bounds() -> None:
    controller = SlotController(groups_per_step=8, capacity=24)
    observe(controller, 6)
    again = SlotController(groups_per_step=8, capacity=24)
    again.load_state(controller.to_state())
    assert observe(again, 6) == observe(controller, 6)
    smaller = SlotController(groups_per_step=4, capacity=8)
    smaller.load_state(controller.to_state())
    assert smaller.limit == 8
