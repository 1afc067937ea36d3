"""Rotary positions whose frequencies depend on how long a sequence is, computed for each sequence of a row by itself.

    longrope      up to the original context one set of factors, beyond it another (https://arxiv.org/abs/2402.13753)
    dynamic NTK   beyond the original context the base grows with every token (https://arxiv.org/abs/2306.15595)

    position_ids [R,T]  0 1 2 3 | 0 1 2 ... 9  --sequence_lengths-->  4 4 4 4 | 10 10 10 ... 10
                                               --one call a regime--> cos, sin [R,T,D], as if each sequence were alone

transformers looks at the longest position of a whole batch, and with dynamic NTK remembers the longest so far: what a
text was trained with would depend on its neighbours. A prompt is shared only by completions of one regime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

_DEPENDING = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeRegimes:
    """What lengths are computed alike."""

    original: int
    """Tokens up to which nothing is scaled."""
    each: bool
    """Whether beyond it every length has frequencies of its own."""

    def of(self, length: int) -> int:
        """Lengths of the same number are computed alike."""
        if self.each:
            return max(length, self.original)
        return int(length > self.original)


def rope_regimes(config: PretrainedConfig) -> RopeRegimes | None:
    """Those of a model; None where frequencies do not depend on lengths."""
    text: Any = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for each in kinds:
        kind = each.get("rope_type")
        if kind in _DEPENDING:
            original = text.max_position_embeddings
            if kind == "longrope":
                original = each.get("original_max_position_embeddings") or original
            return RopeRegimes(original=int(original), each=kind == "dynamic")
    return None


def sequence_lengths(position_ids: Tensor) -> Tensor:
    """Of the sequence that each token of [R, T] belongs to, 1 + its last position.

    A sequence begins at position 0; where positions go back to another, a completion goes on from the same prompt.
    """
    numbers = (position_ids == 0).cumsum(dim=1)
    ends = torch.zeros(position_ids.shape[0], position_ids.shape[1] + 1, dtype=torch.int64, device=position_ids.device)
    ends.scatter_reduce_(1, numbers, position_ids + 1, reduce="amax")
    return ends.gather(1, numbers)


def compute_by_sequence(model: nn.Module) -> None:
    """Let the rotary modules of a model look at each sequence by itself, where that makes a difference."""
    config = getattr(model, "config", None)
    regimes = rope_regimes(config) if isinstance(config, PretrainedConfig) else None
    if regimes is None:
        return
    for module in model.modules():
        if hasattr(module, "rope_type") and hasattr(module, "original_inv_freq") and not hasattr(module, "regimes"):
            setattr(module, "forward", _by_sequence(module.forward, regimes))  # noqa: B010
            setattr(module, "regimes", regimes)  # noqa: B010  (marks it as done)


def _by_sequence(plain: Callable[..., Any], regimes: RopeRegimes) -> Callable[..., Any]:
    @torch.no_grad()
    def forward(x: Tensor, position_ids: Tensor, *further: Any, **named: Any) -> Any:
        """Cosines and sines of positions [R, T], the sequences of one regime after those of the other."""
        lengths = sequence_lengths(position_ids)
        keys = lengths.clamp(min=regimes.original) if regimes.each else lengths > regimes.original
        found: tuple[Tensor, ...] | None = None
        for key in torch.unique(keys):
            chosen = keys == key
            if regimes.each:  # it remembers the longest so far, until it meets a short one
                plain(x, torch.zeros_like(position_ids[:1, :1]), *further, **named)
            values = plain(x, torch.where(chosen, position_ids, 0), *further, **named)
            place = chosen.unsqueeze(-1)
            if found is not None:
                values = tuple(torch.where(place, new, old) for new, old in zip(values, found, strict=True))
            found = values
        return found

    return forward
