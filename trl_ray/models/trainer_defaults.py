"""What transformers' `TrainingArguments` would hold of an option that nobody sets here."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from transformers import TrainingArguments


@cache
def _fields() -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


def knows_argument(name: str) -> bool:
    """Whether transformers has an option of this name."""
    return name in _fields()


def default_argument(name: str) -> Any:
    """Its default there."""
    field = _fields()[name]
    return field.default_factory() if field.default is dataclasses.MISSING else field.default
