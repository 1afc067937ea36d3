"""Checkpoint directories that are either whole or told apart from whole ones.

    begin   step-N.tmp/                                                      one rank makes it
            step-N.tmp/...             what every rank keeps for itself      all ranks, then a barrier
    finish  step-N.tmp/  config.json *.safetensors tokenizer*  trainer_state.pt  extra files  manifest.json
                 '--- every file synced to disk, then renamed ---> step-N/   the same one

A policy with an adapter leaves adapter_config.json and adapter_model.safetensors instead of a whole model.
The manifest holds the size and SHA-256 of every other file. A directory without a manifest was never finished.
Who may read a checkpoint's folder may read its files, and nobody else: it gets the mode of the folder it lies in.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ray.errors import CheckpointError
from trl_ray.models.adapters.lora import has_adapter, save_adapter
from trl_ray.models.dropout import stated_dropout
from trl_ray.models.plain_saving import save_plain

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
ONLY_MODEL = "only_model"
"""In the trainer state: whether it was written without the optimizer."""
_FORMAT = 1
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCheckpoint:
    """The youngest checkpoint that can be used, and why younger ones cannot."""

    path: str | None
    """None when there is none."""
    problems: tuple[str, ...] = ()


def checkpoint_step(path: str | Path) -> int:
    """The step a checkpoint directory is named after.

    Raises:
        CheckpointError: the name is not ``step-N``.
    """
    match = _STEP.fullmatch(Path(path).name)
    if match is None:
        raise CheckpointError(f"a checkpoint directory must be named step-N, got {path}.")
    return int(match[1])


def partial_path(directory: str | Path, step: int) -> Path:
    """The folder that a checkpoint is written to before it is published: the same on every rank."""
    return Path(directory) / f"step-{step}.tmp"


def begin_checkpoint(directory: str | Path, *, step: int, adopt: Mapping[str, str] | None = None) -> Path:
    """Make the folder that all ranks write to; one rank calls it, the others wait for it.

    Args:
        directory: of all checkpoints.
        step: optimizer steps done.
        adopt: folders on the same disk that become part of it, by their names there; they are moved.

    Returns:
        `partial_path`.

    Raises:
        CheckpointError: it cannot be made.
    """
    partial = partial_path(directory, step)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.mkdir(mode=_mode(Path(directory)))
        for name, folder in (adopt or {}).items():
            os.replace(folder, partial / name)
    except OSError as error:
        raise _unwritable(directory, step, error) from error
    return partial


def finish_checkpoint(
    directory: str | Path,
    *,
    step: int,
    model: PreTrainedModel,
    trainer_state: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> str:
    """Add model and trainer state to what all ranks have written, and publish the checkpoint.

    The rank that called `begin_checkpoint` calls it, when all others are done. The checkpoint appears whole or not at
    all; an existing one is replaced.

    Args:
        directory: as given to `begin_checkpoint`.
        step: optimizer steps done.
        model: saved in the dtype it has, so that loading gives the same bits; of one with an adapter only the adapter.
        trainer_state: tensors and plain values, in nested dicts and lists.
        weights: whole parameters by the model's own names (all of them, or all that are trained where there is an
            adapter), when the model's are split over ranks; tied ones once.
        tokenizer: saved beside the model.
        extra: contents of further files by name.

    Returns:
        The path of ``directory/step-N``.

    Raises:
        CheckpointError: the disk is full or the directory cannot be written; the unfinished folder is gone.
    """
    partial, final = partial_path(directory, step), Path(directory) / f"step-{step}"
    assert partial.is_dir(), f"begin_checkpoint must be called before step {step} is finished"
    try:
        _write_model(model, partial, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        torch.save(dict(trainer_state), partial / TRAINER_STATE)
        for name, content in (extra or {}).items():
            if Path(name).name != name or name == MANIFEST:
                raise OSError(f"a further file must have a plain name of its own, got {name!r}")
            (partial / name).write_bytes(content)
        _write_manifest(partial, step)
        _publish(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        abandon_checkpoint(directory, step=step)
        raise _unwritable(directory, step, error) from error
    return str(final)


def abandon_checkpoint(directory: str | Path, *, step: int) -> None:
    """Remove what was begun: some rank could not write its part."""
    shutil.rmtree(partial_path(directory, step), ignore_errors=True)


def _write_model(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None) -> None:
    if has_adapter(model):
        save_adapter(model, directory, weights)
    else:
        with stated_dropout(model):
            save_plain(model, directory, weights=weights)


def _unwritable(directory: str | Path, step: int, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {step} must be written to {Path(directory) / f'step-{step}'}, but: {error}. Free "
        "space or check permissions; earlier checkpoints are untouched."
    )


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def _write_manifest(directory: Path, step: int) -> None:
    found = sorted(directory.rglob("*"))
    for path in found:
        # Libraries make them for everybody to read.
        path.chmod(_mode(directory) if path.is_dir() else _mode(directory) & 0o666)
    files = [path for path in found if path.is_file()]
    entries = {str(path.relative_to(directory)): _fingerprint(path, sync=True) for path in files}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"format": _FORMAT, "step": step, "files": entries}, indent=1, sort_keys=True))
    manifest.chmod(_mode(directory) & 0o666)
    _fingerprint(manifest, sync=True)


def _publish(partial: Path, final: Path) -> None:
    _sync_directory(partial)
    if final.exists():
        # Two renames: were there only a removal first, a kill in between would lose both.
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)
    _sync_directory(final.parent)


def _fingerprint(path: Path, *, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_checkpoint(path: str | Path) -> None:
    """Read every file and compare it with the manifest.

    Raises:
        CheckpointError: names the file that is missing, truncated or changed.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"a checkpoint must be a directory, but there is none at {path}.")
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        version, files, step = manifest["format"], dict(manifest["files"]), int(manifest["step"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} must hold {MANIFEST}, but does not: it is unfinished. Use another.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} must be readable, but: {error!r}. Use another checkpoint."
        ) from error
    if version != _FORMAT or isinstance(version, bool):
        raise CheckpointError(
            f"{directory / MANIFEST} must be of format {_FORMAT}, which this version reads, but says format "
            f"{version!r}. Use the version of trl_ray that wrote it, or another checkpoint."
        )
    if TRAINER_STATE not in files:
        raise CheckpointError(
            f"{directory / MANIFEST} must name {TRAINER_STATE}, but does not. Use another checkpoint."
        )
    if step != checkpoint_step(directory):
        raise CheckpointError(f"{path} must be of the step it is named after, but its manifest says step {step}.")
    for name, expected in files.items():
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise CheckpointError(
                f"{directory / MANIFEST} must name files within {path}, but names {name}. Use another."
            )
        _verify_file(directory / name, expected)


