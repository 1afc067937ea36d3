"""What the chunked language-model head is given and what it finds; shared by the torch and the Triton path.

gradient at logits [C,T] --> hidden [C,H] += · weight [T,H]     weight [T,H] += ·ᵀ hidden [C,H]     bias [T] += Σ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

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


class TopTokens:
    """The K largest logits seen so far."""

    def __init__(self, problem: HeadProblem, top_k: int) -> None:
        self._k = min(top_k, problem.weight.shape[0])
        self.logits: Tensor | None = None
        """[C, K] in the unit they were given in, largest first."""
        self.ids: Tensor | None = None
        """[C, K]"""

    def fold(self, tile: Tensor, columns: slice) -> None:
        """Take in the logits [C, T] of one vocabulary tile."""
        logits, ids = tile.topk(min(self._k, tile.shape[1]), dim=-1)
        ids = ids + columns.start
        if self.logits is not None and self.ids is not None:
            logits, order = torch.cat((self.logits, logits), dim=-1).topk(
                min(self._k, self.logits.shape[1] + logits.shape[1]), dim=-1
            )
            ids = torch.cat((self.ids, ids), dim=-1).gather(1, order)
        self.logits, self.ids = logits, ids


def joined(parts: Sequence[HeadResult], kept: dict[tuple[int, int], KeptTile]) -> HeadResult:
    """The results of all token tiles as one."""

    def wanted(values: Sequence[Tensor | None]) -> Tensor | None:
        found = [value for value in values if value is not None]
        return None if not found else found[0] if len(found) == 1 else torch.cat(found)

    def whole(values: Sequence[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.cat(list(values))

    return HeadResult(
        logprobs=whole([part.logprobs for part in parts]),
        entropy=whole([part.entropy for part in parts]),
        log_total=whole([part.log_total for part in parts]),
        sum_squared_probs=wanted([part.sum_squared_probs for part in parts]),
        top1=wanted([part.top1 for part in parts]),
        top_ids=wanted([part.top_ids for part in parts]),
        top_logprobs=wanted([part.top_logprobs for part in parts]),
        mean_logprobs=wanted([part.mean_logprobs for part in parts]),
        support_logprobs=wanted([part.support_logprobs for part in parts]),
        kept=kept,
    )


class GradientTotals:
    """Gradients being summed up in float32 (float64), a tile at a time."""

    def __init__(self, problem: HeadProblem, needs: tuple[bool, bool, bool]) -> None:
        self._problem = problem
        device, dtype = problem.hidden.device, problem.dtype
        self._hidden = torch.zeros_like(problem.hidden) if needs[0] else None
        self._weight = torch.empty(problem.weight.shape, dtype=dtype, device=device) if needs[1] else None
        self._bias: Tensor | None = None
        if needs[2] and problem.bias is not None:
            self._bias = torch.zeros_like(problem.bias, dtype=dtype)
        self._is_first = True

    def begin(self, chosen: slice | Tensor, scaled: Tensor, factors: Tensor | None) -> None:
        """Begin a token tile.

        Args:
            chosen: which tokens it holds.
            scaled: [C, H] their hidden states, times the factors.
            factors: [C] what the rows of the gradients that follow are yet to be multiplied by; None is 1.
        """
        self._chosen, self._factors, self._scaled = chosen, factors, scaled
        self._part = None if self._hidden is None else torch.zeros_like(scaled, dtype=self._problem.dtype)

    def add(self, grad: Tensor, columns: slice) -> None:
        """Add what the gradient at the logits [C, T] of one tile contributes."""
        if self._part is not None:
            _accumulate(self._part, grad, self._problem.weight[columns].to(grad.dtype))
        if self._weight is not None:
            part = self._weight[columns]
            if self._is_first and grad.dtype == part.dtype:
                torch.mm(grad.T, self._scaled, out=part)
            else:
                _accumulate(part.zero_() if self._is_first else part, grad.T, self._scaled)
        if self._bias is not None and self._factors is not None:
            self._bias[columns].addmv_(grad.T, self._factors)
        elif self._bias is not None:
            self._bias[columns] += grad.sum(dim=0, dtype=self._bias.dtype)

    def end(self) -> None:
        """End a token tile."""
        if self._hidden is not None and self._part is not None:
            part = self._part if self._factors is None else self._part.mul_(self._factors[:, None])
            self._hidden[self._chosen] = part.to(self._hidden.dtype)
        self._is_first = False

    def result(self) -> HeadGradients:
        """The sums, in the dtypes of what they belong to."""
        if self._is_first and self._weight is not None:
            self._weight.zero_()
        bias = self._problem.bias
        return HeadGradients(
            hidden=self._hidden,
            weight=None if self._weight is None else self._weight.to(self._problem.weight.dtype),
            bias=None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; products of half precision are not rounded to it, which would bias the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def with_gradient(upstream: Upstream, rows: slice) -> slice | Tensor | None:
    """Which tokens of a tile have a gradient: all of it, some indices, or None of them."""
    grads = (upstream.logprobs, upstream.entropy, upstream.mean_logprobs)
    found = [grad != 0 for grad in grads if grad is not None]
    if upstream.support is not None:
        found.append((upstream.support != 0).any(dim=-1))
    return active_rows(reduce(torch.logical_or, found), rows)


def active_rows(active: Tensor, rows: slice) -> slice | Tensor | None:
    """The tokens of a tile that are True in `active` [C]: all of it, some indices, or None of them."""
    indices = active.nonzero().squeeze(1)
    if len(indices) == len(active):
        return rows
    return indices + rows.start if len(indices) else None
