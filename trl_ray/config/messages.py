"""Turns pydantic's findings into one message: what must hold, what was given, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trl_ray.config.trl_options.foreign_option import Standing
from trl_ray.config.trl_options.reading import ABSENT, entry_of, why_not

_MANY = 40
"""Keys that are too many to be listed in one message."""


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that a mistyped one was meant to be, or None where it looks like another word.

    Word by word, as names of options share words: max_prompt_length is no mistyped max_completion_length.
    """
    near = difflib.get_close_matches(key, list(known), n=5, cutoff=0.7)
    return next((each for each in near if _is_mistyped(key, each)), None)


def _is_mistyped(key: str, known: str) -> bool:
    words, meant = re.split(r"[_\-.]", key.lower()), re.split(r"[_\-.]", known.lower())
    if len(words) != len(meant):
        # An underscore too many or too few.
        return difflib.SequenceMatcher(None, "".join(words), "".join(meant)).ratio() > 0.9
    return all(
        difflib.SequenceMatcher(None, word, other).ratio() > 0.6 for word, other in zip(words, meant, strict=True)
    )


class Contradictions(ValueError):
    """All that the rules of one section found."""

    def __init__(self, found: list[str]) -> None:
        super().__init__("\n".join(found))
        self.found = found


def explain(error: ValidationError, model: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    """One line per mistake, the option's dotted name first.

    Args:
        error: what validation found.
        model: that was validated.
        given: what was written.
    """
    return [line for item in error.errors() for line in _explain_one(dict(item), model, given)]


def without(values: Mapping[str, Any], wrong: Iterable[tuple[Any, ...]]) -> tuple[dict[str, Any], set[str]]:
    """What was written without the options at some places, and the names of what went.

    Of a list, and of an object, all of it goes.
    """
    left, gone = dict(values), set()
    for name, *rest in wrong:
        inner = left.get(name)
        if rest and isinstance(inner, Mapping):
            left[name], names = without(inner, [tuple(rest)])
            gone |= names
        else:
            left.pop(name, None)
            gone.add(str(name))
    return left, gone


def beside(lines: Iterable[str], told: Iterable[str], gone: Iterable[str]) -> list[str]:
    """Lines that were not told, and speak of no option that was left out: its default may be what they complain of."""
    left_out = re.compile(rf"\b({'|'.join(map(re.escape, gone))})\b")
    known = set(told)
    return [line for line in lines if line not in known and not left_out.search(line)]


def _explain_one(item: dict[str, Any], model: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return [unknown_key(path, _fields_at(model, item["loc"][:-1]), item["input"], given)]
    if item["type"] == "value_error":
        error = item["ctx"]["error"]
        found = error.found if isinstance(error, Contradictions) else [str(error)]
        return [_of_option(path, text) for text in found]
    return [_wrong_value(path, item)]


def _of_option(path: str, text: str) -> str:
    # A sentence about one option begins after its name; one about several names them itself.
    return f"{path} {text}" if text.startswith("must ") else f"{path}: {text}" if path else text


def _wrong_value(path: str, item: dict[str, Any]) -> str:
    if item["type"] == "string_pattern_mismatch":
        allowed = str(item["ctx"]["pattern"]).strip("^()$").replace("|", ", ")
        return f"{path} must be one of {allowed}, got {item['input']!r}."
    rule = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{path} is required; set it in the YAML file or as {path}=VALUE."
    return f"{path} must be {rule}, got {item['input']!r}."


def unknown_key(
    path: str, known: Iterable[str], value: Any = ABSENT, given: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """The message for a key that no owner reads.

    Args:
        path: its dotted name.
        known: keys that its owner reads.
        value: that it was given; some options of TRL's are accepted with other values.
        given: what was written beside it.
    """
    known = list(known)
    entry, instead = entry_of(path, known), why_not(path, value, known, given)
    if entry is not None and instead is not None:
        is_wrong_value = value is not ABSENT and entry.standing is not Standing.REFUSED
        return f"{path!r} cannot be {value!r} here. {instead}" if is_wrong_value else _not_here(path, instead)
    guess = nearest(path.rpartition(".")[2], known)
    if guess:
        return _not_here(path, f"Did you mean {guess!r}?")
    if len(known) > _MANY:
        return _not_here(path, "Remove it; --help lists all options.")
    return _not_here(path, f"Known keys: {', '.join(sorted(known))}.")


def _not_here(path: str, hint: str) -> str:
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
