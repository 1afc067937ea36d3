"""What every configuration model has in common: frozen, strict, no unknown keys, no NaN.

And the types of single options that several sections share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from trl_ray.config.messages import Contradictions, beside, explain, without
from trl_ray.errors import ConfigError

PartT = TypeVar("PartT", bound="Section")
RuleT = TypeVar("RuleT", bound=Callable[[Any], None])
_RULES: set[Callable[[Any], None]] = set()


def rule(method: RuleT) -> RuleT:
    """Mark what several options must keep together: a method that raises ValueError where they do not.

    All rules of a section are asked, and what they find is told at once.
    """
    _RULES.add(method)
    return method


_NAMES = ("_path", "_dir", "_name", "_model_id", "chat_template", "reward_funcs")
"""Ends of the names of options that hold names and paths."""
_MAX_NAME_BYTES = 255


@cache
def _rules_of(section: type) -> tuple[str, ...]:
    """Names of its rules, those of its bases first; what a class overrides without the mark is none."""
    names = dict.fromkeys(name for each in reversed(section.__mro__) for name, held in vars(each).items() if _is(held))
    return tuple(name for name in names if _is(getattr(section, name)))


def _is(held: Any) -> bool:
    return inspect.isfunction(held) and held in _RULES


class Section(BaseModel):
    """A group of options with one owner.

    Values are checked strictly: ``true`` is no integer, ``"8"`` is no number, infinity is nothing. Every
    mistake raises :class:`ConfigError`, whichever way the section is built.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        arbitrary_types_allowed=False,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            told = explain(error, type(self), values)
            raise ConfigError("\n".join([*told, *self._further(error, told, values)])) from None

    # Without this mark pydantic would build nested sections through __init__, and their mistakes would lose
    # the dotted name of the option.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @rule
    def _check_names(self) -> None:
        """What no file system can hold is no path, and no name of a model or of rows either."""
        for name in [name for name in type(self).model_fields if name.endswith(_NAMES)]:
            given = getattr(self, name)
            for text in given if isinstance(given, list | tuple) else (given,):
                if not isinstance(text, str):
                    continue
                if "\0" in text:
                    raise ValueError(f"{name} must hold no NUL character, got {text[:60]!r}.")
                longest = max(map(len, text.encode("utf-8", "replace").split(b"/")))
                if longest > _MAX_NAME_BYTES and name != "chat_template":
                    raise ValueError(
                        f"{name} must be a name or a path whose parts have at most {_MAX_NAME_BYTES} bytes, got one of "
                        f"{longest}: {text[:40]!r}..."
                    )

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        found = []
        for name in _rules_of(type(self)):
            try:
                getattr(self, name)()
            except ValueError as error:
                found.append(str(error))
        if found:
            raise Contradictions(found)
        return self

    @classmethod
    def _further(cls, error: ValidationError, told: list[str], values: dict[str, Any]) -> list[str]:
        """What is found when all that was wrong is left out; rules are asked only where every option is right."""
        wrong = [item["loc"] for item in error.errors() if item["loc"]]
        left, gone = without(values, wrong)
        try:
            cls.__pydantic_validator__.validate_python(left)
        except ValidationError as second:
            return beside(explain(second, cls, values), told, gone) if gone else []
        return []

    def part(self, section: type[PartT]) -> PartT:
        """The subset of options that one owner reads, e.g. ``config.part(LossConfig)``."""
        return section(**{name: getattr(self, name) for name in section.model_fields})

    def replace(self, **values: Any) -> Self:
        """A copy with some options changed, validated anew."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})


Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Strict models take no string for an enum; YAML has nothing else.
FROM_STRING = Field(strict=False)


def none_is(default: Any) -> BeforeValidator:
    """TRL writes None for what an option is without being given."""
    return BeforeValidator(lambda value: default if value is None else value)


def none_is_empty() -> BeforeValidator:
    """The same for mappings."""
    return BeforeValidator(lambda value: {} if value is None else value)
