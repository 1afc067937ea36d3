"""Finds the object that a configuration names: by a dotted path, or by a name that an installed package gives.

"package.module:name" | "file.py:name" | a name of an entry-point group --import, once--> object
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.errors import ConfigError

FROM_PYTHON = "python:"
"""Stands in config.yaml before the name of what was given as an object: a callback's class, a reward function."""


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


def entry_point_paths(group: str) -> dict[str, str]:
    """What installed packages give in an entry-point group: names, and the paths of their objects."""
    return {each.name: each.value for each in entry_points(group=group)}


def find_plug_in(name: str, *, group: str, what: str, built_in: Sequence[str] = ()) -> Any:
    """The object of a path, or of a name that an installed package gives; its module is imported.

    Args:
        name: ``package.module:name``, ``file.py:name``, or the name of an entry point.
        group: of the entry points.
        what: begins the sentence that says what is wrong, e.g. ``loss``.
        built_in: other names that would have been right, for that sentence.

    Raises:
        ConfigError: nobody gives the name, or see `find_object`.
    """
    if ":" in name:
        return find_object(name, what=what)
    given = entry_point_paths(group)
    if name not in given:
        one_of = f"one of {', '.join(built_in)}, or " if built_in else ""
        known = f" ({', '.join(sorted(given))})" if given else ""
        raise ConfigError(
            f"{what} must be {one_of}package.module:Class, file.py:Class, or a name that an installed package gives in "
            f"the entry-point group {group}{known}, got {name!r}. Add the colon, or install the package."
        )
    return find_object(given[name], what=what)


def real_path(path: str) -> str:
    """The same object's path for every folder: that of a file becomes absolute, without links; others stay.

    What is uploaded with a Ray job lies in another folder each time, so that paths in it stay relative to that.
    """
    file, _, attribute = path.rpartition(":")
    return f"{_lasting(Path(file))}:{attribute}" if file.endswith(".py") else path


def _lasting(path: Path) -> Path:
    found, here = path.resolve(), Path.cwd().resolve()
    is_uploaded = here.parent.name == "working_dir_files" and here in found.parents
    return found.relative_to(here) if is_uploaded else found


def is_template_text(given: str) -> bool:
    """Whether a chat template is given itself, not the path of one."""
    return "{{" in given or "{%" in given


def lasting_file(given: str) -> str:
    """The same for the path of any file or folder that is there; a name, or a template's text, stays."""
    try:
        if is_template_text(given) or not Path(given).expanduser().exists():
            return given
    except OSError as error:
        raise ValueError(f"must be a template, the path of a file, or a name, got {given!r}: {error}.") from None
    return str(_lasting(Path(given).expanduser()))


OBJECT_OPTIONS = ("loss", "reward_funcs", "callbacks", "compute_metrics", "teacher_model_kind")
"""Options that may name an object in a file."""
_FILE_OPTIONS = ("chat_template", "chat_template_path", "deepspeed")


def place(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a configuration file says, with the files that it names where they are: beside it, or else in this folder.

    Raises:
        ConfigError: the file of an object is in neither.
    """
    placed = dict(values)
    for option, value in values.items():
        if option in OBJECT_OPTIONS:
            placed[option] = _place(value, folder, option)
        elif option in _FILE_OPTIONS and isinstance(value, str) and _is_there(folder, value, option):
            placed[option] = lasting_file(str(folder / value))
    return placed


def _is_there(folder: Path, name: str, option: str) -> bool:
    """Whether it lies beside the configuration; a chat template may be that of a tokenizer's folder, too."""
    if not name or is_template_text(name) or Path(name).is_absolute():
        return False
    found = folder / name
    try:
        return found.is_file() if option == "deepspeed" else found.exists()
    except OSError:
        # No path can be so long: validation says what it must be.
        return False


def _place(value: Any, folder: Path, option: str) -> Any:
    if isinstance(value, list):
        return [_place(each, folder, option) for each in value]
    if isinstance(value, Mapping):
        return {key: _place(each, folder, option) if key == "path" else each for key, each in value.items()}
    file, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not file.endswith(".py") or Path(file).is_absolute():
        return value
    for each in (folder, Path.cwd()):
        if (each / file).is_file():
            return real_path(f"{each / file}:{name}")
    raise ConfigError(
        f"{option} must name a file that exists, got {value!r}: there is no {file} in {folder.resolve()}, where the "
        f"configuration is, nor in {Path.cwd()}. Correct the path."
    )


def is_same_object(written: str, used: str) -> bool:
    """Whether two paths name one object.

    Args:
        written: in a class; that of a file is relative to a folder nobody knows, so its end is what counts.
        used: from this folder.
    """
    if real_path(written) == real_path(used):
        return True
    (file, _, name), (used_file, _, used_name) = written.rpartition(":"), real_path(used).rpartition(":")
    if not file.endswith(".py") or Path(file).is_absolute() or name != used_name:
        return False
    end = [part for part in Path(os.path.normpath(file)).parts if part != ".."]
    return list(Path(used_file).parts[-len(end) :]) == end


def _module(name: str, path: str, what: str) -> ModuleType:
    try:
        return _module_of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path!r} must name a file that exists, got {name!r} in {Path.cwd()}.") from error
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
