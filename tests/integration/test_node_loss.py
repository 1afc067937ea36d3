"""Nodes that are lost under a run: it goes on with who lives, tells so, and takes a new node when there is one."""

import json
import os
import subprocess
from itertools import pairwise

import pytest

from node_scenarios import PYTHON, SCENARIOS
from runs import ROOT, assert_balanced, events, lines
from tiny_models import build_tiny_model
from warm_processes import warm_python

pytestmark = [pytest.mark.integration, pytest.mark.long]


@pytest.fixture(scope="module")
def played(ray_tmpdir, tmp_path_factory):
    """The folder of each scenario by name, and what it told; all of them share one cluster in one process."""
    folder = tmp_path_factory.mktemp("nodes")
    model = build_tiny_model(folder / "model", family="qwen2", tied=True, seed=0)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [warm_python(), str(ROOT / "tests" / "node_scenarios.py"), model, str(folder), *SCENARIOS],
        env={**os.environ, "PYTHONPATH": path, PYTHON: warm_python()},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {name: (folder / name / "run", json.loads((folder / name / "told.json").read_text())) for name in SCENARIOS}


def longest_gap(run, *, since):
    """Seconds between two steps of which the later one came after a moment."""
    times = [line["time"] for line in lines(run / "metrics.jsonl")]
    return max(later - sooner for sooner, later in pairwise(times) if later > since)


@pytest.mark.parametrize("name", ["rollout node killed", "rollout node stopped"])
def test_a_lost_rollout_node_leaves_the_run_to_the_other_worker(played, name):
    run, told = played[name]
    assert told["steps"] == 40
    assert longest_gap(run, since=told["struck"]) < 10
    # A successor may have been placed on the dead node before Ray knew of its death.
    [lost] = {event["actor"].partition("+")[0] for event in events(run, "actor_lost")}
    assert lost in ("rollout-0", "rollout-1")
    waited = [event["detail"]["on"] for event in events(run, "waiting")]
    assert waited and all(on.startswith(f"a node with room for {lost}") for on in waited)
    assert_balanced(run, trained=160)


def test_places_lie_apart_or_together_as_the_run_asks(played):
    _, told = played["places"]
    assert (told["SPREAD"], told["PACK"]) == (3, 2)


def test_a_learner_whose_node_is_lost_goes_on_elsewhere_with_fewer_workers_until_a_node_is_added(played):
    run, told = played["learner node killed"]
    assert told["steps"] == 120
    assert [event["actor"] for event in events(run, "actor_lost")].count("learner") == 1
    [resumed] = events(run, "run_resumed")
    after = [event["actor"] for event in events(run, "actor_started") if event["time"] > resumed["time"]]
    assert after.index("rollout-1") > after.index("rollout-0")
    # It began with one worker, and the one that had no room came when the node did.
    assert "a node with room for rollout-1" in [event["detail"]["on"] for event in events(run, "waiting")]
    assert_balanced(run, trained=480)
