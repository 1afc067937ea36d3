"""Datasets with many rows, which are not read into memory but stay where they are stored.

parquet ─ its own count and columns ───────────────────────────────┬─► FileRows
jsonl, csv, arrow ─ read once, checked, counted; noted by content ─┘
datasets.Dataset ─ memory-mapped ────────────────────────────────────► LibraryRows
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ray.data.sources.data_cache import cache_folder, code_key, put_file
from trl_ray.data.sources.dataset_files import read_file
from trl_ray.data.sources.row_sequences import FileRows, LibraryRows, RowSequence, combined_key, file_key

LARGE_BYTES = 16 * 2**20
"""Files above it are not read into memory, but for .json, which can only be read as a whole."""
LARGE_ROWS = 5000
"""Datasets of the library above it are not copied out of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Rows by number, and their columns."""

    rows: RowSequence
    columns: tuple[str, ...]
    """Those of any row, in the order in which they first appear."""


def is_large(path: Path) -> bool:
    """Whether a file is better read where it is."""
    return path.suffix != ".json" and path.stat().st_size > LARGE_BYTES


def is_stored(dataset: Any) -> bool:
    """Whether an object has many rows that are stored somewhere and can be had by number."""
    if isinstance(dataset, RowSequence):
        return True
    of_library = type(dataset).__module__.partition(".")[0] == "datasets"
    return of_library and hasattr(dataset, "__len__") and len(dataset) > LARGE_ROWS


def stored_dataset(dataset: Any, *, name: str) -> StoredRows:
    """The rows of a `datasets.Dataset`, which `name` names in messages, or rows that are stored already."""
    if isinstance(dataset, RowSequence):
        return StoredRows(rows=dataset, columns=tuple(next(iter(dataset), ())))
    return StoredRows(rows=LibraryRows(dataset, name=name), columns=tuple(dataset.format["columns"]))


def stored_file(path: Path) -> StoredRows:
    """The rows of a file.

    Raises:
        DataError: it cannot be read; of a file of text, any line of it.
    """
    folder = cache_folder("files")
    key = None if folder is None else file_key(path)
    note = None if folder is None else folder / str(combined_key(key, path.suffix, code_key()))
    if note is not None and (known := _read_note(note)) is not None:
        return StoredRows(
            rows=FileRows(path, length=int(known["rows"]), key=key), columns=tuple(map(str, known["columns"]))
        )
    length, columns = _shape(path)
    if note is not None:
        with suppress(OSError):  # then the file is looked through once more at the next start
            put_file(note, json.dumps({"rows": length, "columns": columns}))
    return StoredRows(rows=FileRows(path, length=length, key=key), columns=tuple(columns))


def _shape(path: Path) -> tuple[int, list[str]]:
    """How many rows a file has, and which columns."""
    import pyarrow
    import pyarrow.parquet as parquet

    if path.suffix == ".parquet":
        try:
            with parquet.ParquetFile(path) as file:
                return int(file.metadata.num_rows), list(file.schema_arrow.names)
        except (pyarrow.ArrowException, OSError):
            pass  # reading it says what is wrong, and where
    columns: dict[str, None] = {}
    length = 0
    for row in read_file(path):
        columns.update(dict.fromkeys(row))
        length += 1
    return length, list(columns)


def _read_note(note: Path) -> Mapping[str, Any] | None:
    try:
        return dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
