"""Pipelines by the name that the command line and config.yaml give them."""

from __future__ import annotations

from typing import Any

from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.distill import DistillPipeline
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.preference import CPOPipeline, DPOPipeline, KTOPipeline, ORPOPipeline
from trl_ray.pipelines.reward_modelling import PRMPipeline, RewardPipeline
from trl_ray.pipelines.rloo import RLOOPipeline
from trl_ray.pipelines.run.pipeline import Pipeline
from trl_ray.pipelines.sdpo import SDPOPipeline
from trl_ray.pipelines.sft import SFTPipeline

_ALL: tuple[type[Pipeline[Any, Any]], ...] = (
    SFTPipeline,
    DPOPipeline,
    KTOPipeline,
    CPOPipeline,
    ORPOPipeline,
    RewardPipeline,
    PRMPipeline,
    AsyncGRPOPipeline,
    GRPOPipeline,
    RLOOPipeline,
    SDPOPipeline,
    DistillPipeline,
)
PIPELINES: dict[str, type[Pipeline[Any, Any]]] = {pipeline.name: pipeline for pipeline in _ALL}
