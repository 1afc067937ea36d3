"""Rows that stay where they are, on disk or memory-mapped, and are read when they are asked for.

    file ─ survey: number of rows, columns ─► FileRows     reads on from the row before; another place is looked up
    datasets.Dataset ───────────────────────► LibraryRows  some rows at a time
    column_mapping, datasets.columns ───────► ChangedRows  of other rows, changed one by one
    a share that is drawn ──────────────────► GatheredRows of other rows, held in memory

Every sequence can be read by several forked processes at once, and has a key: what its rows are made from, as a hash.
"""

from __future__ import annotations

import abc
import io
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trl_ray.data.sources.arrow_rows import without_filled_arguments
from trl_ray.data.sources.dataset_files import Row, read_file
from trl_ray.errors import DataError

_READ_AHEAD = 10_000
"""Rows that are read and thrown away rather than to open a file anew."""
_BUFFERED_ROWS = 200
_CHUNK_BYTES = 1 << 24


class RowSequence(Sequence[Row]):
    """Rows by number, each made anew whenever it is asked for."""

    @abc.abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """Row `index`, from 0.

        Raises:
            DataError: it cannot be read.
            IndexError: there is no such row.
        """

    @abc.abstractmethod
    def content_key(self) -> str | None:
        """The same for the same rows; None where that is not known."""

    def __iter__(self) -> Iterator[Row]:
        """All rows, in order."""
        return map(self.__getitem__, range(len(self)))


def content_key(rows: Sequence[Row]) -> str | None:
    """A hash of all rows, whatever holds them; None where they cannot be hashed."""
    return rows.content_key() if isinstance(rows, RowSequence) else _key_of_each(rows)


def _key_of_each(rows: Iterable[Row]) -> str | None:
    digest = xxhash.xxh3_128()
    buffer = io.BytesIO()
    for row in rows:
        # Without its memory a pickler writes the same values alike, whether or not they are the same objects.
        pickler = pickle.Pickler(buffer, protocol=5)
        pickler.fast = True
        try:
            pickler.dump(row)
        except (TypeError, AttributeError, pickle.PicklingError, RecursionError, ValueError):
            return None
        digest.update(buffer.getbuffer())
        buffer.seek(0)
        buffer.truncate()
    return digest.hexdigest()


def combined_key(*parts: object) -> str | None:
    """A hash of several; None where one of them is None."""
    return None if None in parts else xxhash.xxh3_128(json.dumps(parts).encode()).hexdigest()


def array_key(array: NDArray[Any]) -> str:
    """A hash of an array's shape and values."""
    return f"{array.shape}-{xxhash.xxh3_128(array.tobytes()).hexdigest()}"


def file_key(path: Path) -> str:
    """A hash of all bytes of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A file that is being read."""

    process: int
    next: int
    """The number of the row that `rows` gives next."""
    rows: Iterator[Row]


class FileRows(RowSequence):
    """The rows of a file, best read in order.

    Args:
        path: of a kind that `read_file` knows.
        length: how many rows it has.
        key: of its bytes, where that is known.
    """

    def __init__(self, path: Path, *, length: int, key: str | None = None) -> None:
        self.path, self._length, self._key = path, length, key
        self._reader: _Reader | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        reader, self._reader = self._reader, None
        # After a fork, parent and child would move one and the same place in the file.
        if reader is None or reader.process != os.getpid() or not 0 <= index - reader.next <= _READ_AHEAD:
            reader = _Reader(process=os.getpid(), next=index, rows=read_file(self.path, index))
        row = next(itertools.islice(reader.rows, index - reader.next, None), None)
        if row is None:
            raise DataError(f"{self.path} must not change while it is read, it had {self._length} rows. Start anew.")
        self._reader = replace(reader, next=index + 1)
        return row

    def content_key(self) -> str:
        """Of the file's bytes: renamed or copied, it is still the same."""
        self._key = self._key or file_key(self.path)
        return f"{self.path.suffix}-{self._key}"


class LibraryRows(RowSequence):
    """The rows of a `datasets.Dataset`, as its iteration gives them."""

    def __init__(self, dataset: Any, *, name: str) -> None:
        self._dataset, self._name = dataset, name
        # What is kept as JSON is not filled.
        self._filled = {name for name, kind in (dataset.features or {}).items() if "Json(" not in repr(kind)}
        self._first, self._buffer = 0, ()  # type: tuple[int, Sequence[Row]]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not 0 <= index - self._first < len(self._buffer):
            self._first, self._buffer = index, self._read(index)
        row = self._buffer[index - self._first]
        return {**row, **without_filled_arguments({key: row[key] for key in self._filled & row.keys()})}

    def _read(self, index: int) -> Sequence[Row]:
        """Some rows from one on; one alone where several cannot be read, or would be put together otherwise."""
        import pyarrow

        try:
            if self._dataset.format["type"] is None:
                try:
                    columns = self._dataset[index : index + _BUFFERED_ROWS]
                    names = list(columns)
                    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                except (OSError, UnicodeDecodeError, pyarrow.ArrowException):
                    pass  # the row at fault is found below, when its turn comes
            return [self._dataset[index]]
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self._name} must be readable, reading stopped before row {index}: {cause}. Check it."
            ) from error

    def content_key(self) -> str | None:
        """The library's own fingerprint; None where a function of the user's makes rows anew each time."""
        if self._dataset.format["type"] == "custom":
            return None
        shown = (self._dataset.format["type"], self._dataset.format["columns"])
        return combined_key(self._dataset._fingerprint, str(shown))


class GatheredRows(RowSequence):
    """Some rows of others, which are then asked for in any order: they are read once, in their own, and held.

    Args:
        rows: best read in order.
        numbers: [N] of those to be held; the others are not there.
    """

    def __init__(self, rows: RowSequence, numbers: NDArray[np.int64]) -> None:
        self._rows = rows
        self._held = {number: rows[number] for number in np.sort(numbers).tolist()}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._held:
            raise IndexError(index)
        return self._held[index]

    def content_key(self) -> str | None:
        return self._rows.content_key()


@dataclass(frozen=True, kw_only=True)
class ChangedRows(RowSequence):
    """Other rows, each changed by a function of its number and itself."""

    rows: Sequence[Row]
    change: Callable[[int, Row], Row]
    told: str | None
    """What the function does; the same text is the same function. None: a user's, known by the rows that it makes."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.change(index, self.rows[index])

    def content_key(self) -> str | None:
        return _key_of_each(self) if self.told is None else combined_key(self.told, content_key(self.rows))
