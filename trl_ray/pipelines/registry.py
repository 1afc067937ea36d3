"""Pipelines by the name that the command line and config.yaml give them."""

from __future__ import annotations

from typing import Any

from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.pipeline import Pipeline
from trl_ray.pipelines.rloo import RLOOPipeline

PIPELINES: dict[str, type[Pipeline[Any, Any]]] = {
    pipeline.name: pipeline for pipeline in (AsyncGRPOPipeline, GRPOPipeline, RLOOPipeline)
}
