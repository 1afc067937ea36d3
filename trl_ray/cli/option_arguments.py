"""Options as they are written on the command line, in TRL's way or in ours, become overrides.

--learning_rate 1e-5 --packing --lora_target_modules q_proj v_proj runtime.num_learners=2
    --read_options--> learning_rate=1e-5  packing=true  lora_target_modules=["q_proj", "v_proj"]  runtime.num_learners=2
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from trl_ray.config.load import parse_yaml
from trl_ray.config.messages import nearest
from trl_ray.config.trl_options.reading import is_known
from trl_ray.errors import ConfigError

_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def read_options(arguments: Sequence[str], config_class: type[BaseModel]) -> list[str]:
    """Overrides ``a.b=c`` in the order in which they were written.

    Args:
        arguments: ``key=value``, ``--key=value``, ``--key value [value ...]``, ``--key`` and ``--no_key`` for switches;
            dashes stand for underscores.
        config_class: whose options say what takes a list and what is a switch.

    Raises:
        ConfigError: a value belongs to no option, or an option that is no switch has no value.
    """
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            if not _ASSIGNMENT.match(argument):
                raise ConfigError(
                    f"unrecognized arguments: {argument}. Options are written as key=value, --key value or --key=value."
                )
            overrides.append(argument)
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        _check_flag(name)
        name = name.replace("-", "_")
        values = [value] if equals else _values(name, arguments[position:], config_class)
        position += 0 if equals else len(values)
        overrides.append(_override(name, values, config_class))
    return overrides


def _check_flag(name: str) -> None:
    """A mistyped switch of the command itself is no option of the run."""
    meant = nearest(name.replace("_", "-"), ("config", "dry-run", "help"))
    if meant is not None:
        raise ConfigError(f"--{name} is not an option. Did you mean --{meant}?")


def _values(name: str, rest: Sequence[str], config_class: type[BaseModel]) -> list[str]:
    """What follows an option up to the next one."""
    found: list[str] = []
    for each in rest:
        is_assignment = _ASSIGNMENT.match(each) and (found or not _is_awaited(each, name, config_class))
        if each.startswith("--") or is_assignment:
            break
        found.append(each)
    return found


def _is_awaited(text: str, name: str, config_class: type[BaseModel]) -> bool:
    """Whether what has a = in it is an option's value all the same: ``--run_name lr=1e-5``."""
    annotation = _annotation_of(name, config_class)
    if annotation is not None:
        return not _takes(annotation, bool)
    key = text.partition("=")[0].partition(".")[0]
    known = key in config_class.model_fields or key == "env" or is_known(key)
    return not known and nearest(key, config_class.model_fields) is None


def _override(name: str, values: list[str], config_class: type[BaseModel]) -> str:
    annotation = _annotation_of(name, config_class)
    if not values:
        return _switch(name, annotation, config_class)
    if len(values) == 1 and _takes(annotation, bool) and not _takes(annotation, str):
        return f"{name}={_as_switch(values[0])}"
    if len(values) > 1 or (_takes(annotation, list, tuple) and not values[0].startswith(("[", "{"))):
        if len(values) > 1 and annotation is not None and not _takes(annotation, list, tuple):
            raise ConfigError(f"--{name} takes one value, got {' '.join(values)}. Remove all but one.")
        return f"{name}={json.dumps([_word(each, annotation) for each in values])}"
    return f"{name}={json.dumps(values[0]) if _is_text(annotation) else values[0]}"


def _switch(name: str, annotation: Any, config_class: type[BaseModel]) -> str:
    if annotation is None and name.startswith("no_") and not is_known(name):
        positive = name.removeprefix("no_")
        if _takes(_annotation_of(positive, config_class), bool) or is_known(positive):
            return f"{positive}=false"
    if annotation is not None and not _takes(annotation, bool):
        raise ConfigError(f"--{name} needs a value. Write --{name} VALUE, or {name}=VALUE.")
    return f"{name}=true"


def _as_switch(text: str) -> str:
    """True and false in all the words that transformers' command line takes; other values as they are."""
    word = text.lower()
    return "true" if word in _TRUE else "false" if word in _FALSE else text


def _word(text: str, annotation: Any) -> Any:
    """One of several values: text where the option holds texts, else what YAML makes of it."""
    return text if _takes(annotation, str) else parse_yaml(text, source=f"value {text!r}")


def _is_text(annotation: Any) -> bool:
    """Whether the option is a text, so that 1e5 and no are one, too; null is nothing."""
    kinds = _kinds(annotation)
    return str in kinds and not kinds & {bool, int, float, list, dict, tuple}


def _takes(annotation: Any, *kinds: type) -> bool:
    return bool(_kinds(annotation) & set(kinds))


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation, those of its items too."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_kinds(each) for each in get_args(annotation)))
    if origin in (list, tuple):
        return {origin}.union(*(_kinds(each) for each in get_args(annotation) if each is not Ellipsis))
    return {origin or annotation}


def _annotation_of(path: str, config_class: type[BaseModel]) -> Any:
    """Of an option by its dotted name; None where there is none."""
    model: Any = config_class
    *sections, last = path.split(".")
    for section in sections:
        field = getattr(model, "model_fields", {}).get(section)
        model = None if field is None else field.annotation
    field = getattr(model, "model_fields", {}).get(last)
    return None if field is None else field.annotation
