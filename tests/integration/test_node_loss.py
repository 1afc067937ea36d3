"""Nodes that are lost under a run: it goes on with who lives, tells so, and takes a new node when there is one."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from node_cluster import NodeCluster
from runs import PROMPTS, Disturbance, assert_balanced, async_grpo, events, lines, merge
from tiny_models import build_tiny_model
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from warm_processes import warm_python

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
RAY = {"kind": "ray", "health_interval_s": 0.3, "health_deadline_s": 6.0}


LEARNER = 0
"""Its place in the group of all; those of rollout workers follow."""


def until(condition, *, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module")
def cluster(ray_tmpdir):
    environment = {
        "env_vars": {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        "py_executable": warm_python(),
    }
    made = NodeCluster(head_cpus=1, environment=environment)
    yield made
    made.close()


def longest_gap(run, *, since):
    """Seconds between two steps of which the later one came after a moment."""
    times = [line["time"] for line in lines(run / "metrics.jsonl")]
    return max(later - sooner for sooner, later in pairwise(times) if later > since)


def goes_on(run):
    """Whether there was a step after the learner was lost."""
    resumed = events(run, "run_resumed")
    return bool(resumed) and any(line["time"] > resumed[0]["time"] for line in lines(run / "metrics.jsonl"))


def losing(cluster, run, victim, number):
    """Lose a node once the run has made three steps; (the thread that does it, when it did)."""
    struck = []

    def strike():
        struck.append(time.time())
        cluster.send(victim(), number)

    return Disturbance(run, after_step=3, act=strike), struck


def config_of(model, run, **changes):
    base = {"max_steps": 40, "max_staleness": 2, "runtime": RAY, "rollout": {"num_workers": 2}}
    return async_grpo(model, run, **merge(base, changes))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.long),
    ],
)
def test_a_lost_rollout_node_leaves_the_run_to_the_other_worker(cluster, model, tmp_path, number):
    run = tmp_path / "run"
    # The learner has the node of two CPUs; one worker is on the head, the other one on the second node.
    nodes = cluster.keep([2, 1])
    disturbance, struck = losing(cluster, run, lambda: nodes[1], number)
    config = config_of(model, run, runtime={"learner_num_cpus": 2.0, "placement_strategy": "SPREAD"})
    output = AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert disturbance.done and output.steps == 40
    assert longest_gap(run, since=struck[0]) < 10
    [lost] = [event["actor"] for event in events(run, "actor_lost")]
    assert lost in ("rollout-0", "rollout-1")
    waited = [event["detail"] for event in events(run, "waiting")]
    assert [detail["on"] for detail in waited] == [f"a node with room for {lost}"]
    assert_balanced(run, trained=160)


def test_a_learner_whose_node_is_lost_goes_on_elsewhere_with_fewer_workers_until_a_node_is_added(
    cluster, model, tmp_path
):
    run = tmp_path / "run"
    cluster.keep([2, 2])
    config = config_of(model, run, runtime={"learner_num_cpus": 2.0}, save_steps=2, max_steps=120)
    disturbance, _ = losing(cluster, run, lambda: cluster.node_of(LEARNER), signal.SIGKILL)
    with ThreadPoolExecutor(max_workers=1) as executor:
        training = executor.submit(AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train)
        until(lambda: training.done() or goes_on(run))
        cluster.add(cpus=1)
        output = training.result()
    assert disturbance.done and output.steps == 120
    assert [event["actor"] for event in events(run, "actor_lost")].count("learner") == 1
    [resumed] = events(run, "run_resumed")
    after = [event["actor"] for event in events(run, "actor_started") if event["time"] > resumed["time"]]
    assert after.index("rollout-1") > after.index("rollout-0")
    assert_balanced(run, trained=480)
