"""Reads the rows of one file lazily, from any row on: JSON, JSONL, CSV, TSV, Parquet, Arrow; packed or not.

    path, start ─► (unpacked) ─► lines or record batches ─► rows start, start + 1, ...

What cannot be read is an error that names the line, the byte or the row, and never a row that is left out.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trl_ray.data.json_text import parse_json
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
_WIDEST_FIELD = 2**31 - 1
"""Characters of a field of a table; the library's own limit, 131072, is shorter than some conversations."""
_HOLDERS = ("data", "rows", "train", "examples", "instances", "items", "records")
"""Keys under which some files hold their list of rows."""
_EXTRA = "Extra data"
"""What the library says where a file has more than one JSON value."""


class _NamedTwice(ValueError):
    """An object has a key more than once."""


def read_file(path: Path, start: int = 0) -> Iterator[Row]:
    """Rows `start`, `start` + 1, ... of a file, in its order.

    Raises:
        DataError: the ending is unknown, or the file cannot be read; names the place.
    """
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise DataError(
            f"A dataset file must end in {', '.join(FILE_TYPES)}, got {str(path)!r}. Convert it, or name what kind of "
            f"file it is: dataset_name=text (or json, csv, parquet, webdataset) with data_files={path}."
        )
    try:
        for number, row in enumerate(reader(path, start), start=start):
            if not isinstance(row, Mapping):
                raise DataError(f"Row {number} of {path} must be an object with columns, got {show(row)}. Mend it.")
            yield row
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} must be readable: {_first_line(error)}.") from error


def is_data_file(path: Path) -> bool:
    """Whether a name is that of a file that can be read here."""
    return _kind(path) in _READERS


def _kind(path: Path) -> str:
    """The ending that says what a file holds, without that of its packing."""
    return Path(path.stem).suffix if path.suffix in _PACKINGS else path.suffix


def _opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked while they are read."""
    unpack = _PACKINGS.get(path.suffix)
    opened: IO[bytes] = path.open("rb") if unpack is None else unpack(path)
    return opened


def _unpacked_zstandard(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _read_json(path: Path, start: int) -> Iterator[Any]:
    """A list of objects, or one object per line."""
    with _opened(path) as file:
        content = file.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        rows = _parsed(_decoded(content, path, line=1))
    except json.JSONDecodeError as error:
        if error.msg == _EXTRA and content.lstrip().startswith(b"{"):
            yield from _read_jsonl(path, start)
            return
        raise DataError(
            f"{path} must be a JSON list of objects, or hold one object per line, line {error.lineno} column "
            f"{error.colno}: {error.msg}. Mend the file."
        ) from error
    except _NamedTwice as error:
        raise DataError(f"{path} must name every column of a row once, got {error} twice. Remove one.") from error
    if not isinstance(rows, list):
        held = next((key for key in _HOLDERS if isinstance(rows, dict) and isinstance(rows.get(key), list)), None)
        remedy = "Wrap it in [ ]." if held is None else f"Write the list that it holds as {held!r} alone."
        raise DataError(f"{path} must be a JSON list of objects, got a {type(rows).__name__}. {remedy}")
    yield from rows[start:]


def _read_jsonl(path: Path, start: int) -> Iterator[Any]:
    """One object per line, or a list of objects under this ending."""
    with _opened(path) as file:
        lines = ((number, raw) for number, raw in _lines(file) if raw.strip())
        first = next(lines, None)
        if first is not None and first[1].lstrip().startswith(b"["):
            yield from _read_json(path, start)
            return
        taken = itertools.chain([] if first is None else [first], lines)
        for number, raw in itertools.islice(taken, start, None):
            line = _decoded(raw, path, line=number).strip()
            try:
                yield _parsed(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path} must hold one JSON object per line, line {number} is broken at column {error.colno}: "
                    f"{error.msg}, got {line[:80]!r}. Mend or delete the line."
                ) from error
            except _NamedTwice as error:
                raise DataError(
                    f"{path} must name every column of a row once, line {number} has {error} twice. Remove one."
                ) from error


def _parsed(text: str) -> Any:
    return parse_json(text, pairs=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _NamedTwice(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _read_csv(path: Path, start: int, *, delimiter: str | None = None) -> Iterator[Any]:
    csv.field_size_limit(_WIDEST_FIELD)
    with _opened(path) as file:
        lines = (_decoded(raw, path, line=number) for number, raw in _lines(file))
        header_line = next(lines, "")
        table = csv.reader(
            itertools.chain([header_line], lines), delimiter=delimiter or _delimiter(header_line), strict=True
        )
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


def _delimiter(header: str) -> str:
    """A comma, unless the header has none and can only be that of a table with another one."""
    return next((each for each in (";", "\t") if each in header and "," not in header), ",")


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
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
FILE_TYPES = tuple(_READERS)
_PACKINGS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _unpacked_zstandard,
}
"""How files of text may be packed, by the ending behind that of their kind."""
