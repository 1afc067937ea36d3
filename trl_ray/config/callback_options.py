"""How a configuration names callbacks: a path, or a path and what its class is constructed with."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from trl_ray.config.base import Section
from trl_ray.config.object_paths import FROM_PYTHON, real_path


class CallbackSpec(Section):
    """One callback."""

    path: Annotated[str, AfterValidator(real_path)]
    """``package.module:Class`` or ``file.py:Class``."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor."""

    @property
    def is_from_python(self) -> bool:
        """Whether it was given as an object, so that it cannot be made anew from the configuration."""
        return self.path.startswith(FROM_PYTHON)


def _with_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


CallbackField = Annotated[CallbackSpec, BeforeValidator(_with_path)]
"""A bare string is a path without arguments."""
