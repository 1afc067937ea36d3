"""What every configuration model has in common: frozen, strict, no unknown keys, no NaN."""

from __future__ import annotations

from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

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
            raise ConfigError(explain(error, type(self))) from None

    # Without this mark pydantic would build nested sections through __init__, and their mistakes would lose
    # the dotted name of the option.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def part(self, section: type[PartT]) -> PartT:
        """The subset of options that one owner reads, e.g. ``config.part(LossConfig)``."""
        return section(**{name: getattr(self, name) for name in section.model_fields})

    def replace(self, **values: Any) -> Self:
        """A copy with some options changed, validated anew."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})
