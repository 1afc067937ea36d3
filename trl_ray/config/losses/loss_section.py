"""What the options of every loss have in common: where the loss is, whether another stands in for it, its reference.

section.built_in, or `loss: package.module:Class` with `loss_kwargs` --algorithms.loss_registry--> Loss
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from trl_ray.config.base import Section
from trl_ray.config.object_paths import real_path


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSync:
    """A reference that moves: reference <- (1 - alpha) reference + alpha policy."""

    mixup_alpha: float
    """Share of the policy, in (0, 1]."""
    sync_steps: int
    """Optimizer steps between two moves."""


class LossSection(Section):
    """The options of one loss."""

    built_in: ClassVar[str]
    """The loss that reads them, as ``package.module:Class``; named, not imported: configuration loads without torch."""

    loss: Annotated[str | None, AfterValidator(lambda path: path and real_path(path))] = None
    """A loss from outside in the place of the pipeline's own: ``package.module:Class``, ``file.py:Class``, or a name of
    the entry-point group ``trl_ray.losses``."""
    loss_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its own options, where it has some (`options_class`)."""

    @property
    def compares_with_reference(self) -> bool:
        """Whether the policy is compared with a reference at all."""
        return False

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """Importance ratios beyond which a token counts as far off, from below and above."""
        return 0.8, 1.2

    @property
    def precomputes_reference(self) -> bool:
        """Whether the reference is asked before training and not held."""
        return False

    @property
    def reference_sync(self) -> ReferenceSync | None:
        """How the reference moves towards the policy; None: it stays."""
        return None
