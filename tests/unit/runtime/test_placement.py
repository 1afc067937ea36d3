"""How many rollout workers are given a place, by what the nodes that live have in all."""

import pytest

from trl_ray.config.sections import RewardConfig, RolloutConfig, RuntimeConfig
from trl_ray.errors import ConfigError, ResourceError
from trl_ray.runtime import placement
from trl_ray.runtime.placement import Places
from trl_ray.runtime.remote import plan_actors
from trl_ray.runtime.runtime import Role


@pytest.fixture
def cpus(monkeypatch):
    """Says how many CPUs the cluster has."""

    def have(amount):
        monkeypatch.setattr(placement, "resources", lambda query: {"CPU": amount})

    return have


class Group:
    """A placement group that becomes ready when it has no more bundles than there is room for."""

    def __init__(self, room):
        self.room, self.made, self.removed = room, [], []

    def make(self, bundles, strategy="PACK"):
        self.made.append(len(bundles))
        return self

    def wait(self, timeout_seconds):
        self.made[-1] = (self.made[-1], timeout_seconds)
        return self.made[-1][0] <= self.room


@pytest.fixture
def group(monkeypatch):
    """A placement group with room for so many bundles."""

    def make(room):
        made = Group(room)
        monkeypatch.setattr(placement, "placement_group", made.make)
        monkeypatch.setattr(placement, "remove_placement_group", made.removed.append)
        return made

    return make


def places(**rollout):
    runtime = RuntimeConfig(placement_timeout_s=60.0)
    plans = plan_actors(runtime=runtime, rollout=RolloutConfig(**rollout), reward=RewardConfig())
    return Places(plans, runtime)


def test_a_run_waits_for_all_its_workers_unless_it_may_begin_with_fewer(cpus, group):
    cpus(8.0)
    made = group(room=4)
    places(num_workers=3).reserve()
    assert made.made == [(4, 60.0)]  # the learner and three workers


def test_a_run_that_may_begin_with_fewer_workers_takes_as_many_as_find_room(cpus, group):
    cpus(4.0)  # no more than three workers beside the learner, and one CPU is somebody else's
    made = group(room=3)
    its = places(num_workers=6, min_workers=1)
    its.reserve()
    assert made.made == [(4, 5.0), (3, 5.0)]
    assert its._counts[Role.ROLLOUT] == 2


def test_the_fewest_workers_are_waited_for_as_long_as_a_run_waits_for_its_places(cpus, group):
    cpus(3.0)
    made = group(room=1)
    with pytest.raises(ResourceError, match=r"must become free within 60 s"):
        places(num_workers=2, min_workers=1).reserve()
    assert made.made == [(3, 5.0), (2, 60.0)]
    assert len(made.removed) == 2


def test_a_cluster_that_cannot_hold_the_fewest_workers_is_told_of_at_once(cpus, group):
    cpus(2.0)
    made = group(room=9)
    with pytest.raises(ResourceError, match=r"rollout 2 x 1"):
        places(num_workers=4, min_workers=2).reserve()
    assert made.made == []


@pytest.mark.parametrize(
    "counts", [{"num_workers": 2, "min_workers": 3}, {"num_workers": 2, "max_workers": 1}], ids=["above", "below"]
)
def test_the_number_of_workers_lies_between_the_fewest_and_the_most(counts):
    with pytest.raises(ConfigError, match=r"num_workers must be between min_workers and max_workers, got 2"):
        RolloutConfig(**counts)


def test_without_bounds_a_run_has_as_many_workers_as_it_says():
    plain, bounded = RolloutConfig(num_workers=3), RolloutConfig(num_workers=3, min_workers=1, max_workers=5)
    assert (plain.fewest_workers, plain.most_workers) == (3, 3)
    assert (bounded.fewest_workers, bounded.most_workers) == (1, 5)
