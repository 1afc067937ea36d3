"""The state of this process's random generators: taken, set, and kept while something draws from them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def compute_deterministically() -> None:
    """Have torch take deterministic kernels alone in this process; before it touches a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def random_state() -> dict[str, Any]:
    """Of torch's generators, of the CPU and of all GPUs."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on from what `random_state` gave; where there are other GPUs than then, theirs stay as they are."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Whatever is drawn inside, it is as if nothing had been."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
