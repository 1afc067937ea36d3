"""What the chunked language-model head is given and what it finds; shared by the torch and the Triton path."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

LN2 = math.log(2.0)
FLOOR = -1e30
"""Stands for a logit of minus infinity: its probability is 0 and 0 times it is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What a model does to the output of its head: ``softcap · tanh(scale · x / softcap)``, or ``scale · x``."""

    scale: float = 1.0
    """> 0; Cohere's logit_scale, 1 / Granite's logits_scaling."""
    softcap: float | None = None
    """> 0; Gemma's final_logit_softcapping; None caps nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraOutputs:
    """What is computed besides log-probs and entropy; not differentiable where nothing else is said."""

    sum_squared_probs: bool = False
    top1: bool = False
    top_k: int = 0
    """How many of the most probable tokens to report; 0 reports none."""
    top_gradient: bool = False
    """Whether the log-probs of those are differentiable."""
    mean_logprobs: bool = False
    """The mean log-prob over the vocabulary; differentiable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """How much is projected at a time."""

    tokens: int
    vocab: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadProblem:
    """A head, and the tokens it is to judge."""

    hidden: Tensor
    """[N, H] final hidden states."""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    targets: Tensor
    """[N] int64 token ids."""
    temperature: float
    transform: LogitTransform
    compute_dtype: torch.dtype
    """Of the products hidden · weight in the forward pass."""
    tile: TileShape
    support: Tensor | None = None
    """[N, K] int64 further token ids whose log-probs are asked for; those outside the vocabulary stand for none."""

    @property
    def dtype(self) -> torch.dtype:
        """What is summed up in: float32, or float64 where the products are."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def slope(self) -> float:
        """Derivative of the tempered logits by the head's output, but for the soft-capping."""
        return self.transform.scale / self.temperature

    @property
    def factor(self) -> float:
        """What the head's output is multiplied by: into base 2, or into what the tanh of the soft-capping takes."""
        softcap = self.transform.softcap
        return self.slope / LN2 if softcap is None else self.transform.scale / softcap

    @property
    def cap(self) -> float | None:
        """The cap of the logits in base 2, after the temperature."""
        softcap = self.transform.softcap
        return None if softcap is None else softcap / (self.temperature * LN2)

    def token_tiles(self) -> list[slice]:
        """Cuts of N of equal length."""
        return _cuts(self.hidden.shape[0], self.tile.tokens)

    def vocab_tiles(self) -> list[slice]:
        """Cuts of V of equal length."""
        return _cuts(self.weight.shape[0], self.tile.vocab)

    @property
    def tile_size(self) -> int:
        """Entries of the largest tile."""
        return min(self.tile.tokens, self.hidden.shape[0]) * min(self.tile.vocab, self.weight.shape[0])

    def buffer(self) -> Tensor:
        """Uninitialised room for one tile."""
        return torch.empty(self.tile_size, dtype=self.dtype, device=self.hidden.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptTile:
    """Logits [C, T] in base 2, less the [C] that was subtracted from them."""

    logits: Tensor
    shift: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadResult:
    """What a forward pass finds for N tokens."""

    logprobs: Tensor
    """[N] nats"""
    entropy: Tensor
    """[N] nats"""
    log_total: Tensor
    """[N] log2 of the sum of all exponentials; the backward pass needs it."""
    sum_squared_probs: Tensor | None = None
    """[N]"""
    top1: Tensor | None = None
    """[N] bool: the target is the first of the most probable tokens."""
    top_ids: Tensor | None = None
    """[N, K] int64, most probable first."""
    top_logprobs: Tensor | None = None
    """[N, K] nats"""
    mean_logprobs: Tensor | None = None
    """[N] nats"""
    support_logprobs: Tensor | None = None
    """[N, K] nats; -inf where an id stands for no token."""
    kept: dict[tuple[int, int], KeptTile] = field(default_factory=dict)
    """By token tile and vocabulary tile."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadGradients:
    """Gradients of hidden states [N, H], weight [V, H] and bias [V], in their dtypes; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upstream:
    """Gradients that reach the outputs [N], and what is known of these tokens."""

    logprobs: Tensor | None
    entropy: Tensor | None
    entropy_value: Tensor
    log_total: Tensor
    mean_logprobs: Tensor | None = None
    support: Tensor | None = None
    """[N, K] gradients that reach the log-probs of further tokens; 0 where an id stands for none."""
    support_ids: Tensor | None = None
    """[N, K] int64"""

    def select(self, rows: slice | Tensor) -> Upstream:
        """Those of some tokens."""
        return Upstream(
            logprobs=None if self.logprobs is None else self.logprobs[rows],
            entropy=None if self.entropy is None else self.entropy[rows],
            entropy_value=self.entropy_value[rows],
            log_total=self.log_total[rows],
            mean_logprobs=None if self.mean_logprobs is None else self.mean_logprobs[rows],
            support=None if self.support is None else self.support[rows],
            support_ids=None if self.support_ids is None else self.support_ids[rows],
        )


def _cuts(size: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def _length(cut: slice | Tensor) -> int:
    return cut.stop - cut.start if isinstance(cut, slice) else cut.shape[0]


def tile_view(buffer: Tensor, rows: slice | Tensor, columns: slice) -> Tensor:
    """The beginning of a buffer as a tile [C, T]."""
    tokens, words = _length(rows), _length(columns)
    return buffer[: tokens * words].view(tokens, words)
