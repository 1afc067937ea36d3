"""What every configuration model has in common: frozen, strict, no unknown keys, no NaN.

And the types of single options that several sections share.
"""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trl_ray.config.messages import explain
from trl_ray.errors import ConfigError

PartT = TypeVar("PartT", bound="Section")


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
            raise ConfigError(explain(error, type(self), values)) from None

    # Without this mark pydantic would build nested sections through __init__, and their mistakes would lose
    # the dotted name of the option.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

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
