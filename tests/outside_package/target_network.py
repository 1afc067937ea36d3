"""A teacher kind from outside: the policy of a while ago, pulled back to where training started."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trl_ray.models.companions.averaging import Pace, WeightAverage


class TargetNetwork(WeightAverage):
    """teacher <- anchor initial + (1 - anchor) policy, every `teacher_sync_steps`; the rate plays no part."""

    def __init__(self, weights: Mapping[str, Tensor], pace: Pace, *, anchor: float = 0.0) -> None:
        super().__init__(weights, pace)
        self._anchor = anchor
        self._initial = {name: weight.detach().float().clone() for name, weight in weights.items()} if anchor else {}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {**super().tensors, **{f"initial.{name}": weight for name, weight in self._initial.items()}}

    def blend(self, name: str, own: Tensor, weight: Tensor, share: float) -> None:
        del share
        own.copy_(weight.lerp(self._initial[name].to(weight.dtype), self._anchor) if self._anchor else weight)
