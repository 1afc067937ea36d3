"""Dropout switched off wherever a model keeps it, and the proof: what it computes in training is what it computes else.

modules   nn.Dropout and its kin; numbers named after dropout, drop path, layer drop, a router's jitter
configs   the same numbers, which some layers read while they compute
probe [2,16] --training mode--> logits == logits <--evaluation mode-- probe
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

from trl_ray.errors import ModelError

_NAMES = ("drop", "jitter")
_KEPT = "_trl_ray_dropout"
"""Attribute of a model: numbers of its configuration as they were, which checkpoints state again."""
_TOLERANCES = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Mean difference of logits that is none, in shares of how far logits lie from their mean; the least dropout is far
beyond."""
_HALF_TOLERANCE = 5e-2


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in modules and in configurations."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) or ("Drop" in type(module).__name__ and hasattr(module, "p")):
            setattr(module, "p", 0.0)  # noqa: B010  (not all of these modules declare it)
        for name in _probabilities(module):
            setattr(module, name, 0.0)
    kept = []
    for config in _configs(model):
        for name, value in _probabilities(config).items():
            kept.append((config, name, value))
            setattr(config, name, 0.0)
    if kept:
        setattr(model, _KEPT, [*getattr(model, _KEPT, []), *kept])


def _probabilities(owner: object) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and any(part in name.lower() for part in _NAMES)
    }


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Those of the model and its parts, each once."""
    waiting = [getattr(module, "config", None) for module in model.modules()]
    found: dict[int, PretrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += list(vars(config).values())
    return list(found.values())


@contextmanager
def stated_dropout(model: nn.Module) -> Iterator[None]:
    """While it is open, configurations say what they said before dropout was switched off: for saving them."""
    kept: list[tuple[PretrainedConfig, str, float]] = getattr(model, _KEPT, [])
    for config, name, value in kept:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in kept:
            setattr(config, name, 0.0)


@torch.no_grad()
def check_without_dropout(model: PreTrainedModel) -> None:
    """Prove on a probe that training mode computes what evaluation mode does.

    Raises:
        ModelError: it does not: something random is left, which nothing here knows how to switch off.
    """
    table: Any = model.get_input_embeddings()
    weight = table.weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], (2, 16), generator=generator).to(weight.device)
    training = model.training
    logits = []
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        for mode in (True, False):
            model.train(mode)
            logits.append(model(input_ids=ids, use_cache=False).logits.float())
    model.train(training)
    spread = float((logits[1] - logits[1].mean(dim=-1, keepdim=True)).abs().mean())
    difference = float((logits[0] - logits[1]).abs().mean())
    if not difference <= _TOLERANCES.get(weight.dtype, _HALF_TOLERANCE) * max(spread, 1e-12):
        raise ModelError(
            f"with disable_dropout=true {type(model).__name__} must compute the same in training as elsewhere, but its "
            f"logits differ by {difference:.3g} on average (they spread by {spread:.3g}): something random is left in "
            "it. Set disable_dropout=false to train with it, or use another model."
        )
