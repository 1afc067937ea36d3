"""Restarts are given back by progress, never by time, and each waits longer than the one before."""

from trl_ray.runtime.restart_budget import STEPS_PER_RESTART, CheckpointBudget, RestartBudget


def test_an_actor_that_is_lost_again_and_again_without_a_finished_step_uses_its_restarts_up():
    budget = RestartBudget(allowed=8)
    assert [budget.take(7) for _ in range(10)] == [0, 1, 2, 4, 8, 16, 30, 30, None, None]


def test_finished_steps_give_restarts_back_one_each_time():
    assert STEPS_PER_RESTART == 5
    budget = RestartBudget(allowed=2)
    assert [budget.take(step) for step in (100, 101, 102)] == [0, 1, None]
    # Counted from step 100, where the first was taken: one is back at 105, the next at 110.
    assert [budget.take(step) for step in (104, 105, 106, 109, 110)] == [None, 1, None, None, 1]


def test_a_loss_every_ten_steps_never_ends_a_run():
    budget = RestartBudget(allowed=1)
    assert {budget.take(step) for step in range(0, 10_000, 10)} == {0}


def test_no_restart_is_saved_up_beyond_what_is_allowed():
    budget = RestartBudget(allowed=1)
    budget.take(1000)
    assert budget.take(1004) is None


def test_a_learner_is_restarted_so_often_from_one_checkpoint_and_again_from_a_newer_one():
    budget = CheckpointBudget(allowed=2)
    assert [budget.take(step) for step in (0, 0, 10, 10, 20, 30, 30, 30)] == [True] * 7 + [False]
    assert not CheckpointBudget(allowed=0).take(5)
