"""What a run would do: the resolved configuration, its actors with their resources, and the memory it expects."""

from __future__ import annotations

from trl_ray.config.load import dump_yaml
from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.models.load import count_parameters
from trl_ray.pipelines.policy_optimization import PolicyOptimizationPipeline
from trl_ray.pipelines.preparation import Preparation, describe
from trl_ray.runtime.remote import ActorPlan, plan_actors
from trl_ray.runtime.runtime import Role

_GIB = 1 << 30
_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}


def describe_run(pipeline: PolicyOptimizationPipeline) -> str:
    """The whole page.

    Raises:
        InputError: whatever a real run would refuse.
    """
    preparation = pipeline.prepare()
    config = preparation.config
    plans = plan_actors(runtime=config.runtime, rollout=config.rollout, reward=config.reward)
    memory = expected_memory(preparation)
    lines = ["# resolved configuration", dump_yaml(config).rstrip(), "", "# plan"]
    lines += [f"{key}: {value}" for key, value in describe(preparation).items()]
    lines += ["", "# actors", f"{'role':<10}{'count':>6}{'CPUs':>7}{'GPUs':>7}{'GiB each':>10}  restarts"]
    lines += [_actor_line(plan, memory) for plan in plans.values()]
    lines += ["", f"memory expected in all: {sum(memory[role] * plans[role].count for role in plans) / _GIB:.1f} GiB"]
    return "\n".join(lines)


def _actor_line(plan: ActorPlan, memory: dict[Role, float]) -> str:
    restarts = "by Ray" if plan.survives else "by the supervisor" if plan.role is Role.ROLLOUT else "from a checkpoint"
    gib = memory[plan.role] / _GIB
    return f"{plan.role:<10}{plan.count:>6}{plan.num_cpus:>7g}{plan.num_gpus:>7g}{gib:>10.1f}  {restarts}"


def expected_memory(preparation: Preparation) -> dict[Role, float]:
    """Bytes that one actor of each role is expected to hold: weights, optimizer, caches, and its Python.

    Activations depend on lengths and are not counted.
    """
    config = preparation.config
    count = count_parameters(config.part(ModelConfig))
    parameters = count.base
    weight, engine_weight = _BYTES[config.dtype], _BYTES[config.rollout.dtype or config.dtype]
    # With an adapter the frozen weights are the reference.
    reference = parameters * weight if config.beta > 0 and not config.use_peft else 0
    process = 0.6 * _GIB
    return {
        # Weights and the published copy; of what is trained also gradients and two Adam moments, which ZeRO splits.
        Role.LEARNER: parameters * weight * 2 + count.trained * weight * 3 + reference + process,
        Role.QUEUE: 0.2 * _GIB,
        Role.ROLLOUT: parameters * engine_weight + config.rollout.kv_cache_memory_gib * _GIB + process,
        Role.REWARD: 0.2 * _GIB,
    }
