"""Ray's failures as the package's own, by what can be done about each."""

from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from trl_ray.errors import ActorLostError, AnswerLostError, RunError, StartError
from trl_ray.runtime.cluster import NODE_LOSS_SETTINGS, RayHandle
from trl_ray.runtime.runtime import Role


def translated(error):
    handle = RayHandle("rollout-0", Role.ROLLOUT, None, is_async=True)
    return handle._translate(error, "pull")


def test_a_death_is_a_loss_whatever_ray_calls_it():
    for error in (ActorDiedError(), ActorUnavailableError("it restarts", None)):
        found = translated(error)
        assert type(found) is ActorLostError
        assert str(found).startswith("rollout-0 died during pull")


def test_an_object_that_went_with_its_node_is_no_death_of_who_asked_for_it():
    lost = ObjectLostError("00ff", None, "here")
    for error in (lost, RayTaskError("pull", "Traceback", lost)):
        found = translated(error)
        assert type(found) is AnswerLostError and isinstance(found, ActorLostError)


def test_a_constructor_that_raised_is_told_apart():
    cause = RayTaskError(
        "__init__", "Traceback\nValueError: no such model", ValueError("no such model"), actor_id="00ff"
    )
    found = translated(ActorDiedError(cause))
    assert type(found) is StartError
    assert "rollout-0 could not start" in str(found) and "no such model" in str(found)


def test_an_error_of_the_method_itself_is_no_loss():
    cause = RayTaskError("pull", "Traceback", ValueError("damaged"))
    found = translated(cause)
    assert type(found) is RunError and "rollout-0.pull raised ValueError: damaged" in str(found)


def test_a_lost_node_is_noticed_within_seconds_where_ray_is_started_here():
    settings = NODE_LOSS_SETTINGS
    longest_ms = settings["health_check_failure_threshold"] * (
        settings["health_check_period_ms"] + settings["health_check_timeout_ms"]
    )
    assert longest_ms == 4500
    assert settings["health_check_initial_delay_ms"] == 0
