"""DeepSpeed's configuration as users keep it: in a JSON file, or written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trl_ray.errors import ConfigError


def read_deepspeed(source: Any) -> Any:
    """The configuration as a mapping, read from its JSON file where it is a path; anything else as it is.

    So the resolved configuration of a run holds the contents, and learners on other nodes need no file.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds no mapping.
    """
    if not isinstance(source, str):
        return source
    path = Path(source).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise ConfigError(f"deepspeed must name a JSON file, but {source} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed must name a JSON file, but {source} is none: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold a JSON object, but holds a {type(values).__name__}.")
    return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"deepspeed: key {key!r} stands twice; remove one.")
        values[key] = value
    return values
