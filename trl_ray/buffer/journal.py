"""An append-only file of framed records: what the ledger did, in order, so that a restart can do it again.

    trl_ray-journal 1\\n                                    first line of every journal
    <crc32 hex> <payload bytes> <JSON head>\\n<payload>\\n    one record; the CRC covers all after itself

A record is handed to the operating system before `append` returns, so killing the process loses nothing that
was answered; `sync` makes it survive a power cut. A torn last record is cut off on opening and reported;
damage with intact records behind it is an error, because cutting there would lose them.

A `Rewrite` makes a shorter journal beside the one in use: records that stand for everything up to a point, then a
copy of what was appended since. Only its last moments, for the bytes of a few calls, hold the writer up.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trl_ray.buffer.payloads import write_all
from trl_ray.errors import JournalError

_MAGIC = b"trl_ray-journal 1\n"
_START = re.compile(rb"([0-9a-f]{8}) (\d{1,12}) \{")
"""How a record begins, in few bytes: what does not begin so is none, however long it is."""
_TRIES = 1000
"""How many beginnings of a record are tried in damaged bytes without an end of line."""
_COPY_BYTES = 1 << 20
_LAST_COPY_BYTES = 1 << 18
"""A `Rewrite` lets go of the writer's thread until less than this is left to copy."""


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
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._end = self._recover()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, OSError):
                raise JournalError(f"The journal {self.path} must be readable and writable: {error}.") from error
            raise
        self._open = True

    def _acquire(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(lock_path(self.path), os.O_RDWR | os.O_CREAT, 0o600)
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
        # What a killed rewrite left behind; nobody else writes it while the lock is held.
        with suppress(FileNotFoundError):
            self._new_path.unlink()
        if len(start) < len(_MAGIC):
            os.ftruncate(self._file, 0)
            write_all(self._file, _MAGIC)
            return len(_MAGIC)
        end = len(_MAGIC)
        with self._mapped(size) as data:
            while end < size:
                span = _span(data, end)
                if span is None:
                    self._refuse_damage_before_the_end(data, end)
                    self.truncated_bytes = size - end
                    break
                end = span.end
        if self.truncated_bytes:
            os.ftruncate(self._file, end)
        return end

    @property
    def _new_path(self) -> Path:
        return Path(f"{self.path}.new")

    def _mapped(self, size: int) -> mmap.mmap:
        return mmap.mmap(self._file, size, prot=mmap.PROT_READ)

    def _refuse_damage_before_the_end(self, data: mmap.mmap, bad: int) -> None:
        line_end, tries = bad, 0
        for match in _START.finditer(data, bad + 1):
            if match.start() >= line_end:
                found = data.find(b"\n", match.start())
                if found < 0:
                    return
                line_end, tries = found, 0
            # A long line of beginnings is no journal's, and would take the square of its length.
            tries += 1
            if tries <= _TRIES and _span(data, match.start()) is not None:
                raise JournalError(
                    f"The journal {self.path} is damaged at byte {bad}, with intact records after it (the next at "
                    f"byte {match.start()}). Restore the file from a copy, or start a new run from the last "
                    "checkpoint."
                )

    def records(self) -> Iterator[Record]:
        """All records, oldest first."""
        offset = len(_MAGIC)
        with self._mapped(self._end) as data:
            while offset < self._end:
                record = _record(data, offset)
                if record is None:
                    raise self._not_intact(offset)
                yield record
                offset = record.end

    def read(self, offset: int) -> Record:
        """The record that begins at `offset`, checked again.

        Raises:
            JournalError: no intact record begins there.
        """
        with self._mapped(self._end) as data:
            record = _record(data, offset)
        if record is None:
            raise self._not_intact(offset)
        return record

    def _not_intact(self, offset: int) -> JournalError:
        return JournalError(
            f"An intact record must begin at byte {offset} of the journal {self.path}, and none does. "
            "The file was changed from outside; resume the run from its last checkpoint."
        )

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
            write_all(self._file, frame)
        except OSError as error:
            os.ftruncate(self._file, offset)
            raise JournalError(
                f"The journal {self.path} must be writable: {error}. Free disk space and resume the run."
            ) from error
        self._end += len(frame)
        return offset

    def sync(self) -> None:
        """Wait until everything written survives a power cut.

        Raises:
            JournalError: the disk reports that it could not be written.
        """
        try:
            _sync_data(self._file)
        except OSError as error:
            raise self._off_disk(error) from error

    def sync_waiter(self) -> Callable[[], None]:
        """A function that does what `sync` does, of what is written now, and may be called on another thread.

        The journal may be replaced or closed meanwhile.
        """
        file = os.dup(self._file)

        def wait() -> None:
            try:
                _sync_data(file)
            except OSError as error:
                raise self._off_disk(error) from error
            finally:
                os.close(file)

        return wait

    def _off_disk(self, error: OSError) -> JournalError:
        return JournalError(f"The journal {self.path} must reach its disk, but: {error}. Resume the run.")

    @property
    def end(self) -> int:
        """Size of the file in bytes."""
        return self._end

    def compact(self, drafts: Iterable[JournalDraft]) -> list[int]:
        """Replace the whole journal by these records, atomically and durably; return their offsets.

        `drafts` may read from this journal while it is consumed: the old file stays until the new one is whole.

        Raises:
            JournalError: it could not be written; the journal is what it was.
        """
        rewrite = Rewrite(self)
        offsets = rewrite.write(drafts)
        rewrite.finish()
        return offsets

    def copy_to(self, file: int, start: int, end: int) -> None:
        """Copy bytes of this journal behind what another file holds."""
        while start < end:
            piece = os.pread(self._file, min(_COPY_BYTES, end - start), start)
            if not piece:
                raise OSError(f"the journal ends at byte {start}, and was written to byte {end}")
            write_all(file, piece)
            start += len(piece)

    def adopt(self, file: int, end: int) -> None:
        """Go on in this file, which lies at the journal's path now."""
        os.close(self._file)
        self._file, self._end = file, end

    def close(self) -> None:
        """Give up file and lock; a second call does nothing."""
        if self._open:
            self._open = False
            os.close(self._file)
            os.close(self._lock)


class Rewrite:
    """A shorter journal in the making, beside the one that is in use and still appended to.

    Protocol in use::

        rewrite = Rewrite(journal)          # the drafts must stand for everything written so far
        rewrite.write(drafts)               # on any thread; the journal may be appended to meanwhile
        rewrite.finish()                    # by the journal's writer; or rewrite.abandon()

    NOTE: whatever fails leaves the journal as it was and no second file.
    """

    def __init__(self, journal: Journal) -> None:
        """Note where the journal ends; nothing is written yet."""
        self._journal = journal
        self._copied = journal.end
        self._file = -1
        self._end = 0
        self._path = Path(f"{journal.path}.new")

    def write(self, drafts: Iterable[JournalDraft]) -> list[int]:
        """Write the drafts, and most of what was appended meanwhile, durably; return the drafts' offsets.

        Raises:
            JournalError: it could not be written.
        """
        try:
            offsets = self._write(drafts)
        except BaseException as error:
            self.abandon()
            if isinstance(error, (OSError, JournalError)):
                raise self._failed(error) from error
            raise
        return offsets

    def _write(self, drafts: Iterable[JournalDraft]) -> list[int]:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self._put(_MAGIC)
        offsets = []
        for draft in drafts:
            offsets.append(self._end)
            self._put(_frame(draft.head, draft.payload))
        while True:
            self._copy()
            os.fsync(self._file)
            if self._journal.end - self._copied <= _LAST_COPY_BYTES:
                return offsets

    def _put(self, data: bytes) -> None:
        write_all(self._file, data)
        self._end += len(data)

    def _copy(self) -> None:
        end = self._journal.end
        self._journal.copy_to(self._file, self._copied, end)
        self._end += end - self._copied
        self._copied = end

    def finish(self) -> None:
        """Copy what is left and put the new journal in the old one's place, atomically and durably.

        Raises:
            JournalError: it could not be written.
        """
        try:
            if self._copied < self._journal.end:
                self._copy()
                os.fsync(self._file)
            os.replace(self._path, self._journal.path)
        except OSError as error:
            self.abandon()
            raise self._failed(error) from error
        self._journal.adopt(self._file, self._end)
        self._file = -1
        # The old journal is as good as this one should its folder not reach the disk.
        with suppress(OSError):
            _sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Leave the journal as it is; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with suppress(OSError):
                self._path.unlink()

    def _failed(self, error: Exception) -> JournalError:
        return JournalError(f"The journal {self._journal.path} could not be compacted: {error}")


def lock_path(path: str | Path) -> Path:
    """The file whose lock the writer of the journal at `path` holds."""
    return Path(f"{path}.lock")


class _Span(NamedTuple):
    """Where the parts of an intact record lie."""

    head: int
    payload: int
    end: int


def _span(data: mmap.mmap, offset: int) -> _Span | None:
    """The record at `offset`, or None when no intact record lies there."""
    match = _START.match(data, offset)
    line_end = -1 if match is None else data.find(b"\n", match.end())
    if match is None or line_end < 0:
        return None
    payload = line_end + 1
    end = payload + int(match[2]) + 1
    if end > len(data) or data[end - 1] != 10:
        return None
    with memoryview(data) as view, view[offset + 9 : end] as body:
        if zlib.crc32(body) != int(match[1], 16):
            return None
    return _Span(match.end() - 1, payload, end)


def _record(data: mmap.mmap, offset: int) -> Record | None:
    span = _span(data, offset)
    if span is None:
        return None
    head = json.loads(data[span.head : span.payload - 1])
    return Record(head=head, payload=data[span.payload : span.end - 1], offset=offset, end=span.end)


def _frame(head: Mapping[str, Any], payload: bytes) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode("ascii")
    body = b"%d %s\n%s\n" % (len(payload), text, payload)
    return b"%08x %s" % (zlib.crc32(body), body)


def _sync_data(file: int) -> None:
    # Not every system has a call that leaves the times of the file out.
    getattr(os, "fdatasync", os.fsync)(file)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
