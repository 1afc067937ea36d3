"""The configuration of every built-in pipeline by its name; what lists options asks here, and loads no pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trl_ray.config.runs.dataset_config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
)
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig

_ALL: tuple[type[RunConfig], ...] = (
    SFTConfig,
    DPOConfig,
    KTOConfig,
    CPOConfig,
    ORPOConfig,
    RewardModelConfig,
    PRMConfig,
    AsyncGRPOConfig,
    GRPOConfig,
    RLOOConfig,
    SDPOConfig,
    DistillConfig,
)
CONFIGS: Mapping[str, type[RunConfig]] = MappingProxyType(
    {str(config.model_fields["pipeline"].default): config for config in _ALL}
)