def _verify_file(file: Path, expected: Any) -> None:
    if not (isinstance(expected, Mapping) and {"bytes", "sha256"} <= expected.keys()):
        raise CheckpointError(
            f"the manifest must give size and checksum of {file}, but says {expected!r}. Use another."
        )
    if file.is_symlink():
        raise CheckpointError(f"{file} must be a file of the checkpoint, but is a link. Use another checkpoint.")
    if not file.is_file():
        raise CheckpointError(f"{file} must exist, but is missing. Use another checkpoint.")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"{file} must have {expected['bytes']} bytes, but has {size}: it is truncated or was changed. "
            "Use another checkpoint."
        )
    if _fingerprint(file)["sha256"] != expected["sha256"]:
        raise CheckpointError(f"{file} must match its checksum in the manifest, but does not. Use another checkpoint.")


def load_trainer_state(path: str | Path) -> dict[str, Any]:
    """The trainer state of a verified checkpoint, on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = Path(path) / TRAINER_STATE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the damaged bytes ask for
        raise CheckpointError(f"{file} must be readable, but: {error!r}. Use another checkpoint.") from error
    return state


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Finished or not, all directories named step-N, oldest step first."""
    found = [path for path in Path(directory).glob("step-*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(
    directory: str | Path, *, mend: bool = True, check: Callable[[Path], None] = lambda path: None
) -> FoundCheckpoint:
    """The youngest checkpoint that verifies; what is wrong with younger ones is told, not raised.

    Args:
        directory: of all checkpoints.
        check: raises a `CheckpointError` for one that cannot be used although it is whole.
        mend: put one back whose replacement was killed half-way; only where no other process writes the directory.
    """
    if mend:
        _rescue(Path(directory))
    problems = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify_checkpoint(path)
            check(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return FoundCheckpoint(path=str(path), problems=tuple(problems))
    return FoundCheckpoint(path=None, problems=tuple(problems))


def _rescue(directory: Path) -> None:
    """Put a replaced checkpoint back whose replacement was killed between the two renames."""
    for old in directory.glob("step-*.old"):
        final = old.with_suffix("")
        if not final.exists():
            old.rename(final)


_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.py",
    "README.md",
)


def model_files(checkpoint: str | Path) -> list[Path]:
    """The files of a checkpoint that make its model: what `from_pretrained` reads."""
    return sorted({file for pattern in _MODEL_FILES for file in Path(checkpoint).glob(pattern) if file.is_file()})


def export_model(checkpoint: str | Path, folder: str | Path) -> Path:
    """Copy the model of a checkpoint, without what only a run needs.

    Returns:
        The folder, made where there is none.

    Raises:
        CheckpointError: it cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in model_files(checkpoint):
            shutil.copy2(file, target / file.name)
    except OSError as error:
        raise CheckpointError(f"the model must be written to {target}, but: {error}. Choose another folder.") from error
    return target


def leave_after(directory: str | Path, *, step: int) -> list[str]:
    """Set all checkpoints younger than a step aside, as ``step-N.left``, for a run that goes on from that one.

    What was left before keeps its name: see `free_name`.

    Returns:
        Their new paths.
    """
    left = []
    for path in list_checkpoints(directory):
        if checkpoint_step(path) > step:
            left.append(str(path.rename(free_name(path))))
    return left


def free_name(path: Path) -> Path:
    """What a file or folder that is left aside is called: ``NAME.left``, or ``NAME.left1`` where that is taken."""
    names = (path.with_name(f"{path.name}.left{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists() and not name.is_symlink())


def prune(directory: str | Path, *, keep: int, spare: Path | None = None) -> list[str]:
    """Delete all but the `keep` youngest checkpoints and the one to `spare`, and whatever was left half-written.

    Call it only once a newer checkpoint is complete. Where the youngest turns out to be damaged nothing is deleted.

    Returns:
        The paths that were deleted.
    """
    assert keep >= 1, "at least one checkpoint is kept"
    old = [path for path in list_checkpoints(directory)[:-keep] if path != spare]
    if old and latest_checkpoint(directory, mend=False).problems:
        old = []  # an older one may be the only one that is good
    doomed = old + sorted(Path(directory).glob("step-*.tmp"))
    for path in doomed:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)
    return [str(path) for path in doomed if not path.exists()]
