"""Reads and writes the files of a run so that a crash leaves each of them whole or recognisably torn.

value -> jsonable -> atomic_write_json | JsonLines.append       (OSError becomes RunError: disk full is no detail)
file  -> read_json_lines -> dicts, torn or foreign lines left out
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from trl_ray.errors import RunError
from trl_ray.observe.private_files import open_private


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing `path` into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} must stay writable during the run, got {error.strerror or error}. Free some space or fix the "
            "folder's permissions, then resume the run."
        ) from error


def jsonable(value: Any) -> Any:
    """`value` as strict JSON: NaN and infinity become null, unknown objects their text, keys strings."""
    if value is None or (isinstance(value, bool | int) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return jsonable(value.value)
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean_text(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return jsonable(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return clean_text(str(value))


def clean_text(text: str) -> str:
    """`text` without lone surrogates, which no UTF-8 file can hold; decoded tokens may contain them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_json(value: Any) -> str:
    """One line of strict JSON."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file through a neighbour and rename it: a reader sees the old content or the new, never a part.

    Raises:
        RunError: the file cannot be written.
    """
    # By name no other writer's, on no other node either.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with writing(path):
        try:
            with open(draft, "wb", opener=open_private) as stream:
                write(stream)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole; see `atomic_write`."""
    atomic_write(path, lambda stream: stream.write(clean_text(text).encode()))


def atomic_write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole; see `atomic_write`."""
    atomic_write_text(path, json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=2) + "\n")


class JsonLines:
    """An append-only file of one JSON object per line, written at every append, as a whole or not at all.

    Opening seals a torn last line with a newline, so that a crash costs that line and not the next one too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            torn = _is_torn(path)
            self._file = open_private(str(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            if torn:
                _write_all(self._file, b"\n")

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records; where that fails the file is what it was.

        Raises:
            RunError: the disk is full or the file is gone.
        """
        data = "".join(to_json(record) + "\n" for record in records).encode()
        with writing(self.path):
            end = os.fstat(self._file).st_size
            try:
                _write_all(self._file, data)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, end)
                raise

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._file >= 0:
            with writing(self.path):
                os.close(self._file)
            self._file = -1


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _is_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


def read_json_lines(path: Path, *, skips: Callable[[bytes], bool] | None = None) -> list[dict[str, Any]]:
    """Every whole JSON object of a file, in order; nothing when the file is missing.

    Args:
        path: of the file.
        skips: tells by its bytes whether a line is left out unread.
    """
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    with path.open("rb") as file:
        # Bytes split at newlines alone; text also at separators that may stand inside a JSON string.
        for line in file:
            if skips is not None and skips(line):
                continue
            record = parse_json(line.decode("utf-8", errors="replace"))
            if isinstance(record, dict):
                records.append(record)
    return records


def cut_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Cut a file after its last whole line to keep, in place: who appends to it goes on behind, and a full disk is no
    obstacle. A line before that one which is not to be kept stays.

    Raises:
        RunError: the file cannot be written.
    """
    if not path.is_file():
        return
    with writing(path), path.open("r+b") as stream:
        end = place = 0
        for line in stream:
            place += len(line)
            record = parse_json(line.decode("utf-8", "replace")) if line.endswith(b"\n") else None
            if isinstance(record, dict) and keep(record):
                end = place
        stream.truncate(end)


def parse_json(text: str) -> Any:
    """The value of a JSON text, or None when the text is torn."""
    try:
        return json.loads(text)
    except ValueError:
        return None
