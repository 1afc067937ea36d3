"""How the weights of a teacher follow the policy: copied, or blended into an average that is kept with checkpoints.

WeightPayload --verified--> CopiedWeights    live: the policy's own
                        `-> AveragedWeights  ema: the first version as it is, then average <- (1 - r) average + r policy
AveragedWeights --save--> average.safetensors --restore--> goes on bit for bit

Published weights have the adapter merged, so an average of them is one of whole weights, adapters' products included.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_ray.config.teacher_options import TeacherKind, TeacherSource
from trl_ray.errors import CheckpointError
from trl_ray.models.companions.averaging import AverageState, Pace, WeightAverage
from trl_ray.models.weight_payload import build_manifest, named_tensors, verify_payload
from trl_ray.types import WeightPayload, WeightVersion

AVERAGE_FILE = "average.safetensors"
"""In the folder that a teacher's state is kept in."""


class CopiedWeights:
    """A teacher with the policy's weights as they were last published.

    Args:
        model: the teacher's, at weights that do not matter; changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[str, Tensor] = dict(model.named_parameters())
        self._manifest = build_manifest(self._weights.items())
        self._identity: WeightVersion | None = None

    @property
    def identity(self) -> WeightVersion | None:
        """The version it was given last; None before the first."""
        return self._identity

    def take(self, payload: WeightPayload) -> bool:
        """Follow the policy to a published version; an older one, and the same once more, change nothing.

        Returns:
            Whether the teacher's weights are now just those that were published.

        Raises:
            WeightError: they do not fit or were damaged; the teacher has the weights it had.
        """
        if self._identity is not None and payload.identity.version <= self._identity.version:
            return False
        verify_payload(self._manifest, payload)
        is_copy = self._follow(payload)
        self._identity = payload.identity
        return is_copy

    def save(self, folder: str | Path) -> bool:
        """Write what the next session cannot get from the learner; False where there is nothing of the kind.

        Raises:
            CheckpointError: it cannot be written, or there are no weights yet.
        """
        del folder
        return False

    def restore(self, folder: str | Path) -> None:
        """Go on from what `save` wrote; does nothing where there is nothing of the kind.

        Raises:
            CheckpointError: it is missing or damaged, or of another model; the teacher has the weights it had.
        """
        del folder

    def _follow(self, payload: WeightPayload) -> bool:
        self._copy(payload)
        return True

    @torch.no_grad()
    def _copy(self, payload: WeightPayload) -> None:
        for name, tensor in named_tensors(payload):
            self._weights[name].copy_(tensor)


class AveragedWeights(CopiedWeights):
    """A teacher whose own parameters are a moving average of the policy's; it begins at the first version it is given.

    Args:
        model: the teacher's, at weights that do not matter; changed in place.
        pace: how fast it follows; a step is a version.
    """

    def __init__(self, model: nn.Module, pace: Pace) -> None:
        super().__init__(model)
        self._pace = pace
        self._average: WeightAverage | None = None

    def _follow(self, payload: WeightPayload) -> bool:
        version = payload.identity.version
        if self._average is not None:
            self._average.update(version, named_tensors(payload))
            return False
        self._copy(payload)
        # Only now: weights of 16 bits are accumulated in copies of what they are at this moment.
        average = WeightAverage(self._weights, self._pace)
        average.restore(AverageState(step=version, tensors=average.state().tensors))
        self._average = average
        return True

    def save(self, folder: str | Path) -> bool:
        """A reader sees the file before or the new one, never a part."""
        file = Path(folder) / AVERAGE_FILE
        if self._average is None or self._identity is None:
            raise CheckpointError(f"a teacher must have been given weights before {file} is written, but has none.")
        state = self._average.state()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        facts = {"step": state.step, "version": self._identity.version, "checksum": self._identity.checksum}
        draft = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata={"format": "pt"} | {name: str(value) for name, value in facts.items()})
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(draft, file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise CheckpointError(
                f"the teacher's average must be written to {file}, but: {error}. Free space or check permissions; "
                "earlier checkpoints are untouched."
            ) from error
        return True

    def restore(self, folder: str | Path) -> None:
        file = Path(folder) / AVERAGE_FILE
        try:
            with safe_open(file, framework="pt") as kept:
                facts = kept.metadata() or {}
                names: list[str] = list(kept.keys())
                state = AverageState(step=int(facts["step"]), tensors={name: kept.get_tensor(name) for name in names})
                identity = WeightVersion(version=int(facts["version"]), checksum=facts["checksum"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file} must hold the teacher's average, but: {type(error).__name__}: {error}. Resume with the "
                "configuration of the run that wrote it, or use another checkpoint."
            ) from error
        average = self._average or WeightAverage(self._weights, self._pace)
        average.restore(state)
        self._average, self._identity = average, identity


def follow_policy(source: TeacherSource, model: nn.Module) -> CopiedWeights | None:
    """How a teacher's weights follow the policy; None where they do not."""
    if not source.follows_policy:
        return None
    if source.kind is TeacherKind.LIVE:
        return CopiedWeights(model)
    assert source.weights is not None, "a teacher of the policy's own weights is told how to follow them"
    pace = Pace(rate=source.weights.teacher_update_rate, every=source.weights.teacher_sync_steps)
    return AveragedWeights(model, pace)
