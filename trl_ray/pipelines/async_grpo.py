"""Asynchronous GRPO: with `max_staleness` above 0 generation, rewards, training and weight pulls overlap."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.pipelines.grpo import GRPOPipeline


class AsyncGRPOPipeline(GRPOPipeline):
    """Generates up to `max_staleness` steps ahead of the learner; that bound holds by construction."""

    config_class: ClassVar[type[GRPOConfig]] = AsyncGRPOConfig
    name: ClassVar[str] = "async-grpo"
