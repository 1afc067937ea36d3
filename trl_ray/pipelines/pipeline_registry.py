"""Pipelines by the name that the command line and config.yaml give them, and those from outside by their path.

"grpo" | "package.module:Class" | "file.py:Class" | a name of the entry-point group trl_ray.pipelines --> Pipeline class
"""

from __future__ import annotations

from typing import Any

from trl_ray.config.object_paths import find_plug_in, is_same_object
from trl_ray.errors import ConfigError
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
ENTRY_POINTS = "trl_ray.pipelines"
"""Group of installed packages' entry points: ``name = package.module:Class``."""


def find_pipeline(name: str) -> type[Pipeline[Any, Any]]:
    """The pipeline of a name or a path.

    Raises:
        ConfigError: there is none, what is there is no pipeline, or its configuration bears another name: a run of it
            could not be resumed by its folder.
    """
    if name in PIPELINES:
        return PIPELINES[name]
    found = find_plug_in(name, group=ENTRY_POINTS, what="Pipeline", built_in=tuple(PIPELINES))
    if not isinstance(found, type) or not issubclass(found, Pipeline) or not hasattr(found, "config_class"):
        raise ConfigError(
            f"{name} must be a class derived from trl_ray.pipelines.run.pipeline.Pipeline, with a config_class, got "
            f"{found!r}. Name one, or one of {', '.join(PIPELINES)}."
        )
    called = found.config_class.model_fields["pipeline"].default
    if not is_same_object(called, name):
        raise ConfigError(
            f"{found.config_class.__name__}.pipeline must be {name!r}, as that is how a run finds its pipeline again, "
            f'got {called!r}. Write in that class: pipeline: str = "{name}"'
        )
    return found
