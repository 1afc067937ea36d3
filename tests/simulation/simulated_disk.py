"""A disk that forgets: what was never waited for may be gone after a power cut, and a write may end anywhere.

write_all -- now and then killed after any byte --> file        fsync, fdatasync --> so many bytes are safe
power cut: the journal keeps at least what is safe; payload files, for which nobody waits, keep anything
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

from trl_ray.buffer import journal, payloads


class KilledError(BaseException):
    """The process is dead in the middle of what it does."""


class SimulatedDisk:
    """Counts what is safe, and kills whoever writes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._safe: dict[int, int] = {}
        self.kill_share = 0.0
        """Of writes that end in the writer's death."""
        self.kills = 0
        self.cuts = 0

    def _write_all(self, file: int, data: bytes) -> None:
        if self.kill_share and self._rng.random() < self.kill_share:
            self.kills += 1
            _TRUE_WRITE(file, data[: self._rng.randint(0, len(data))])
            raise KilledError("in a write")
        _TRUE_WRITE(file, data)

    def _sync(self, file: int) -> None:
        found = os.fstat(file)
        if S_ISREG(found.st_mode):
            self._safe[found.st_ino] = found.st_size

    def cut_power(self, path: Path) -> None:
        """Of the journal at `path` and its payloads, lose what nobody waited for, or any part of it."""
        self.cuts += 1
        if path.exists():
            found = path.stat()
            keep = self._rng.randint(self._safe.get(found.st_ino, 0), found.st_size)
            os.truncate(path, keep)
            if self._rng.random() < 0.2:  # file systems fill up with zeros
                os.truncate(path, keep + self._rng.choice([1, 700, 40_000]))
        for file in sorted(Path(f"{path}.payloads").glob("*.bin")):
            if self._rng.random() < 0.5:
                size = file.stat().st_size
                os.truncate(file, self._rng.randint(0, size))
                os.truncate(file, self._rng.choice([size, file.stat().st_size]))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In place of the true one, for journals and payloads."""
        kept: tuple[Callable[[int], None], ...] = (os.fsync, os.fdatasync)
        journal.write_all = payloads.write_all = self._write_all
        os.fsync = os.fdatasync = self._sync
        try:
            yield
        finally:
            journal.write_all = payloads.write_all = _TRUE_WRITE
            os.fsync, os.fdatasync = kept


_TRUE_WRITE = payloads.write_all
