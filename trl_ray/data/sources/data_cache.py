"""Where what was made of datasets is kept for later starts: beside the datasets library's own files.

    $HF_DATASETS_CACHE/trl_ray/tokens/KEY/   tokenised rows, a folder each       (deleting any of it is safe)
    $HF_DATASETS_CACHE/trl_ray/files/KEY     what was found out about a file

A name is a hash of all that the content depends on, the code of this package included, so nothing is ever out of date.
Everything appears under its name whole, by renaming. `datasets.disable_caching()` is heeded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import xxhash

_PARTS = ("config", "data", "types")
"""Of this package, those that tokens depend on."""
_FORMAT = 1
"""Part of every key: a change of what is stored makes older files meaningless."""
_LEFT_SECONDS = 86_400
"""A folder that nothing was put into for so long belongs to a run that was killed."""


def cache_folder(kind: str) -> Path | None:
    """The folder of one kind of content, which may not be there yet; None where the user wants no cache."""
    import datasets

    if not datasets.is_caching_enabled():
        return None
    return Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "trl_ray" / kind


@lru_cache(maxsize=1)
def code_key() -> str:
    """A hash of what makes tokens of rows: these parts of the package, and the libraries that it relies on."""
    libraries = [version(name) for name in ("jinja2", "tokenizers", "transformers")]
    digest = xxhash.xxh3_128(repr((_FORMAT, libraries)).encode())
    folder = Path(__file__).resolve().parents[2]
    for file in sorted(file for part in _PARTS for file in (folder / part).rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def put_file(path: Path, content: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def folder_beside(path: Path) -> Path:
    """A new folder that may be renamed to `path`; what others left unfinished there a day ago goes away.

    Raises:
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*"):
        with suppress(OSError):  # another run takes it away as well
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left)
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))


def put_folder(made: Path, path: Path) -> None:
    """Give a folder that is whole its name; what is there under the name goes away.

    Raises:
        OSError: the folder cannot be renamed.
    """
    if path.exists():
        aside = folder_beside(path)
        path.replace(aside / path.name)
        shutil.rmtree(aside)
    made.replace(path)
