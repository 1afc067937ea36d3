"""Moving averages of a policy's weights: what an EMA teacher and a synchronised reference are made of.

    policy after step t --update--> after every N-th step: average <- (1 - r) average + r policy, in place

    WeightAverage    whole weights, from those that training started from; a teacher kind from outside derives from it
    FactorAverage    A and B of low-rank adapters, each from zero (TRL's convention)
    ProductAverage   the B A that they amount to, from zero

(https://arxiv.org/abs/1703.01780.) The product of averaged factors is no average of products: early in training it is
smaller by another factor of r. The average of products is one of whole weights as well: where merged weights W + s B A
are published, `WeightAverage` of them, from W, is W plus `ProductAverage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.adapters.lora import TRAINED, lora_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast an average follows."""

    rate: float
    """Share of the policy in each blend, in (0, 1]."""
    every: int = 1
    """Optimizer steps between two blends."""

    def __post_init__(self) -> None:
        if not (0 < self.rate <= 1 and self.every >= 1):
            raise ConfigError(
                f"teacher_update_rate must be in (0, 1] and teacher_sync_steps at least 1, got {self.rate} and "
                f"{self.every}. Correct them."
            )

    def blends(self, last: int, step: int) -> int:
        """Blends that fall due after step `last` and not after `step`."""
        return max(0, step // self.every - last // self.every)

    def share(self, blends: int) -> float:
        """Share of the policy after so many blends with the same weights: 1 - (1 - rate)^blends."""
        return self.rate if blends == 1 else 1.0 - (1.0 - self.rate) ** blends


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AverageState:
    """An average for a checkpoint."""

    step: int
    """The last one it has been told of."""
    tensors: Mapping[str, Tensor]
    """As they are accumulated; views, so that they must be written before the next update."""


class Average(ABC):
    """Tensors that are blended in place; what all kinds of averages share.

    Updates may be repeated and may leave steps out. A step that is no younger than the last changes nothing. When a
    blend was missed, because whoever holds the average was busy or was lost, the weights at hand stand in for those
    that were not seen: m blends at once are one with the share 1 - (1 - rate)^m.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._step = 0

    @property
    def step(self) -> int:
        """The last step it has been told of; 0 before the first."""
        return self._step

    def is_due(self, step: int) -> bool:
        """Whether the weights after this step, counted from 1, would be blended in."""
        return self._pace.blends(self._step, step) > 0

    def _share(self, step: int) -> float:
        """Share of the weights after `step`; 0 if they are not needed."""
        blends = self._pace.blends(self._step, step)
        self._step = max(self._step, step)
        return self._pace.share(blends) if blends else 0.0

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold, by name."""

    @property
    def num_bytes(self) -> int:
        """Memory that accumulating takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def state(self) -> AverageState:
        """What `restore` goes on from."""
        return AverageState(step=self._step, tensors=dict(self.tensors))

    @torch.no_grad()
    def restore(self, state: AverageState) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: it is that of another model or another kind of average; nothing was changed.
        """
        own = self.tensors
        missing, unknown = sorted(own.keys() - state.tensors.keys()), sorted(state.tensors.keys() - own.keys())
        wrong = [
            name
            for name in own.keys() & state.tensors.keys()
            if (own[name].shape, own[name].dtype) != (state.tensors[name].shape, state.tensors[name].dtype)
        ]
        if missing or unknown or wrong:
            raise CheckpointError(
                f"averaged weights must be those of this model; missing: {missing[:3]}, unknown: "
                f"{unknown[:3]}, of another shape or dtype: {sorted(wrong)[:3]}. Resume with the configuration of the "
                "run that wrote them."
            )
        for name, tensor in own.items():
            tensor.copy_(state.tensors[name])
        self._step = state.step


class WeightAverage(Average):
    """An average of whole weights, in the teacher's own parameters.

    In float16 and bfloat16 a blend of a few per cent is often less than one step of the number format and would be lost
    in rounding; such weights are therefore accumulated in float32, 4 bytes for each, and rounded into place.

    A subclass is another rule of how a teacher follows: it says `blend`, has options as further keyword arguments, and
    adds to `tensors` what it needs to go on from a checkpoint.

    Args:
        weights: the teacher's, by name, at those that training started from; changed in place. Tied ones once.
        pace: how fast it follows.
        keep_dtype: accumulate in the weights' own format, as TRL does for its synchronised reference, whose blends are
            large.
    """

    @torch.no_grad()
    def __init__(self, weights: Mapping[str, Tensor], pace: Pace, *, keep_dtype: bool = False) -> None:
        super().__init__(pace)
        self._weights = dict(weights)
        short = set() if keep_dtype else {torch.float16, torch.bfloat16}
        self._sums = {
            name: weight.detach().float() if weight.dtype in short else weight.detach()
            for name, weight in self._weights.items()
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._sums

    @torch.no_grad()
    def update(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> bool:
        """Blend in the weights after a step.

        Args:
            step: counted from 1.
            weights: all of them, whole, by name; each is used before the next is asked for. Not looked at when no blend
                is due.

        Returns:
            Whether anything was blended.
        """
        share = self._share(step)
        if not share:
            return False
        waiting = set(self._weights)
        for name, weight in weights:
            assert name in waiting, f"the policy's weight {name} is not one of those averaged, or came twice"
            waiting.remove(name)
            own, sums = self._weights[name], self._sums[name]
            assert weight.shape == own.shape, f"{name} is {tuple(weight.shape)}, its average {tuple(own.shape)}"
            self.blend(name, sums, weight.detach().to(device=sums.device, dtype=sums.dtype), share)
            _round_into(own, sums)
        assert not waiting, f"the policy must send all weights to its average, but did not send {sorted(waiting)[:3]}"
        return True

    def blend(self, name: str, own: Tensor, weight: Tensor, share: float) -> None:
        """Move one weight in place, without gradient.

        Args:
            name: of the parameter.
            own: the teacher's, in the format it is accumulated in.
            weight: the policy's, same shape, format and device; not to be kept.
            share: of the policy, in (0, 1].
        """
        own.mul_(1.0 - share).add_(weight, alpha=share)

    @torch.no_grad()
    def restore(self, state: AverageState) -> None:
        """Also sets the teacher's own parameters."""
        super().restore(state)
        for name, own in self._weights.items():
            _round_into(own, self._sums[name])


def _round_into(own: Tensor, sums: Tensor) -> None:
    """Where they are the same memory there is nothing to do."""
    if own.data_ptr() != sums.data_ptr():
        own.copy_(sums)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFactors:
    """One layer's low-rank adapter: the layer's weight is W + scale B A."""

    down: Tensor
    """A [r, in]"""
    up: Tensor
    """B [out, r]"""
    scale: float
    """alpha / r, or alpha / sqrt(r) in rsLoRA."""
    transposed: bool = False
    """The layer keeps W as [in, out]."""


def lora_factors(policy: nn.Module) -> dict[str, LoraFactors]:
    """The trained adapter of a policy, by the name of the layer it stands beside; the tensors are the policy's own.

    Raises:
        ConfigError: something is trained that is no plain low-rank adapter.
    """
    layers = lora_layers(policy)
    others = [
        name
        for name, layer in layers.items()
        if TRAINED in layer.lora_magnitude_vector or hasattr(layer, "parameter_name")
    ]
    others += [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name
    ]
    if others or not layers:
        raise ConfigError(
            "an average of a low-rank adapter needs a policy in which nothing else is trained, but there is "
            f"{sorted(others)[:3] or 'no adapter'}. Set teacher_model_kind to base or live, use_dora=false and no "
            "lora_modules_to_save or lora_target_parameters, or train the whole model."
        )
    return {
        name: LoraFactors(
            down=layer.lora_A[TRAINED].weight,
            up=layer.lora_B[TRAINED].weight,
            scale=float(layer.scaling[TRAINED]),
            transposed=bool(getattr(layer, "fan_in_fan_out", False)),
        )
        for name, layer in layers.items()
    }


class AdapterAverageBase(Average):
    """An average of low-rank adapters, which a layer's frozen weight is added to.

    Args:
        factors: the policy's, by layer; says shapes, scales and devices, the values are not looked at.
        pace: how fast it follows.
    """

    def __init__(self, factors: Mapping[str, LoraFactors], pace: Pace) -> None:
        super().__init__(pace)
        self._scales = {name: layer.scale for name, layer in factors.items()}
        self._transposed = {name: layer.transposed for name, layer in factors.items()}

    @torch.no_grad()
    def update(self, step: int, factors: Mapping[str, LoraFactors]) -> bool:
        """Blend in the adapter after a step.

        Args:
            step: counted from 1.
            factors: of all layers.

        Returns:
            Whether anything was blended.
        """
        assert factors.keys() == self._scales.keys(), (
            "the policy's adapter stands beside other layers than its teacher's"
        )
        share = self._share(step)
        if not share:
            return False
        for name, layer in factors.items():
            self._blend(name, layer, share)
        return True

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """What the averaged adapter adds to one layer's weight, float32, in the weight's own shape.

        One layer's worth of memory for averaged factors; for averaged products what is kept anyway.
        """
        product = self._product(name)
        return product.T if self._transposed[name] else product

    @torch.no_grad()
    def weight(self, name: str, base: Tensor) -> Tensor:
        """The teacher's weight of one layer, a new tensor in the dtype of the frozen one.

        Args:
            name: of the layer.
            base: the frozen weight, [out, in] or as the layer keeps it.
        """
        return (base.float() + self.delta(name).to(base.device)).to(base.dtype)

    @abstractmethod
    def _blend(self, name: str, layer: LoraFactors, share: float) -> None: ...

    @abstractmethod
    def _product(self, name: str) -> Tensor:
        """[out, in]"""


class FactorAverage(AdapterAverageBase):
    """A and B averaged each, from zero, in float32: as many numbers as the adapter has."""

    def __init__(self, factors: Mapping[str, LoraFactors], pace: Pace) -> None:
        super().__init__(factors, pace)
        self._down = {name: torch.zeros_like(layer.down, dtype=torch.float32) for name, layer in factors.items()}
        self._up = {name: torch.zeros_like(layer.up, dtype=torch.float32) for name, layer in factors.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        down = {f"{name}.lora_A": tensor for name, tensor in self._down.items()}
        return down | {f"{name}.lora_B": tensor for name, tensor in self._up.items()}

    def factors(self) -> dict[str, LoraFactors]:
        """The averaged adapter, by layer; the tensors change with every update."""
        return {
            name: LoraFactors(down=self._down[name], up=self._up[name], scale=scale, transposed=self._transposed[name])
            for name, scale in self._scales.items()
        }

    def _blend(self, name: str, layer: LoraFactors, share: float) -> None:
        for own, factor in ((self._down[name], layer.down), (self._up[name], layer.up)):
            own.mul_(1.0 - share).add_(factor.detach().to(device=own.device, dtype=own.dtype), alpha=share)

    def _product(self, name: str) -> Tensor:
        return self._scales[name] * (self._up[name] @ self._down[name])


class ProductAverage(AdapterAverageBase):
    """s B A averaged, from zero: in float32 as many numbers as the adapted layers have weights.

    An average of products over many steps has full rank, so nothing smaller holds it exactly. `num_bytes` tells what it
    takes. A blend is one matrix product into place and needs no memory of its own. A teacher that holds a whole model
    and receives merged weights has no use for it: `WeightAverage` is the same average.

    Args:
        factors, pace: as for `AdapterAverageBase`.
        device: where the averages live; None leaves each with its layer.
    """

    def __init__(
        self, factors: Mapping[str, LoraFactors], pace: Pace, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(factors, pace)
        self._deltas = {
            name: torch.zeros(
                layer.up.shape[0], layer.down.shape[1], dtype=torch.float32, device=device or layer.up.device
            )
            for name, layer in factors.items()
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._deltas

    def _blend(self, name: str, layer: LoraFactors, share: float) -> None:
        own = self._deltas[name]
        up, down = (each.detach().to(device=own.device, dtype=own.dtype) for each in (layer.up, layer.down))
        own.addmm_(up, down, beta=1.0 - share, alpha=share * layer.scale)

    def _product(self, name: str) -> Tensor:
        return self._deltas[name]
