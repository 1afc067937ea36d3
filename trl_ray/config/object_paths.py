"""Finds the object that a dotted path in a configuration names.

"package.module:name" | "file.py:name" --import, once--> object
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.errors import ConfigError


def find_object(path: str, *, what: str) -> Any:
    """The object behind a path; its module is imported.

    Args:
        path: ``package.module:name`` or ``file.py:name``; the name may have dots.
        what: begins the sentence that says what is wrong, e.g. ``Reward function``.

    Raises:
        ConfigError: no colon, no such module, file or name, or the module cannot be imported.
    """
    module_name, colon, attribute = path.rpartition(":")
    if not colon:
        raise ConfigError(f"{what} {path!r} must be named as package.module:name or file.py:name. Add the colon.")
    module = _module(module_name, path, what)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        guess = nearest(attribute, [name for name in vars(module) if not name.startswith("_")])
        raise ConfigError(
            f"{what} {path!r} does not exist: {module_name} has no {attribute!r}. "
            + (f"Did you mean {module_name}:{guess}?" if guess else "Check the name after the colon.")
        )
    return found


def _module(name: str, path: str, what: str) -> ModuleType:
    try:
        return _module_of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path!r} must name a file that exists, got {name!r}.") from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} {path!r} must be importable: {error}. Install the package, start in the folder "
            "that holds it, or write path/to/file.py:name."
        ) from error
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"{what} {path!r} must be importable: {type(error).__name__}: {error}. Mend {name}."
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, once."""
    name = "trl_ray_file_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
