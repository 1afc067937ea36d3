"""Pipelines by the name that the command line and config.yaml give them, and those from outside by their path.

"grpo" | "package.module:Class" | "file.py:Class" | a name of the entry-point group trl_ray.pipelines --> Pipeline class
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trl_ray.config.object_paths import find_plug_in, is_same_object
from trl_ray.errors import ConfigError

if TYPE_CHECKING:
    from trl_ray.pipelines.run.pipeline import Pipeline

_PATHS = {
    "sft": "sft:SFTPipeline",
    "dpo": "preference:DPOPipeline",
    "kto": "preference:KTOPipeline",
    "cpo": "preference:CPOPipeline",
    "orpo": "preference:ORPOPipeline",
    "reward": "reward_modelling:RewardPipeline",
    "prm": "reward_modelling:PRMPipeline",
    "async-grpo": "async_grpo:AsyncGRPOPipeline",
    "grpo": "grpo:GRPOPipeline",
    "rloo": "rloo:RLOOPipeline",
    "sdpo": "sdpo:SDPOPipeline",
    "distill": "distill:DistillPipeline",
}


class _Pipelines(Mapping[str, "type[Pipeline[Any, Any]]"]):
    """The built-in ones; one is imported when it is asked for, as all of torch comes with it."""

    def __getitem__(self, name: str) -> type[Pipeline[Any, Any]]:
        module, _, attribute = _PATHS[name].partition(":")
        found: type[Pipeline[Any, Any]] = getattr(importlib.import_module(f"trl_ray.pipelines.{module}"), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_PATHS)

    def __len__(self) -> int:
        return len(_PATHS)


PIPELINES: Mapping[str, type[Pipeline[Any, Any]]] = _Pipelines()
ENTRY_POINTS = "trl_ray.pipelines"
"""Group of installed packages' entry points: ``name = package.module:Class``."""


def find_pipeline(name: str) -> type[Pipeline[Any, Any]]:
    """The pipeline of a name or a path.

    Raises:
        ConfigError: there is none, what is there is no pipeline, or its configuration bears another name: a run of it
            could not be resumed by its folder.
    """
    from trl_ray.pipelines.run.pipeline import Pipeline

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
