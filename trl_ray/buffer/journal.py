"""An append-only file of framed records: what the ledger did, in order, so that a restart can do it again.

    trl_ray-journal 1\\n                                    first line of every journal
    <crc32 hex> <payload bytes> <JSON head>\\n<payload>\\n    one record; the CRC covers all after itself

A record is handed to the operating system before `append` returns, so killing the process loses nothing that
was answered; `sync` makes it survive a power cut. A torn last record is cut off on opening and reported;
damage with intact records behind it is an error, because cutting there would lose them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ray.errors import JournalError

_MAGIC = b"trl_ray-journal 1\n"
_HEAD = re.compile(rb"([0-9a-f]{8}) (\d{1,12}) (\{[^\n]*\})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalDraft:
    """A record that is not written yet."""

    head: Mapping[str, Any]
    """JSON values."""
    payload: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as it lies in the file."""

    head: Mapping[str, Any]
    payload: bytes
    offset: int
    """Bytes from the start of the file to its first byte."""
    end: int
    """Bytes from the start of the file to the first byte behind it."""


class Journal:
    """One writer's journal.

        journal = Journal(path)
        for record in journal.records(): ...
        offset = journal.append({"op": "lease"})
        journal.read(offset)

    NOTE: a lock beside the file is held from opening to `close` or the death of the process.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or create, lock, check every record, cut off a torn tail.

        Raises:
            JournalError: another process has it open; it is no journal; or it is damaged before its end.
        """
        self.path = Path(path)
        self.truncated_bytes = 0
        """How many bytes of a torn last record were cut off on opening."""
        self._lock = self._acquire()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._end = self._recover()
        except (OSError, JournalError) as error:
            os.close(self._lock)
            if isinstance(error, JournalError):
                raise
            raise JournalError(f"The journal {self.path} must be readable and writable: {error}.") from error
        self._open = True

    def _acquire(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(lock_path(self.path), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise JournalError(f"The journal {self.path} must lie in a writable folder: {error}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise JournalError(
                f"Only one writer may open the journal {self.path}, and another one has it open. "
                "Stop the other run, or choose another run directory."
            ) from error
        return lock

    def _recover(self) -> int:
        size = os.fstat(self._file).st_size
        start = os.pread(self._file, len(_MAGIC), 0)
        if not _MAGIC.startswith(start):
            raise JournalError(
                f"{self.path} must be a journal of this format version, but it begins with {start!r}. "
                "Choose another run directory."
            )
        if len(start) < len(_MAGIC):
            os.ftruncate(self._file, 0)
            self._write(_MAGIC)
            return len(_MAGIC)
        end = len(_MAGIC)
        while end < size:
            record = self._parse(end)
            if record is None:
                self._refuse_damage_before_the_end(end, size)
                os.ftruncate(self._file, end)
                self.truncated_bytes = size - end
                break
            end = record.end
        return end

    def _refuse_damage_before_the_end(self, bad: int, size: int) -> None:
        data = os.pread(self._file, size - bad, bad)
        for match in _HEAD.finditer(data):
            if match.start() > 0 and self._parse(bad + match.start()) is not None:
                raise JournalError(
                    f"The journal {self.path} is damaged at byte {bad}, with intact records after it (the next at "
                    f"byte {bad + match.start()}). Restore the file from a copy, or start a new run from the last "
                    "checkpoint."
                )

    def _parse(self, offset: int) -> Record | None:
        """The record at `offset`, or None when no intact record lies there."""
        line = self._line(offset)
        match = _HEAD.fullmatch(line)
        if match is None:
            return None
        length = int(match[2])
        rest = os.pread(self._file, length + 1, offset + len(line))
        if len(rest) != length + 1 or rest[-1:] != b"\n":
            return None
        if zlib.crc32(rest, zlib.crc32(line[9:])) != int(match[1], 16):
            return None
        end = offset + len(line) + length + 1
        return Record(head=json.loads(match[3]), payload=rest[:-1], offset=offset, end=end)

    def _line(self, offset: int) -> bytes:
        """The bytes from `offset` up to and with the next newline, or up to the end of the file."""
        line = b""
        while True:
            piece = os.pread(self._file, 4096, offset + len(line))
            cut = piece.find(b"\n")
            if cut >= 0:
                return line + piece[: cut + 1]
            if not piece:
                return line
            line += piece

    def records(self) -> Iterator[Record]:
        """All records, oldest first."""
        offset = len(_MAGIC)
        while offset < self._end:
            record = self.read(offset)
            yield record
            offset = record.end

    def read(self, offset: int) -> Record:
        """The record that begins at `offset`, checked again.

        Raises:
            JournalError: no intact record begins there.
        """
        record = self._parse(offset)
        if record is None:
            raise JournalError(
                f"An intact record must begin at byte {offset} of the journal {self.path}, and none does. "
                "The file was changed from outside; resume the run from its last checkpoint."
            )
        return record

    def append(self, head: Mapping[str, Any], payload: bytes = b"") -> int:
        """Write one record behind the others and return its offset.

        Raises:
            JournalError: it could not be written; the file is left as it was.
        """
        if not self._open:
            raise JournalError(f"The journal {self.path} must be open to be written, and it is closed.")
        offset = self._end
        frame = _frame(head, payload)
        try:
            self._write(frame)
        except OSError as error:
            os.ftruncate(self._file, offset)
            raise JournalError(
                f"The journal {self.path} must be writable: {error}. Free disk space and resume the run."
            ) from error
        self._end += len(frame)
        return offset

    def _write(self, data: bytes) -> None:
        _write_all(self._file, data)

    def sync(self) -> None:
        """Wait until everything written survives a power cut.

        Raises:
            JournalError: the disk reports that it could not be written.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise JournalError(f"The journal {self.path} must reach its disk, but: {error}. Resume the run.") from error

    @property
    def end(self) -> int:
        """Size of the file in bytes."""
        return self._end

    def compact(self, drafts: Iterable[JournalDraft]) -> list[int]:
        """Replace the whole journal by these records, atomically and durably; return their offsets.

        `drafts` may read from this journal while it is consumed: the old file stays until the new one is whole.
        """
        temporary = Path(f"{self.path}.new")
        offsets: list[int] = []
        end = len(_MAGIC)
        file = -1
        try:
            file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            _write_all(file, _MAGIC)
            for draft in drafts:
                frame = _frame(draft.head, draft.payload)
                _write_all(file, frame)
                offsets.append(end)
                end += len(frame)
            os.fsync(file)
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)
        except (OSError, JournalError) as error:
            if file >= 0:
                os.close(file)
            raise JournalError(f"The journal {self.path} could not be compacted: {error}") from error
        os.close(self._file)
        self._file, self._end = file, end
        return offsets

    def close(self) -> None:
        """Give up file and lock; a second call does nothing."""
        if self._open:
            self._open = False
            os.close(self._file)
            os.close(self._lock)


def lock_path(path: str | Path) -> Path:
    """The file whose lock the writer of the journal at `path` holds."""
    return Path(f"{path}.lock")


def _frame(head: Mapping[str, Any], payload: bytes) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode("ascii")
    body = b"%d %s\n%s\n" % (len(payload), text, payload)
    return b"%08x %s" % (zlib.crc32(body), body)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
