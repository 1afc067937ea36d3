"""What brings a step nearer, and what does not."""

from trl_ray.pipelines.rollouts.stall_clock import StallClock


def seconds(*looks, restarts=()):
    """How long each look, a minute after the one before, finds the step still."""
    clock, told = StallClock(0.0), []
    for number, live in enumerate(looks):
        back = sum(1 for at in restarts if at <= number)
        told.append(clock.still_for(live, restarts=back, now=60.0 * (number + 1)))
    return told


def test_a_step_comes_nearer_whenever_more_groups_than_ever_have_come_so_far():
    assert seconds({"issued": 4}, {"issued": 2, "leased": 2}, {"leased": 3, "generated": 1}, {"ready": 4}) == [0] * 4


def test_what_is_dropped_replaced_and_generated_again_moves_nothing():
    busy = [{"leased": 2, "generated": 1}, {"leased": 1, "generated": 2}]
    assert seconds(*busy, *busy, *busy) == [0, 0, 60, 120, 180, 240]


def test_one_more_group_that_is_ready_does():
    assert seconds({"leased": 4}, {"leased": 4}, {"leased": 3, "ready": 1}, {"leased": 3, "ready": 1}) == [0, 60, 0, 60]


def test_an_actor_that_comes_back_is_given_time_once_more():
    assert seconds(*[{"leased": 4}] * 4, restarts=[2]) == [0, 60, 0, 60]
