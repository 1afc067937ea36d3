"""Turns pydantic's findings into one message: what must hold, what was given, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trl_ray.config.counterparts import counterpart


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key most like a mistyped one, or None when nothing is close."""
    matches = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per mistake, the option's dotted name first."""
    return "\n".join(_explain_one(dict(item), model) for item in error.errors())


def _explain_one(item: dict[str, Any], model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return unknown_key(path, _fields_at(model, item["loc"][:-1]))
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])
        # A sentence about one option begins after its name; one about several names them itself.
        return f"{path} {text}" if text.startswith("must ") else f"{path}: {text}" if path else text
    if item["type"] == "string_pattern_mismatch":
        allowed = str(item["ctx"]["pattern"]).strip("^()$").replace("|", ", ")
        return f"{path} must be one of {allowed}, got {item['input']!r}."
    rule = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{path} is required; set it in the YAML file or as {path}=VALUE."
    return f"{path} must be {rule}, got {item['input']!r}."


def unknown_key(path: str, known: Iterable[str]) -> str:
    """The message for a key that no owner reads."""
    known = list(known)
    instead = counterpart(path, known)
    if instead is not None:
        return f"{path!r} is not an option here. {instead}"
    guess = nearest(path.rpartition(".")[2], known)
    hint = f"Did you mean {guess!r}?" if guess else f"Known keys: {', '.join(sorted(known))}."
    return f"{path!r} is not an option here. {hint}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):  # of a list of sections
            continue
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field is not None else None
        if get_origin(annotation) is list:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
