"""Weights in 16 bits are trained through copies in float32, so that steps too small for 16 bits add up.

weight (bf16) --gradient--> copy (float32) --optimizer--> copy --rounded--> weight

bfloat16 has 8 bits of precision: a step below a 256th of a weight leaves it where it was, however often it is taken
(https://arxiv.org/abs/1710.03740). Weights in float32 are their own copies, and nothing is kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_HALF = frozenset({torch.bfloat16, torch.float16})


class MasterWeights:
    """The copies of what is trained, which an optimizer then moves.

    Args:
        optimizer: over the weights themselves, without any state yet; over their copies from now on.
        trained: all that it moves, in an order that is the same in every run.
        keep: False trains 16-bit weights as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], *, keep: bool = True) -> None:
        self._pairs = [
            (weight, nn.Parameter(weight.detach().float(), requires_grad=True))
            for weight in trained
            if keep and weight.dtype in _HALF
        ]
        copies = {id(weight): copy for weight, copy in self._pairs}
        self.moved = [copies.get(id(weight), weight) for weight in trained]
        """What the optimizer moves: copies, and weights that are their own."""
        for group in optimizer.param_groups:
            group["params"] = [copies.get(id(weight), weight) for weight in group["params"]]

    def take_gradients(self) -> None:
        """Hand the weights' gradients to their copies."""
        for weight, copy in self._pairs:
            copy.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into the weights."""
        for weight, copy in self._pairs:
            weight.copy_(copy)

    def forget_gradients(self) -> None:
        """Of the weights; an optimizer forgets those of the copies."""
        for weight, _ in self._pairs:
            weight.grad = None

    def state(self) -> list[Tensor]:
        """The copies, for a checkpoint."""
        return [copy.detach() for _, copy in self._pairs]

    @torch.no_grad()
    def load(self, state: Sequence[Tensor] | None) -> None:
        """Go on from `state`; without one, from the weights as they are now.

        Raises:
            ValueError: it is of other weights.
        """
        if state is None:
            state = [weight.float() for weight, _ in self._pairs]
        for (_, copy), kept in zip(self._pairs, state, strict=True):
            if copy.shape != kept.shape:
                raise ValueError(f"float32 weights must have the shapes {tuple(copy.shape)}, got {tuple(kept.shape)}")
            copy.copy_(kept)

    def widen(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer's state of 16-bit weights, from a run without copies, be of their copies."""
        for _, copy in self._pairs:
            state = optimizer.state.get(copy, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype in _HALF:
                    state[name] = value.float()
