"""Runs on a cluster of several nodes, some of which are lost: a process of its own, as Ray has one cluster a process.

python node_scenarios.py MODEL FOLDER NAME... --> FOLDER/NAME/run, and FOLDER/NAME/told.json with what else is known

All scenarios share one cluster. Nodes are added from the main thread, so runs train in another one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from node_cluster import NodeCluster
from runs import PROMPTS, Disturbance, async_grpo, events, lines, merge
from trl_ray.config.sections import RolloutConfig, RuntimeConfig
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.runtime.cluster import RayRuntime
from trl_ray.runtime.remote import plan_actors

PYTHON = "NODE_SCENARIOS_PYTHON"
"""Names the variable with the executable of Ray's workers."""
LEARNER = 0
"""Its place in the group of all; those of rollout workers follow."""
RAY = {"kind": "ray", "health_interval_s": 0.3, "health_deadline_s": 6.0, "learner_num_cpus": 2.0}


def config_of(model: str, run: Path, **changes: Any) -> Any:
    """A run whose learner takes a whole node of two CPUs."""
    base = {"max_steps": 40, "max_staleness": 2, "runtime": RAY, "rollout": {"num_workers": 2}}
    return async_grpo(model, run, **merge(base, changes))


def until(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    """Wait for a state, generously."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def losing(cluster: NodeCluster, run: Path, victim: Callable[[], Any], number: signal.Signals) -> list[float]:
    """Send a signal to a node's raylet once the run has made three steps; when that was."""
    struck: list[float] = []

    def strike() -> None:
        struck.append(time.time())
        cluster.send(victim(), number)

    Disturbance(run, after_step=3, act=strike)
    return struck


def rollout_node(cluster: NodeCluster, model: str, run: Path, *, number: signal.Signals) -> dict[str, Any]:
    """A node with one of two workers is lost; the other worker is on the head."""
    nodes = cluster.keep([2, 1])
    struck = losing(cluster, run, lambda: nodes[1], number)
    config = config_of(model, run, runtime={"placement_strategy": "SPREAD"})
    output = AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train()
    return {"struck": struck[0], "steps": output.steps}


def learner_node(cluster: NodeCluster, model: str, run: Path) -> dict[str, Any]:
    """The learner's node is lost, and what is left has room for it and one worker; later a node is added."""
    cluster.keep([2, 2])
    config = config_of(model, run, save_steps=2, max_steps=120)
    struck = losing(cluster, run, lambda: cluster.node_of(LEARNER), signal.SIGKILL)
    with ThreadPoolExecutor(max_workers=1) as executor:
        training = executor.submit(AsyncGRPOPipeline(args=config, train_dataset=PROMPTS).train)
        until(lambda: training.done() or goes_on(run))
        cluster.add(cpus=1)
        output = training.result()
    return {"struck": struck[0], "steps": output.steps}


def goes_on(run: Path) -> bool:
    """Whether there was a step after the learner was lost."""
    resumed = events(run, "run_resumed")
    return bool(resumed) and any(line["time"] > resumed[0]["time"] for line in lines(run / "metrics.jsonl"))


def places(cluster: NodeCluster, model: str, run: Path) -> dict[str, Any]:
    """On how many of three nodes, of one, two and two CPUs, three places of one CPU lie."""
    del model, run
    cluster.keep([2, 2])
    told = {}
    for strategy in ("SPREAD", "PACK"):
        runtime = RuntimeConfig(placement_strategy=strategy)
        made = RayRuntime(runtime, plan_actors(runtime=runtime, rollout=RolloutConfig(num_workers=2), reward=None))
        told[strategy] = len(set(cluster.nodes_of_places()))
        asyncio.run(made.close())
    return told


SCENARIOS: dict[str, Callable[[NodeCluster, str, Path], dict[str, Any]]] = {
    "rollout node killed": partial(rollout_node, number=signal.SIGKILL),
    "rollout node stopped": partial(rollout_node, number=signal.SIGSTOP),
    "places": places,
    "learner node killed": learner_node,
}


def main(model: str, folder: str, *names: str) -> None:
    """Play scenarios, one after the other."""
    path = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parent)))
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": path}, "py_executable": os.environ[PYTHON]}
    cluster = NodeCluster(head_cpus=1, environment=environment)
    try:
        for name in names:
            begin, place = time.monotonic(), Path(folder, name)
            place.mkdir(parents=True)
            told = SCENARIOS[name](cluster, model, place / "run")
            (place / "told.json").write_text(json.dumps({**told, "seconds": time.monotonic() - begin}))
    finally:
        cluster.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
