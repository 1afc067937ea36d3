"""Every actor's resources, restarts and concurrency, on one page.

| role    | resources                  | restarts by Ray            | concurrency                                   |
|---------|----------------------------|----------------------------|-----------------------------------------------|
| learner | runtime.learner_num_* for  | 0: as a whole, by the      | one call at a time; probes have a thread      |
|         | each of num_learners ranks | pipeline, from a checkpoint | of their own                                 |
| queue   | none, beside the driver    | unbounded: its constructor | one event loop                                |
|         |                            | rebuilds it from the journal |                                             |
| rollout | rollout.num_*              | 0: by the supervisor, which | one event loop; the engine has a thread      |
|         |                            | refits weights first       |                                               |
| reward  | reward.num_cpus            | unbounded: it has no state | one event loop; functions run in a child      |
| reward_ | reward_models[].num_*, a   | unbounded: its constructor | one event loop; forward passes have a thread  |
| model   | plan of its own for each   | reads the weights again    |                                               |
| teacher | teachers[].num_*, a plan   | unbounded: its constructor | one event loop; forward passes have a thread  |
|         | of its own for each        | reads the first weights,   |                                               |
|         |                            | the actors feeds it the rest |                                               |

`max_task_retries` is 0 everywhere: a call whose outcome is unknown is settled by the ledger, never repeated blindly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorClass

from trl_ray.config.reward_model_options import RewardModelOptions
from trl_ray.config.runs.run_environment import inherited
from trl_ray.config.sections import RewardConfig, RolloutConfig, RuntimeConfig
from trl_ray.config.teacher_options import TeacherSource
from trl_ray.runtime.runtime import Role, reward_model_plan, teacher_plan

HEALTH_GROUP = "health"
_FOREVER = -1


# glibc gives large blocks back to the kernel and faults them in again at the next step: a sixth of a learner's time on
# a CPU, and most of the time it takes to copy weights. These keep freed memory in the process. Other C libraries
# ignore them.
_KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """How many actors of a role there are and what each one gets."""

    role: Role
    count: int
    fewest: int | None = None
    """With which a run may begin; None: with `count`."""
    num_cpus: float
    num_gpus: float
    max_restarts: int
    threads: int
    """Compute threads."""
    is_async: bool
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    """The reward model or teacher that these actors hold copies of."""

    @property
    def key(self) -> str:
        """Tells plans apart: the role, and the model where a role has a plan for each."""
        if self.model is None:
            return self.role.value
        return teacher_plan(self.model) if self.role is Role.TEACHER else reward_model_plan(self.model)

    @property
    def survives(self) -> bool:
        """Whether Ray brings the actor back under its own handle."""
        return self.max_restarts == _FOREVER

    @property
    def bundle(self) -> dict[str, float]:
        """What a placement group reserves for one actor; empty when it needs nothing reserved."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0}


def plan_learner(runtime: RuntimeConfig) -> ActorPlan:
    """The plan for the learner, the only role of a pipeline that trains on a dataset."""
    return ActorPlan(
        role=Role.LEARNER,
        count=runtime.num_learners,
        num_cpus=runtime.learner_num_cpus,
        num_gpus=runtime.learner_num_gpus,
        max_restarts=0,
        threads=runtime.threads_of_learner,
        is_async=False,
        environment=_KEEP_FREED_MEMORY,
    )


def plan_rewards(reward: RewardConfig) -> ActorPlan:
    """The plan for reward workers."""
    return ActorPlan(
        role=Role.REWARD,
        count=reward.num_workers,
        num_cpus=reward.num_cpus,
        num_gpus=0,
        max_restarts=_FOREVER,
        threads=1,
        is_async=True,
    )


def plan_reward_model(options: RewardModelOptions) -> ActorPlan:
    """The plan for the copies of one reward model."""
    return ActorPlan(
        role=Role.REWARD_MODEL,
        count=options.num_workers,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        max_restarts=_FOREVER,
        threads=options.num_threads,
        is_async=True,
        environment=_KEEP_FREED_MEMORY,
        model=options.label,
    )


def plan_teacher(source: TeacherSource) -> ActorPlan:
    """The plan for the copies of one teacher."""
    options = source.options
    return ActorPlan(
        role=Role.TEACHER,
        count=options.num_workers,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        max_restarts=_FOREVER,
        threads=options.num_threads,
        is_async=True,
        environment=_KEEP_FREED_MEMORY,
        model=source.name,
    )


def plan_actors(
    *,
    runtime: RuntimeConfig,
    rollout: RolloutConfig,
    reward: RewardConfig | None,
    reward_models: Sequence[RewardModelOptions] = (),
    teachers: Sequence[TeacherSource] = (),
) -> dict[str, ActorPlan]:
    """The plans of a reinforcement-learning pipeline by key: a role's own name, `reward_model_plan` or
    `teacher_plan`."""
    gpus = rollout.num_gpus or (rollout.tensor_parallel_size if rollout.tensor_parallel_size > 1 else 0.0)
    plans = (
        plan_learner(runtime),
        ActorPlan(role=Role.QUEUE, count=1, num_cpus=0, num_gpus=0, max_restarts=_FOREVER, threads=1, is_async=True),
        ActorPlan(
            role=Role.ROLLOUT,
            count=rollout.num_workers,
            fewest=rollout.min_workers,
            num_cpus=rollout.num_cpus,
            num_gpus=gpus,
            max_restarts=0,
            threads=max(1, int(rollout.num_cpus)),
            is_async=True,
            environment=_KEEP_FREED_MEMORY,
        ),
        *([plan_rewards(reward)] if reward is not None else []),
        *(plan_reward_model(options) for options in reward_models),
        *(plan_teacher(source) for source in teachers),
    )
    return {plan.key: plan for plan in plans}


# What a worker inherits from the driver, so that a run offline or with a token stays so on every node.
_INHERITED = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "PYTHONPATH", "VLLM_LOGGING_LEVEL")


_OF_RAY = frozenset({"CUDA_VISIBLE_DEVICES"})
"""Variables that say here what a cluster has, and in an actor what Ray gave it."""


def actor_environment(plan: ActorPlan) -> dict[str, str]:
    """Environment variables of an actor's process."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        **kept,
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "TOKENIZERS_PARALLELISM": "false",
        **plan.environment,
        # What a user wrote down holds.
        **{name: value for name, value in inherited().items() if name not in _OF_RAY},
    }


def remote_class(cls: type, plan: ActorPlan) -> ActorClass[Any]:
    """Turn a plain class into a Ray actor class with the options of its role."""
    options: dict[str, Any] = {
        "num_cpus": plan.num_cpus,
        "num_gpus": plan.num_gpus,
        "max_restarts": plan.max_restarts,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": actor_environment(plan)},
    }
    if not plan.is_async:
        options["concurrency_groups"] = {HEALTH_GROUP: 1}
    remote: ActorClass[Any] = ray.remote(**options)(cls)
    return remote
