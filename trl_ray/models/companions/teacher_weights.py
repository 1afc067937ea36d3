"""How the weights of a teacher follow the policy: copied, or blended into an average that is kept with checkpoints.

WeightPayload --verified--> CopiedWeights    live: the policy's own
                        `-> AveragedWeights  ema: the first version as it is, then average <- (1 - r) average + r policy
                                             or what a rule from outside says (teacher_rules)
AveragedWeights --save--> FOLDER/weights.safetensors --restore--> goes on bit for bit

Published weights have the adapter merged, so an average of them is one of whole weights, adapters' products included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trl_ray.config.teacher_options import TeacherSource
from trl_ray.errors import CheckpointError
from trl_ray.models.companions.average_file import FILE, read_average, write_average
from trl_ray.models.companions.averaging import AverageState, WeightAverage
from trl_ray.models.companions.teacher_rules import AVERAGE, teacher_average
from trl_ray.models.weight_payload import build_manifest, named_tensors, verify_payload
from trl_ray.types import WeightPayload, WeightVersion


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
        average: makes the average of parameters by name, at the weights they have; a step is a version.
    """

    def __init__(self, model: nn.Module, average: Callable[[Mapping[str, Tensor]], WeightAverage]) -> None:
        super().__init__(model)
        self._make = average
        self._average: WeightAverage | None = None

    def _follow(self, payload: WeightPayload) -> bool:
        version = payload.identity.version
        if self._average is not None:
            self._average.update(version, named_tensors(payload))
            return False
        self._copy(payload)
        # Only now: weights of 16 bits are accumulated in copies of what they are at this moment.
        average = self._make(self._weights)
        average.restore(AverageState(step=version, tensors=average.state().tensors))
        self._average = average
        return True

    def save(self, folder: str | Path) -> bool:
        if self._average is None or self._identity is None:
            raise CheckpointError(
                f"a teacher must have been given weights before {Path(folder) / FILE} is written, but has none."
            )
        write_average(Path(folder), self._average.state(), what=AVERAGE, identity=self._identity)
        return True

    def restore(self, folder: str | Path) -> None:
        kept = read_average(Path(folder), what=AVERAGE)
        if kept.identity is None:
            raise CheckpointError(
                f"{Path(folder) / FILE} must name the version that the teacher's average saw last, but does not. "
                "Resume with the configuration of the run that wrote it."
            )
        average = self._average or self._make(self._weights)
        average.restore(kept.state)
        self._average, self._identity = average, kept.identity


def follow_policy(source: TeacherSource, model: nn.Module) -> CopiedWeights | None:
    """How a teacher's weights follow the policy; None where they do not."""
    if not source.follows_policy:
        return None
    if source.is_policy:
        return CopiedWeights(model)
    return AveragedWeights(model, lambda weights: teacher_average(source, weights))
