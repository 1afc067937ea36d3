"""Types of single options that several sections share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

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
