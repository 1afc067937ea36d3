"""Writes a model that nothing wraps, without asking for the libraries that might have wrapped it.

model.save_pretrained --> transformers: unwrap --> accelerate: is it DeepSpeed's? --> imports DeepSpeed: not here
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def save_plain(model: Any, folder: str | Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """`save_pretrained`, with other weights than the model's own where they are given."""
    with _deepspeed_only_if_used():
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))


@contextmanager
def _deepspeed_only_if_used() -> Iterator[None]:
    """A run without DeepSpeed does not import it for its first checkpoint: that takes seconds, and it speaks.

    accelerate imports DeepSpeed wherever it is installed, to see whether a model is one of its engines.
    """
    asking: Any = importlib.import_module("accelerate.utils.other")
    before = asking.is_deepspeed_available
    asking.is_deepspeed_available = lambda: sys.modules.get("deepspeed") is not None and before()
    try:
        yield
    finally:
        asking.is_deepspeed_available = before
