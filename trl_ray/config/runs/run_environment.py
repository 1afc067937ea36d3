"""The environment variables that a file sets, as TRL's files do: here, and in every actor wherever it is.

env: {NAME: value} --set_environment--> os.environ, and the names in TRL_RAY_INHERITED --inherited--> an actor's process
"""

from __future__ import annotations

import os
from typing import Any

from trl_ray.config.sections import RuntimeConfig
from trl_ray.errors import ConfigError

_NAMES = "TRL_RAY_INHERITED"


def set_environment(given: Any) -> None:
    """Set what a file says under `env`; None is nothing.

    Raises:
        ConfigError: it is no mapping of names to single values.
    """
    if given is None:
        return
    if not isinstance(given, dict) or any(isinstance(each, (dict, list)) for each in given.values()):
        raise ConfigError(f"env must hold names of environment variables and their values, got {given!r}.")
    written = {str(name): str(value) for name, value in given.items()}
    os.environ.update(written)
    os.environ[_NAMES] = ",".join(dict.fromkeys([*inherited(), *written]))


def inherited() -> dict[str, str]:
    """The variables that were set so, with their values."""
    names = os.environ.get(_NAMES, "").split(",")
    return {name: os.environ[name] for name in names if name in os.environ}


def learner_threads(runtime: RuntimeConfig) -> int | None:
    """Compute threads that the learner is told to use; None where a file's `env` says it, which torch reads itself."""
    if runtime.learner_threads is None and "OMP_NUM_THREADS" in inherited():
        return None
    return runtime.threads_of_learner
