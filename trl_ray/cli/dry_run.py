"""What a run would do: the resolved configuration, its actors with their resources, and the memory it expects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ray.config.load import dump_yaml
from trl_ray.pipelines.run.pipeline import Pipeline
from trl_ray.pipelines.run.planning import GIB
from trl_ray.runtime.remote import ActorPlan
from trl_ray.runtime.runtime import Role


def describe_run(pipeline: Pipeline[Any, Any]) -> str:
    """The whole page.

    Raises:
        InputError: whatever a real run would refuse.
    """
    plan = pipeline.prepare()
    actors, memory = plan.actors(), plan.expected_memory()
    lines = ["# resolved configuration", dump_yaml(plan.config).rstrip(), "", "# plan"]
    lines += [f"{key}: {value}" for key, value in plan.describe().items()]
    lines += [f"note: {sentence}" for sentence in plan.notes]
    width = max(10, *(len(key) + 1 for key in actors))
    lines += ["", "# actors", f"{'role':<{width}}{'count':>6}{'CPUs':>7}{'GPUs':>7}{'GiB each':>10}  restarts"]
    lines += [_actor_line(actor, memory, width) for actor in actors.values()]
    lines += ["", f"memory expected in all: {sum(memory[key] * actors[key].count for key in actors) / GIB:.1f} GiB"]
    return "\n".join(lines)


def _actor_line(plan: ActorPlan, memory: Mapping[str, float], width: int) -> str:
    restarts = "by Ray" if plan.survives else "by the supervisor" if plan.role is Role.ROLLOUT else "from a checkpoint"
    gib = memory[plan.key] / GIB
    return f"{plan.key:<{width}}{plan.count:>6}{plan.num_cpus:>7g}{plan.num_gpus:>7g}{gib:>10.1f}  {restarts}"
