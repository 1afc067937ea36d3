"""The processes that train one policy together, and the few things they exchange beside gradients.

rank 0: free_address() --> everybody: Ranks.join(address) --> gather, first --> leave_ranks
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from trl_ray.errors import CheckpointError, RunError

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One process's place among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the one rank that speaks for all."""
        return self.rank == 0

    def gather(self, value: ValueT) -> list[ValueT]:
        """Everybody's value, in the order of ranks; collective. For small things: they are pickled."""
        if self.size == 1:
            return [value]
        values: list[ValueT | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast("list[ValueT]", values)

    def first(self, action: Callable[[], ValueT]) -> ValueT:
        """What rank 0 makes of an action that the others wait for; collective.

        Raises:
            CheckpointError: rank 0 could not write or read what it should; on every rank.
        """
        answer: ValueT | None = None
        problem: CheckpointError | None = None
        if self.is_first:
            try:
                answer = action()
            except CheckpointError as error:
                problem = error
        answer, problem = self.gather((answer, problem))[0]
        if problem is not None:
            raise problem
        return cast("ValueT", answer)


SOLO = Ranks()
"""A process that trains alone."""


def join_ranks(*, rank: int, size: int, address: str, device: torch.device, timeout_s: float) -> Ranks:
    """Meet the other ranks.

    Args:
        rank: from 0.
        size: how many there are.
        address: ``tcp://host:port`` that rank 0 chose.
        device: where tensors live; on a GPU they are exchanged by NCCL, everything else by gloo.
        timeout_s: for meeting, and for every exchange after it.

    Raises:
        RunError: the others did not come in time.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"all {size} ranks of the learner must meet at {address} within {timeout_s:g} s, but rank {rank} did not: "
            f"{error}. Check that the nodes can reach each other."
        ) from error
    return Ranks(rank=rank, size=size)


def leave_ranks() -> None:
    """Part from the other ranks, if they ever met."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def free_address() -> str:
    """``tcp://host:port`` at which other nodes can reach this process."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    return f"tcp://{_own_ip()}:{port}"


def _own_ip() -> str:
    """The address of the interface that leads out; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
