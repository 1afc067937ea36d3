"""The objective of a run's configuration, as its pipeline makes it."""

from __future__ import annotations

from typing import Any

from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.rollouts import preparation
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.rollout_pipeline import RolloutPipeline


def objective_of(config: RolloutRunConfig) -> Objective[Any]:
    """What the pipeline of this configuration makes of finished groups."""
    pipeline = PIPELINES[config.pipeline]
    assert issubclass(pipeline, RolloutPipeline)
    return pipeline.objective_class(config)


def prepare(config: RolloutRunConfig, inputs: preparation.Inputs) -> preparation.Preparation:
    """What the pipeline of this configuration resolves before anything starts."""
    return preparation.prepare(config, inputs, objective=objective_of(config))
