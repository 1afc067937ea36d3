"""Texts that a function of the user's makes of rows, in their place.

rows --formatting_func--> [{text_column: text}, ...]      many rows: when they are read; a list at once;
                                                          a small dataset of the library's, or a stream, by its own map
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_ray.data.sources.row_sequences import ChangedRows
from trl_ray.data.sources.stored_rows import is_stored, stored_dataset
from trl_ray.errors import DataError


def formatted_rows(rows: Any, make: Callable[[Any], str], *, column: str) -> Any:
    """Rows of one column.

    Args:
        rows: a dataset of the library's, a stream of it, or rows as mappings.
        make: makes the text of one row.
        column: what texts are called.

    Raises:
        DataError: the function raised, or gave no text.
    """

    def text(row: Any) -> dict[str, str]:
        try:
            made = make(row)
        except Exception as error:  # a user's function may raise anything
            raise DataError(
                f"formatting_func must take every row, but: {type(error).__name__}: {error}. Mend it."
            ) from error
        if not isinstance(made, str):
            raise DataError(f"formatting_func must give the text of one row, got a {type(made).__name__}. Mend it.")
        return {column: made}

    if is_stored(rows):
        stored = stored_dataset(rows, name=f"the given {type(rows).__name__}").rows
        return ChangedRows(rows=stored, change=lambda _, row: text(row), told=None)
    if callable(getattr(rows, "map", None)):
        return rows.map(text, remove_columns=list(rows.column_names or ()))
    return [text(row) for row in rows]
