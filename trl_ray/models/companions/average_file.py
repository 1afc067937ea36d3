"""One format on disk for everything that follows the policy: averaged teachers, and synchronised references.

AverageState (and which version it last saw, where it follows published ones) <--> FOLDER/weights.safetensors

What is no tensor is JSON under one name: of several the library writes now one first, now another, and equal runs would
not have equal checkpoints. In checkpoints of old each fact has a name of its own, and a reference says no step.

A reader sees the file before or the new one, never a part. Folders lie below a checkpoint, because engines read every
weight file of the checkpoint itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trl_ray.errors import CheckpointError
from trl_ray.models.companions.averaging import AverageState
from trl_ray.types import WeightVersion

FILE = "weights.safetensors"
_FACTS = "average"
_FORMER = "average.safetensors"
"""As teachers in actors called it in checkpoints of old."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptAverage:
    """What a file holds."""

    state: AverageState
    identity: WeightVersion | None
    """The published version that it saw last; None where it follows weights that are at hand."""


def write_average(folder: Path, state: AverageState, *, what: str, identity: WeightVersion | None = None) -> None:
    """Write into a folder, which is made when missing.

    Args:
        folder: of the one average.
        state: of it.
        what: whose it is, e.g. ``the teacher's average``.
        identity: the published version that it saw last.

    Raises:
        CheckpointError: it cannot be written; what was there is untouched.
    """
    file = folder / FILE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    facts: dict[str, object] = {"step": state.step}
    if identity is not None:
        facts |= {"version": identity.version, "checksum": identity.checksum}
    draft = file.with_name(f".{FILE}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={_FACTS: json.dumps(facts)})
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise CheckpointError(
            f"{what} must be written to {file}, but: {error}. Free space or check permissions; earlier checkpoints are "
            "untouched."
        ) from error


def read_average(folder: Path, *, what: str, step: int | None = None) -> KeptAverage:
    """What `write_average` wrote.

    Args:
        folder, what: as there.
        step: stands in where a file does not say it, as those of synchronised references once did not.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = folder / FILE
    if not file.exists() and (folder / _FORMER).exists():
        file = folder / _FORMER
    try:
        with safe_open(file, framework="pt") as kept:
            said = dict(kept.metadata() or {})
            names: list[str] = list(kept.keys())
            tensors = {name: kept.get_tensor(name) for name in names}
        facts = json.loads(said[_FACTS]) if _FACTS in said else said
        if step is not None:
            facts.setdefault("step", step)
        state = AverageState(step=int(facts["step"]), tensors=tensors)
        versioned = "version" in facts
        identity = WeightVersion(version=int(facts["version"]), checksum=facts["checksum"]) if versioned else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file} must hold {what}, but: {type(error).__name__}: {error}. Resume with the configuration of the run "
            "that wrote it, or use another checkpoint."
        ) from error
    return KeptAverage(state=state, identity=identity)
