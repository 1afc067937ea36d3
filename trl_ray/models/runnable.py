"""Which architectures a run can have."""

from __future__ import annotations

from trl_ray.config.sections import ModelConfig


def check_runnable(model: ModelConfig, engine: str) -> None:
    """To be written."""
