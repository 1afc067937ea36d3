"""Plain torch: every rank holds the whole model, and gradients are summed once per update.

backward x micro-batches --> [all-reduce of flat buckets] --> norm, clip --> optimizer --> schedule

Ranks exchange nothing before the update's last backward pass, so they may run different numbers of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trl_ray.config.sections import TrainingConfig
from trl_ray.errors import CheckpointError
from trl_ray.models.backends.master_weights import MasterWeights
from trl_ray.models.backends.optimizer import build_optimizer, build_scheduler, load_optimizer
from trl_ray.models.backends.ranks import Ranks
from trl_ray.models.scoring.scoring_module import PredictorModule

_BUCKET_BYTES = 64 << 20


class TorchBackend:
    """See `Backend`."""

    in_step = False
    shards_weights = False

    def __init__(self, module: PredictorModule, training: TrainingConfig, *, total_updates: int, ranks: Ranks) -> None:
        self.module: nn.Module = module
        self._policy = module.policy
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._max_norm = training.max_grad_norm or math.inf
        self._ranks = ranks
        self._optimizer = build_optimizer(self._policy, training)
        self._masters = MasterWeights(self._optimizer, self._trained, keep=training.float32_master_weights)
        self._scheduler = build_scheduler(self._optimizer, training, total_steps=total_updates)

    @property
    def learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Nothing is exchanged here."""
        del is_last
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self) -> float:
        if self._ranks.size > 1:
            self._sum_over_ranks()
        self._masters.take_gradients()
        return float(torch.nn.utils.clip_grad_norm_(self._masters.moved, self._max_norm))

    def _sum_over_ranks(self) -> None:
        # A parameter without a gradient anywhere must keep none, or the optimizer would decay it.
        touched = torch.tensor([float(p.grad is not None) for p in self._trained], device=self._trained[0].device)
        dist.all_reduce(touched)
        moving = [p for p, count in zip(self._trained, touched.tolist(), strict=True) if count]
        for bucket in _buckets(moving):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for parameter, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                parameter.grad = piece.view_as(parameter)

    def update(self) -> None:
        self._optimizer.step()
        self._masters.write_back()
        self.discard()

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._masters.forget_gradients()
        with warnings.catch_warnings():
            # torch warns when the very first step is one that is skipped.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            self._scheduler.step()

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """They are whole as they are."""
        del parameters
        return nullcontext()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every rank has all of them, so nothing is exchanged."""
        yield from self._policy.named_parameters()

    def save_state(self, directory: Path) -> dict[str, Any]:
        """All ranks hold the same, and no file is written."""
        del directory
        state = {"optimizer": self._optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}
        masters = self._masters.state()
        return {**state, "masters": masters} if masters else state

    def load_state(self, directory: Path, state: dict[str, Any]) -> None:
        """The number of ranks may have changed."""
        try:
            self._masters.load(state.get("masters"))
            load_optimizer(self._optimizer, state["optimizer"])
            self._masters.widen(self._optimizer)
            self._scheduler.load_state_dict(state["scheduler"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the trainer state in {directory} must fit this model and optimizer, but: {error}. "
                "Resume with the configuration of the run that wrote it."
            ) from error


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype that fit a bucket, in order; a large one has a bucket of its own."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if bucket and (size + num_bytes > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += num_bytes
    if bucket:
        yield bucket
