"""Self-distillation policy optimisation: the loop with the policy, told more, as its own teacher."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.pipelines.rollouts.rollout_pipeline import PolicyOptimizationPipeline


class SDPOPipeline(PolicyOptimizationPipeline):
    """Distils what the policy says when it is shown a success or feedback; with max_staleness > 0 asynchronously."""

    config_class: ClassVar[type[RunConfig]] = SDPOConfig
    name: ClassVar[str] = "sdpo"
