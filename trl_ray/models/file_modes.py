"""Sets who may read a file, where the file system knows of that; where it does not, the file is written all the same.

path, mode --chmod--> done, or: the mount decides (exFAT, FUSE, some network mounts) --> told once
"""

from __future__ import annotations

import errno
import logging
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOG = logging.getLogger(__name__)
_UNSUPPORTED = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_TOLD: set[str] = set()
"""Of what it was told in this process: of the first path alone."""


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder a mode, where its file system lets us.

    Raises:
        OSError: it cannot be set for another reason, such as that there is no such file.
    """
    if stat.S_IMODE(path.stat().st_mode) == mode:
        return
    with _tolerated(path):
        path.chmod(mode)


def copy_with_mode(source: Path, target: Path) -> None:
    """Copy a file, and its times and mode where the file system lets us.

    Raises:
        OSError: it cannot be read or written.
    """
    shutil.copyfile(source, target)
    with _tolerated(target):
        shutil.copystat(source, target)


@contextmanager
def _tolerated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if not _TOLD:
            _TOLD.add(str(path))
            _LOG.warning(
                "%s keeps the mode that its file system gives, as it lets nobody set one (%s): who may read files "
                "there is up to the options of the mount. Choose another folder if they must be private.",
                path,
                error.strerror,
            )
