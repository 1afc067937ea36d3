"""What a learner asks of the part that turns gradients into new weights, on one rank or many.

    module = backend.module                         forward passes run through it
    for each micro-batch: backend.backward(loss)    gradients add up
    norm = backend.reduce()                         summed over ranks, norm taken, clipped
    backend.update() or backend.discard()           the optimizer's step, or none; the schedule moves on either way

Losses are already divided by the totals of the whole update, so ranks and micro-batches are added, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class TrainingBackend(Protocol):
    """Gradients, optimizer and schedule of one rank. Methods marked *collective* must be called by every rank."""

    @property
    def module(self) -> nn.Module:
        """What forward passes call: the scoring module, or what wraps it."""
        ...

    @property
    def in_step(self) -> bool:
        """True where forward and backward passes exchange data, so that every rank must run equally many of both."""
        ...

    @property
    def shards_weights(self) -> bool:
        """True where no rank holds the parameters whole. Ask here: nobody looks at a parameter itself to find out."""
        ...

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a micro-batch's gradients; collective where `in_step`. `is_last` marks the update's last micro-batch."""
        ...

    def reduce(self) -> float:
        """Sum gradients over ranks and scale them down to the largest allowed norm; collective.

        Returns:
            Their L2 norm before, the same on every rank; NaN or infinity when a gradient is.
        """
        ...

    def update(self) -> None:
        """Move the weights by the reduced gradients, forget these, and move the schedule on; collective."""
        ...

    def discard(self) -> None:
        """Forget the gradients, leave weights and optimizer as they are, and move the schedule on; collective."""
        ...

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """While it is open, these parameters are whole in this process; collective."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the policy, whole, by its own name, tied ones once, in the model's order.

        Collective: every rank must run through all of them. A tensor is valid until the next one is asked for.
        """
        ...

    def save_state(self, directory: Path) -> dict[str, Any]:
        """Write what is too large or too scattered for one dictionary below `directory`; collective.

        Returns:
            The rest (tensors and plain values), which rank 0 keeps in the trainer state.
        """
        ...

    def load_state(self, directory: Path, state: dict[str, Any]) -> None:
        """Go on from what `save_state` kept; collective.

        Raises:
            CheckpointError: it does not fit this model, optimizer or number of ranks.
        """
        ...
