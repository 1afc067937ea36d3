"""The reference's log-probs of a whole dataset, kept on disk so that they are computed once.

    reference_key(model, tokens) ──► ReferenceCache.open(directory, key, size)
        missing() ──► the policy as its own reference ──► put(rows, values)      until none is missing
        values() [size] ──► labels of the samples

    KEY.npy            [size] float32 on disk and in memory at once; NaN: not known yet
    KEY.npy.lock       held while the file is made or set aside
    KEY.npy.damaged-N  what could not be used
    hashes/            content hashes of weight files, so that these are not read for every run

A file appears whole, filled with NaN, and is then written in place: a run that is killed leaves what it has put.
Several runs may open the same key, since each value can only be written as what it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from transformers.utils.hub import cached_file

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ConfigError, ModelError, NumericsError
from trl_ray.models.policy_loading import ModelSource, find_source
from trl_ray.types import FloatArray, TrainingSample

FloatMap: TypeAlias = np.memmap[Any, np.dtype[np.float32]]
_CONTENT = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.index.json", "*.py")
"""Files of a model's folder that its log-probs can depend on; the tokenizer's do so by the tokens alone."""
_NUMERICS = (
    "dtype",
    "bf16",
    "attn_implementation",
    "use_liger_kernel",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)
"""Options of `ModelConfig` that change log-probs."""
_FORMAT = 1
"""Part of every key: a change of what is stored makes older files meaningless."""


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/trl_ray/reference``, where that is not set ``~/.cache/trl_ray/reference``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "trl_ray" / "reference"


class ReferenceCache:
    """One file of log-probs; see `open`."""

    def __init__(self, path: Path, array: FloatMap, problem: str | None) -> None:
        self.path = path
        """The file."""
        self.problem = problem
        """What was wrong with an older file, which was set aside; None: nothing."""
        self._array = array

    @classmethod
    def open(cls, directory: str | Path | None, key: str, size: int) -> ReferenceCache:
        """Open the file of a key, made where there is none.

        Args:
            directory: made when missing; None takes `default_cache_dir`.
            key: from `reference_key`.
            size: number of values, at least 1.

        Raises:
            ConfigError: the directory cannot be written.
        """
        assert size > 0, "there is something to keep"
        folder = default_cache_dir() if directory is None else Path(directory).expanduser()
        path = folder / f"{key}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                problem = _set_aside_damaged(path, size)
                if not path.exists():
                    _create(path, size)
                array = _map(path, mode="r+")
        except OSError as error:
            raise ConfigError(
                f"ref_log_probs_cache_dir must be a folder that can be written, but {folder}: {error}. Give another, "
                "free space, or set precompute_ref_log_probs=false."
            ) from error
        return cls(path, array, problem)

    def missing(self) -> NDArray[np.int64]:
        """Numbers of the values that are not known yet, in order."""
        return np.flatnonzero(np.isnan(self._array))

    def put(self, indices: Sequence[int] | NDArray[np.int64], values: Sequence[float] | FloatArray) -> None:
        """Write values and have them reach the disk.

        Args:
            indices: [K] which values they are.
            values: [K] in nats.

        Raises:
            NumericsError: one is NaN or infinite; nothing is written.
        """
        places, numbers = np.asarray(indices, dtype=np.int64), np.asarray(values, dtype=np.float32)
        assert places.shape == numbers.shape and places.ndim == 1, "one value for each index"
        assert not len(places) or (places.min() >= 0 and places.max() < len(self._array)), "indices lie in the file"
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise NumericsError(
                f"the reference's log-probs must be finite, but that of row {int(places[bad[0]])} is "
                f"{float(numbers[bad[0]])}. Check the model's weights, or bf16, in which its numbers may overflow."
            )
        self._array[places] = numbers
        self._array.flush()

    def values(self) -> FloatArray:
        """A copy [size] of all values; NaN where they are not known yet."""
        return np.array(self._array, dtype=np.float32)


def _map(path: Path, *, mode: str) -> FloatMap:
    return cast("FloatMap", open_memmap(path, mode=mode))  # type: ignore[no-untyped-call]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from making or setting aside the same file; a process that dies lets go of it."""
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _set_aside_damaged(path: Path, size: int) -> str | None:
    """Rename a file that cannot be used; says why, or None where it can, or is not there."""
    try:
        damage = _damage(path, size)
    except FileNotFoundError:
        return None
    if damage is None:
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    return (
        f"{path} must hold {size} log-probs of the reference, but {damage}. It was renamed to {aside.name}, and they "
        "are computed anew."
    )


