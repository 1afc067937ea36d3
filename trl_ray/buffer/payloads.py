"""Payloads of finished groups, beside the journal: written once, never copied, deleted a file at a time.

    append(blobs) -> RUN_DIR/journal.bin.payloads/000007.bin | 000008.bin ...     -> Place: file, offset, length, CRC
    keep(places)  -> files that hold none of them are deleted

A payload is handed to the operating system before the journal's record that names it, so that killing the process
loses nothing. It is never waited for: after a power cut a payload may be missing or torn, which `is_intact` tells,
and its group is generated again.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trl_ray.errors import JournalError

_FILE_BYTES = 32 << 20
"""A file is closed once it is larger; what is kept of one file keeps all of it."""


class Place(NamedTuple):
    """Where a payload lies; travels as a list of four numbers."""

    file: int
    offset: int
    length: int
    crc: int


class Payloads:
    """The payload files of one journal.

        payloads = Payloads(folder)
        [place] = payloads.append([b"..."])
        payloads.read(place)
        payloads.keep([place])

    NOTE: one writer, who holds the journal's lock.
    """

    def __init__(self, folder: str | Path, *, file_bytes: int = _FILE_BYTES) -> None:
        """Nothing is created before the first `append`; files that are there are never written again."""
        self.folder = Path(folder)
        self._file_bytes = file_bytes
        self._numbers = {int(path.stem) for path in self.folder.glob("[0-9]*.bin") if path.stem.isdigit()}
        self._next = max(self._numbers, default=-1) + 1
        self._current = -1
        self._end = 0
        self._open: dict[int, int] = {}

    def append(self, blobs: Sequence[bytes]) -> list[Place]:
        """Write these behind the others.

        Raises:
            JournalError: they could not be written; none of them counts.
        """
        if not blobs:
            return []
        try:
            file = self._writable()
            places, end = [], self._end
            for blob in blobs:
                places.append(Place(self._current, end, len(blob), zlib.crc32(blob)))
                end += len(blob)
            write_all(file, b"".join(blobs))
        except OSError as error:
            # What was half written is never named, and the next payload begins in a new file.
            self._retire()
            raise JournalError(
                f"The payloads in {self.folder} must be writable: {error}. Free disk space and resume the run."
            ) from error
        self._end = end
        return places

    def _writable(self) -> int:
        if self._current >= 0 and self._end >= self._file_bytes:
            self._retire()
        if self._current < 0:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            number = self._next
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            self._open[number] = os.open(self._path(number), flags, 0o600)
            self._current, self._end, self._next = number, 0, number + 1
            self._numbers.add(number)
        return self._open[self._current]

    def _retire(self) -> None:
        self._current = -1

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.bin"

    def reserve(self, place: Place) -> None:
        """Never write the file of this place: it was named once, and may be gone."""
        self._next = max(self._next, place.file + 1)

    def read(self, place: Place) -> bytes:
        """The payload that was written there.

        Raises:
            JournalError: the file no longer holds it intact.
        """
        blob = self._read(place)
        if blob is None:
            raise JournalError(
                f"{self._path(place.file)} must hold {place.length} intact bytes at byte {place.offset}, and does "
                "not. The file was changed from outside; resume the run from its last checkpoint."
            )
        return blob

    def is_intact(self, place: Place) -> bool:
        """Whether `read` would succeed."""
        return self._read(place) is not None

    def _read(self, place: Place) -> bytes | None:
        try:
            if place.file not in self._open:
                self._open[place.file] = os.open(self._path(place.file), os.O_RDONLY)
            blob = os.pread(self._open[place.file], place.length, place.offset)
        except OSError:
            return None
        return blob if len(blob) == place.length and zlib.crc32(blob) == place.crc else None

    def keep(self, places: Iterable[Place]) -> None:
        """Delete every file that holds none of these, but the one that is being written."""
        kept = {place.file for place in places} | {self._current}
        for number in self._numbers - kept:
            if number in self._open:
                os.close(self._open.pop(number))
            with suppress(OSError):
                self._path(number).unlink()
        self._numbers &= kept

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._retire()


def write_all(file: int, data: bytes) -> None:
    """Write all of it, however often the system writes less."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
