"""Who may read what a run writes: its owner alone, or the group too where the folder is one that a group shares.

new folder -> folder_mode -> 0700, in a setgid folder 0770 less the umask
new file   -> file_mode   -> 0600, in a setgid folder 0660 less the umask

A run directory holds data, completions and options. A folder with the setgid bit (``chmod g+s``) is how groups share
files on a shared file system; what is made in it inherits the bit, so that whole run directories are shared or private.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from trl_ray.errors import ConfigError

_TOKEN = Path("~/.ray/auth_token")


def is_shared(folder: Path) -> bool:
    """Whether a group shares the files of a folder, by its setgid bit; of one that is missing its parent counts."""
    for each in (folder, *folder.parents):
        try:
            return bool(each.stat().st_mode & stat.S_ISGID)
        except FileNotFoundError:
            continue
    return False


def file_mode(folder: Path) -> int:
    """The mode of a new file in a folder, from which the umask is taken when it is opened."""
    return 0o660 if is_shared(folder) else 0o600


def folder_mode(parent: Path) -> int:
    """The mode of a new folder in another, from which the umask is taken when it is made."""
    return 0o770 if is_shared(parent) else 0o700


def make_folder(folder: Path) -> None:
    """Make a folder of a run, and those above it that are missing; one that is there keeps its mode.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=folder_mode(folder.parent), exist_ok=True)


def open_private(path: str, flags: int) -> int:
    """As `opener` of `open`: a file that is made gets `file_mode`."""
    return os.open(path, flags, file_mode(Path(path).parent))


def loose_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """What is wrong with the mode of Ray's token file: whoever reads it may run code on the cluster; None: nothing."""
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or _TOKEN).expanduser()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
    if not mode & 0o077:
        return None
    return (
        f"{path} must be readable by its owner alone, its mode is {mode:04o}: who reads this token may run code on the "
        f"cluster. Set it: chmod 600 {path}"
    )


def usable_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path.

    Raises:
        ConfigError: no folder can have it.
    """
    given = str(os.fspath(path))
    what = "no NUL character" if "\0" in given else None
    try:
        folder = Path(given).expanduser().absolute()
        os.fsencode(folder)
        folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        what = what or str(getattr(error, "strerror", None) or error)
    else:
        if what is None:
            return folder
    shown = given if len(given) < 100 else f"{given[:60]}... ({len(given)} characters)"
    raise ConfigError(f"A run directory must be a path that a folder can have, got {shown!r}: {what}. Choose another.")