def _damage(path: Path, size: int) -> str | None:
    try:
        array = _map(path, mode="r")
    except (ValueError, EOFError) as error:
        return f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no header'})"
    if array.shape != (size,) or array.dtype != np.float32:
        return f"holds {array.dtype} of shape {array.shape}"
    return f"holds infinity in row {int(np.isinf(array).argmax())}" if bool(np.isinf(array).any()) else None


def _create(path: Path, size: int) -> None:
    """Make the file whole or not at all; every byte is written, so that a full disk is met here and not later."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, np.full(size, np.nan, dtype=np.float32))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def token_digest(samples: Iterable[TrainingSample]) -> str:
    """SHA-256 of token ids and loss masks, in order: whatever is asked of the reference."""
    digest = hashlib.sha256()
    for sample in samples:
        sizes = (len(sample.prompt_ids), len(sample.completion_ids))
        digest.update(np.array(sizes, dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(sample.prompt_ids, dtype=np.int32).tobytes())
        digest.update(np.ascontiguousarray(sample.completion_ids, dtype=np.int32).tobytes())
        digest.update(np.ascontiguousarray(sample.loss_mask, dtype=np.bool_).tobytes())
    return digest.hexdigest()


def reference_key(
    model: ModelConfig, *, tokens: str, ld_alpha: float | None, directory: str | Path | None = None
) -> str:
    """The name that log-probs of a dataset under a model are kept by.

    It is made of the content of the model's files (and of the adapter that training starts from), never of their
    names, of what changes numbers, and of the tokens.

    Args:
        model: the policy as it is loaded first.
        tokens: `token_digest` of all samples.
        ld_alpha: how the objective sums the log-probs of a completion.
        directory: of the cache, where hashes of files are kept.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: the model is not there.
    """
    folder = default_cache_dir() if directory is None else Path(directory).expanduser()
    source = find_source(model)
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "tokens": tokens,
        "ld_alpha": ld_alpha,
        "numerics": {name: getattr(model, name) for name in _NUMERICS},
        "model": _content(_local_folder(source), folder),
        "adapter": None if source.initial_adapter is None else _content(Path(source.initial_adapter), folder),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _local_folder(source: ModelSource) -> Path:
    """Where the files are on this machine."""
    if Path(source.base).is_dir():
        return Path(source.base)
    try:
        config = cached_file(source.base, "config.json", revision=source.revision)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"{source.base} must be a folder or on the hub, but: {first_line}. Check the name.") from error
    assert config is not None, "a model has a configuration"
    return Path(config).parent


def _content(folder: Path, cache: Path) -> dict[str, str]:
    """Content hashes of the files that log-probs can depend on, by their names."""
    files = sorted({file for pattern in _CONTENT for file in folder.glob(pattern)})
    return {file.name: _file_hash(file, cache) for file in files}


def _file_hash(file: Path, cache: Path) -> str:
    """SHA-256 of a file, looked up by its path, size and time of change where it was computed before."""
    real = file.resolve()
    stat = real.stat()
    known = {"path": str(real), "bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
    note = cache / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        if {name: kept[name] for name in known} == known:
            return str(kept["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not noted yet, or not legible: read the file
    with real.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    _write_note(note, json.dumps({**known, "sha256": digest}))
    return digest


def _write_note(note: Path, text: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(note)
    except OSError as error:
        raise ConfigError(
            f"ref_log_probs_cache_dir must be a folder that can be written, but {note.parent}: {error}. Give another."
        ) from error
