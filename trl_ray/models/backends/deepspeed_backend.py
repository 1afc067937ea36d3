"""DeepSpeed: gradients, optimizer and weights are sharded over the ranks, as far as the ZeRO stage says.

    stage 0, 1: loss.backward x micro-batches --> reduce: all-reduce or shards --> norm --> update: per shard
    stage 2   : engine.backward, which reduces every micro-batch into shards   --> norm --> update
    stage 3   : the same, and every module gathers its weights around its forward and backward pass

ZeRO: https://arxiv.org/abs/1910.02054. Up to stage 1 nothing is exchanged before `reduce`, so ranks may run different
numbers of passes. The whole model is on every rank while it is loaded; stage 3 shards it from then on.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trl_ray.config.deepspeed import resolve_deepspeed
from trl_ray.config.sections import Dtype, TrainingConfig
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.backends.optimizer import build_optimizer, build_scheduler, load_optimizer
from trl_ray.models.backends.ranks import Ranks
from trl_ray.models.scoring.head import head_weight
from trl_ray.models.scoring.scoring_module import PredictorModule

_STATE = "deepspeed"


class DeepSpeedBackend:
    """See `Backend`; the ranks must have met.

    Args:
        module: the policy, whole, with its weights already those to go on from.
        training: optimizer, schedule and DeepSpeed's configuration.
        total_updates: where the schedule ends.
        ranks: this process's place.

    Raises:
        ConfigError: DeepSpeed's configuration cannot be used.
    """

    def __init__(self, module: PredictorModule, training: TrainingConfig, *, total_updates: int, ranks: Ranks) -> None:
        self._policy, self._ranks = module.policy, ranks
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._max_norm = training.max_grad_norm or math.inf
        head = head_weight(module.policy)
        self._plan = resolve_deepspeed(
            training,
            num_ranks=ranks.size,
            dtype=Dtype.BFLOAT16 if head.dtype == torch.bfloat16 else Dtype.FLOAT32,
            hidden_size=int(module.policy.config.get_text_config().hidden_size),
        )
        self._deepspeed = _import_deepspeed(head.device)
        self._optimizer = self._build_optimizer(training)
        self._scheduler = build_scheduler(self._optimizer, training, total_steps=total_updates)
        self._engine = self._start_engine(module)
        self.in_step = self._plan.shards_gradients
        self.shards_weights = self._plan.shards_weights
        self.module: nn.Module = self._engine if self.in_step else module

    def _build_optimizer(self, training: TrainingConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self._policy, training)
        if not self._plan.offload or self._plan.torch_adam:
            return optimizer
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        adam: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return adam

    def _start_engine(self, module: PredictorModule) -> Any:
        assert dist.is_initialized(), "the ranks must meet before DeepSpeed starts"
        try:
            engine, *_ = self._deepspeed.initialize(
                model=module, optimizer=self._optimizer, config=self._plan.config, dist_init_required=False
            )
        except (ValueError, AssertionError, TypeError) as error:
            raise ConfigError(f"DeepSpeed must accept its configuration {self._plan.config}, but: {error}") from error
        engine.set_gradient_accumulation_boundary(False)
        return engine

    @property
    def learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        scaled = loss * self._ranks.size  # DeepSpeed takes the mean over ranks where the sum is wanted
        if self.in_step:
            self._engine.set_gradient_accumulation_boundary(is_last)
            self._engine.backward(scaled, scale_wrt_gas=False)
        else:
            scaled.backward()  # type: ignore[no-untyped-call]

    def reduce(self) -> float:
        """Shards are scaled down by DeepSpeed itself, in `update`."""
        if not self.in_step:
            self._reduce_whole_gradients()
        if not self._plan.shards_optimizer:
            return float(torch.nn.utils.clip_grad_norm_(self._trained, self._max_norm))
        squares = [torch.linalg.vector_norm(shard.float()).square() for shard in self._gradient_shards()]
        total = torch.stack(squares).sum().to(self._engine.device)
        dist.all_reduce(total)
        return math.sqrt(float(total)) if total >= 0 else math.nan

    def _reduce_whole_gradients(self) -> None:
        for parameter in self._trained:
            if parameter.grad is None:  # ranks must reduce the same tensors, and a shard has no place for "none"
                parameter.grad = torch.zeros_like(parameter)
        self._engine.set_gradient_accumulation_boundary(True)
        if self._plan.shards_optimizer:
            self._engine.optimizer.setup_buckets()  # a backward pass has done that, but this rank may have had none
        self._engine.allreduce_gradients()

    def _gradient_shards(self) -> list[Tensor]:
        """This rank's part of the reduced gradients."""
        if self._plan.offload:
            return [shard.grad for shard in self._weight_shards() if shard.grad is not None]
        groups = self._engine.optimizer.averaged_gradients.values()
        return [gradient for group in groups for gradient in group or () if gradient is not None]

    def _weight_shards(self) -> list[Tensor]:
        """This rank's part of the float32 weights, flat; what the optimizer's state is kept by."""
        optimizer = self._engine.optimizer
        name = "fp32_partitioned_groups_flat" if self.shards_weights else "single_partition_of_fp32_groups"
        return list(getattr(optimizer, name))

    def update(self) -> None:
        stale = self._gradient_shards() if self.shards_weights else []
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        self._finish(stale)

    def discard(self) -> None:
        stale = self._gradient_shards() if self.shards_weights else []
        if self._plan.shards_optimizer:
            self._drop_shards()
        self._finish(stale)

    def _drop_shards(self) -> None:
        """Do what DeepSpeed does with gradients that overflow."""
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if not self.shards_weights:
            optimizer.micro_step_id = -1
            release = getattr(optimizer, "_release_preflattened_grad_buffers", None)
            if release is not None:  # younger versions accumulate float32 gradients of bfloat16 weights there
                release()
            optimizer.all_grad_tensors.update(dict.fromkeys(optimizer.all_grad_tensors))
        if self._plan.offload:
            optimizer.reset_cpu_buffers()
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    def _finish(self, stale: list[Tensor]) -> None:
        for shard in stale:  # stage 3 keeps the buffers, and would add to what a parameter without gradient left there
            shard.zero_()
        for parameter in self._trained:
            parameter.grad = None
        self._engine.set_gradient_accumulation_boundary(False)
        with warnings.catch_warnings():
            # torch warns when the very first step is one that is skipped.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            self._scheduler.step()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._policy.named_parameters():
            with self.gather([parameter]):
                yield name, parameter.data

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Does nothing where they are whole."""
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(list(parameters))
        return gathered

    def save_state(self, directory: Path) -> dict[str, Any]:
        """From stage 1 on every rank writes a file of its shards, to a folder that all of them see."""
        state: dict[str, Any] = {"scheduler": self._scheduler.state_dict(), _STATE: self._layout()}
        if not self._plan.shards_optimizer:
            return state | {"optimizer": self._optimizer.state_dict()}
        self._together(directory, lambda: self._write_shards(directory))
        return state

    def _layout(self) -> dict[str, int | bool]:
        return {"zero_stage": self._plan.stage, "num_ranks": self._ranks.size, "bf16": self._plan.bf16}

    def _shard_file(self, directory: Path) -> Path:
        return directory / f"optimizer-{self._ranks.rank}-of-{self._ranks.size}.pt"

    def _write_shards(self, directory: Path) -> None:
        shards = self._weight_shards()
        states = [dict(self._optimizer.state.get(shard, {})) for shard in shards]
        # Float32 weights are in the model's own files.
        weights = [shard.data for shard in shards] if self._plan.bf16 else None
        sizes = [shard.numel() for shard in shards]
        torch.save({"sizes": sizes, "states": states, "weights": weights}, self._shard_file(directory))

    def load_state(self, directory: Path, state: dict[str, Any]) -> None:
        """Shards fit the number of ranks and the stage that wrote them."""
        found, wanted = state.get(_STATE, {"zero_stage": 0}), self._layout()
        if found["zero_stage"] != self._plan.stage or (self._plan.shards_optimizer and found != wanted):
            raise CheckpointError(
                f"the optimizer state in {directory} must be of this run's {wanted}, but is of {found}. Resume with "
                "the number of ranks and the DeepSpeed configuration of the run that wrote it, or start a new run with "
                f"model_name_or_path={directory}."
            )
        self._together(directory, lambda: self._read_state(directory, state))

    def _read_state(self, directory: Path, state: dict[str, Any]) -> None:
        if not self._plan.shards_optimizer:
            load_optimizer(self._optimizer, state["optimizer"])
        else:
            self._read_shards(directory)
        self._scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self._optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _read_shards(self, directory: Path) -> None:
        saved = torch.load(self._shard_file(directory), map_location="cpu", weights_only=True)
        shards = self._weight_shards()
        sizes = [shard.numel() for shard in shards]
        if saved["sizes"] != sizes:
            raise ValueError(f"its shards have {saved['sizes']} elements, those of this model {sizes}")
        for index, shard in enumerate(shards):
            values = saved["states"][index]
            self._optimizer.state[shard] = {
                key: value.to(shard.device) if isinstance(value, Tensor) else value for key, value in values.items()
            }
            if saved["weights"] is not None:
                shard.data.copy_(saved["weights"][index])

    def _together(self, directory: Path, action: Callable[[], None]) -> None:
        """Do it on every rank, and fail on all of them if it fails on one: the others would wait for it."""
        problem: str | None = None
        try:
            action()
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            problem = f"{type(error).__name__}: {error}"
        problems = self._ranks.gather(problem)
        for rank, told in enumerate(problems):
            if told is not None:
                raise CheckpointError(
                    f"the optimizer state of every rank must be readable and writable in {directory}, but rank {rank} "
                    f"met {told}. All ranks need to see the same folder; or use another checkpoint."
                )


def _import_deepspeed(device: torch.device) -> Any:
    """Import it, ready for the process group that is there.

    On a CPU it would compile an operation for inference, which takes a minute and is not used here.
    """
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # where DeepSpeed looks for its device, in stage 3 in every pass
    import deepspeed
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    _forget_other_ranks(groups)
    return deepspeed


_worlds: list[object] = []
"""The process group that DeepSpeed's own groups were made in; at most one."""


def _forget_other_ranks(groups: ModuleType) -> None:
    """DeepSpeed keeps its groups for good; a learner that starts again in the same process has met others since."""
    if _worlds != [dist.group.WORLD] and _worlds:
        importlib.reload(groups)
    _worlds[:] = [dist.group.WORLD]
