"""Reads the rows of one file lazily, from any row on: JSON, JSONL, CSV, Parquet, Arrow.

    path, start ─► lines or record batches ─► rows start, start + 1, ...

What cannot be read is an error that names the line, the byte or the row, and never a row that is left out.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ray.data.sources.arrow_rows import without_filled_arguments
from trl_ray.data.validation import show
from trl_ray.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Row = Mapping[str, Any]
_BATCH_ROWS = 1000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARROW_FILE = b"ARROW1"
"""What an Arrow file begins with; an Arrow stream, which `datasets` writes, begins otherwise."""


def read_file(path: Path, start: int = 0) -> Iterator[Row]:
    """Rows `start`, `start` + 1, ... of a file, in its order.

    Raises:
        DataError: the ending is unknown, or the file cannot be read; names the place.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"A dataset file must end in {', '.join(FILE_TYPES)}, got {str(path)!r}. Convert it.")
    try:
        for number, row in enumerate(reader(path, start), start=start):
            if not isinstance(row, Mapping):
                raise DataError(f"Row {number} of {path} must be an object with columns, got {show(row)}. Mend it.")
            yield row
    except OSError as error:
        raise DataError(f"{path} must be readable: {_first_line(error)}.") from error


def _read_json(path: Path, start: int) -> Iterator[Any]:
    content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        rows = json.loads(_decoded(content, path, line=1))
    except json.JSONDecodeError as error:
        hint = "One object per line is .jsonl: rename the file." if error.msg == "Extra data" else "Mend the file."
        raise DataError(
            f"{path} must be a JSON list of objects, line {error.lineno} column {error.colno}: {error.msg}. {hint}"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must be a JSON list of objects, got a {type(rows).__name__}. Wrap it in [ ].")
    yield from rows[start:]


def _read_jsonl(path: Path, start: int) -> Iterator[Any]:
    with path.open("rb") as file:
        lines = ((number, raw) for number, raw in _lines(file) if raw.strip())
        for number, raw in itertools.islice(lines, start, None):
            line = _decoded(raw, path, line=number).strip()
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path} must hold one JSON object per line, line {number} is broken at column {error.colno}: "
                    f"{error.msg}, got {line[:80]!r}. Mend or delete the line."
                ) from error


def _read_csv(path: Path, start: int) -> Iterator[Any]:
    with path.open("rb") as file:
        table = csv.reader((_decoded(raw, path, line=number) for number, raw in _lines(file)), strict=True)
        try:
            header = next(table, None)
            if header is None:
                return
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{path} must name every column once, got {twice[0]!r} more than once. Rename one.")
            rows = (row for row in table if row)  # blank lines are no rows
            for number, row in enumerate(rows):
                if len(row) != len(header):
                    raise DataError(
                        f"Row {number} of {path} (line {table.line_num}) must have {len(header)} fields, as the header "
                        f"has ({', '.join(header)}), got {len(row)}: {_csv_excess(header, row)}. Quote texts with "
                        "commas, or mend the row."
                    )
                if number >= start:
                    yield dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DataError(
                f"{path} must be a comma-separated table, line {table.line_num} is broken: {error}. Mend the file."
            ) from error


def _csv_excess(header: list[str], row: list[str]) -> str:
    if len(row) < len(header):
        return f"the field {header[len(row)]!r} is missing"
    return f"{row[len(header)][:40]!r} belongs to no column"


def _read_parquet(path: Path, start: int) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    def batches() -> Iterator[RecordBatch]:
        with parquet.ParquetFile(path) as file:
            skipped, groups = 0, list(range(file.num_row_groups))
            while groups and skipped + file.metadata.row_group(groups[0]).num_rows <= start:
                skipped += file.metadata.row_group(groups.pop(0)).num_rows
            if groups:
                found = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
                yield from _without(found, start - skipped)

    return _batch_rows(path, start, "parquet", batches)


def _read_arrow(path: Path, start: int) -> Iterator[Any]:
    import pyarrow

    def batches() -> Iterator[RecordBatch]:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
                with pyarrow.ipc.open_file(source) as file:
                    yield from _without((file.get_batch(i) for i in range(file.num_record_batches)), start)
            else:
                source.seek(0)
                with pyarrow.ipc.open_stream(source) as stream:
                    yield from _without(stream, start)

    return _batch_rows(path, start, "arrow", batches)


def _without(batches: Iterable[RecordBatch], count: int) -> Iterator[RecordBatch]:
    """The batches without their first `count` rows."""
    for batch in batches:
        if count < batch.num_rows:
            yield batch.slice(count)
        count = max(0, count - batch.num_rows)


def _batch_rows(path: Path, start: int, kind: str, batches: Callable[[], Iterator[RecordBatch]]) -> Iterator[Any]:
    import pyarrow

    number = start
    if not path.stat().st_size:
        raise DataError(f"{path} must be a whole {kind} file, it has no byte. Write it anew.")
    try:
        for batch in batches():
            for row in batch.to_pylist():
                yield without_filled_arguments(row)
                number += 1
    # Arrow tells of damage by the errors of the operating system as well; text that is no UTF-8 by Python's.
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} must be a whole {kind} file, reading stopped before row {number}: {_first_line(error)}. Write it "
            "anew."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} must hold UTF-8 text, one of the rows from {number} on does not: {error.reason} "
            f"({error.object[error.start : error.start + 1]!r}). Write it anew."
        ) from error


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, raw in enumerate(file, start=1):
        yield number, raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw


def _decoded(raw: bytes, path: Path, *, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        raise DataError(
            f"{path} must be UTF-8 text: line {line + len(before) - 1} has 0x{raw[error.start]:02x} at byte "
            f"{len(before[-1])} of the line, {error.reason}. Save it as UTF-8."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
FILE_TYPES = tuple(_READERS)
