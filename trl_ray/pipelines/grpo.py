"""Synchronous GRPO: the loop with no lag, so every step trains on completions of the weights it starts from."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.pipelines.rollouts.rollout_pipeline import PolicyOptimizationPipeline


class GRPOPipeline(PolicyOptimizationPipeline):
    """Generates, scores and trains in turn (Shao et al. 2024, arXiv 2402.03300)."""

    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    name: ClassVar[str] = "grpo"
