"""Gives the columns of a dataset the names that they have here.

{question: "q", id: 3}  ─ column_mapping={question: prompt, id: null} ─►  {prompt: "q"}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.errors import DataError


def rename(row: Any, mapping: Mapping[str, str | None], *, where: str) -> Any:
    """A row with the names that a mapping gives to its columns, and without those that it maps to None.

    What is no row comes back as it is: it is told where rows are read.

    Raises:
        DataError: two columns get one name.
    """
    if not isinstance(row, Mapping) or not mapping:
        return row
    named: dict[str, Any] = {}
    for column, value in row.items():
        name = mapping.get(column, column)
        if name in named:
            other = next(key for key in row if mapping.get(key, key) == name)
            raise DataError(
                f"{where} must have one column for each name of column_mapping, but {other!r} and {column!r} both are "
                f"{name!r}. Leave one out: column_mapping={{{name if name in row else column}: null}}."
            )
        if name is not None:
            named[name] = value
    return named


def check_mapping(mapping: Mapping[str, str | None], columns: Collection[str], *, name: str) -> None:
    """Check that a mapping speaks of columns that are there.

    Raises:
        DataError: offers the nearest.
    """
    for column in mapping:
        if column not in columns:
            guess = nearest(column, columns)
            raise DataError(
                f"column_mapping must name columns of {name}, got {column!r}; its columns are "
                f"{', '.join(columns) or 'none'}. {f'Did you mean {guess!r}?' if guess else 'Name one of them.'}"
            )
