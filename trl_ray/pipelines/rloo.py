"""REINFORCE leave-one-out: the loop of synchronous GRPO with another baseline, ratio and place of the KL."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.runs.grpo_config import GRPOConfig, RLOOConfig
from trl_ray.pipelines.grpo import GRPOPipeline


class RLOOPipeline(GRPOPipeline):
    """Compares each completion with the mean of its siblings (Ahmadian et al. 2024, arXiv 2402.14740)."""

    config_class: ClassVar[type[GRPOConfig]] = RLOOConfig
    name: ClassVar[str] = "rloo"
