"""The reference of the chunked language-model head: log-probs, entropies and their gradients, a tile at a time.

    for each token tile [C,H]:     for each vocabulary tile [T,H]:
        forward    z [C,T] --> running max, sum of exponentials, sum of z·exponentials, target's z, ...
        backward   z [C,T] --> gradient at z [C,T] --> added to those of hidden states, weight and bias

Logits are kept in base 2 (z · log2 e), since `exp2` is several times faster than `exp` on CPUs; the factor, the
temperature and the logit scale are multiplied into the hidden states. Two or three [C,T] blocks live at once and serve
all tiles. Small problems keep their logits for the backward pass; all others compute them again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trl_ray.algorithms.head.head_problem import (
    FLOOR,
    LN2,
    ExtraOutputs,
    GradientTotals,
    HeadGradients,
    HeadProblem,
    HeadResult,
    KeptTile,
    TopTokens,
    Upstream,
    joined,
    tile_view,
    with_gradient,
)

_KEPT_BYTES = 640 * 2**20
"""Logits that a forward pass may leave to its backward pass: 1024 tokens of a vocabulary of 160 thousand."""
_WORTH_KEEPING = 0.5
"""Share of a problem's logits that must fit into `_KEPT_BYTES`, else none are kept: what is won is this share of a
quarter of the work."""


def forward(problem: HeadProblem, extras: ExtraOutputs, *, keep: bool) -> HeadResult:
    """Log-probs, entropies and the extras of all tokens.

    Args:
        problem: N tokens and a head.
        extras: what else to compute.
        keep: leave logits to the backward pass where that pays.
    """
    room = kept_tiles(problem) if keep else 0
    kept: dict[tuple[int, int], KeptTile] = {}
    shared, scratch = problem.buffer(), problem.buffer()
    parts = [] if len(problem.targets) else [_Statistics(problem, slice(0, 0), extras).result()]
    for row, rows in enumerate(problem.token_tiles()):
        prepared = prepare(problem, problem.hidden[rows])
        state = _Statistics(problem, rows, extras)
        for column, columns in enumerate(problem.vocab_tiles()):
            is_kept = len(kept) < room
            tile = tile_view(problem.buffer() if is_kept else shared, rows, columns)
            project(problem, prepared, columns, out=tile)
            state.fold(tile, tile_view(scratch, rows, columns), columns)
            if is_kept:
                kept[row, column] = KeptTile(logits=tile, shift=state.peak)
        parts.append(state.result())
    return joined(parts, kept)


def backward(
    problem: HeadProblem, upstream: Upstream, kept: dict[tuple[int, int], KeptTile], *, needs: tuple[bool, bool, bool]
) -> HeadGradients:
    """Gradients of hidden states, weight and bias. Tokens whose upstream gradients are 0 cost nothing.

    Args:
        problem: as in the forward pass.
        upstream: gradients of its results.
        kept: logits the forward pass has left; used up.
        needs: which of the three are wanted.
    """
    totals = GradientTotals(problem, needs)
    shared, scratch = problem.buffer(), problem.buffer()
    slopes = None if problem.cap is None else problem.buffer()
    for row, rows in enumerate(problem.token_tiles()):
        chosen = with_gradient(upstream.select(rows), rows)
        if chosen is None:
            continue
        part, targets = upstream.select(chosen), problem.targets[chosen]
        hidden = problem.hidden[chosen]
        prepared = prepare(problem, hidden)
        factors = row_factors(problem, part)
        totals.begin(chosen, hidden.to(problem.dtype) * factors[:, None], factors)
        for column, columns in enumerate(problem.vocab_tiles()):
            left = kept.pop((row, column), None)
            tile = tile_view(shared, hidden, columns) if left is None else left_rows(left.logits, rows, chosen)
            shift = None if left is None else left_rows(left.shift, rows, chosen)
            if left is None:
                project(problem, prepared, columns, out=tile)
            curve = None
            if slopes is not None:
                curve = slope_of_cap(problem, tile, shift, out=tile_view(slopes, hidden, columns))
            tile.sub_((part.log_total if shift is None else part.log_total - shift)[:, None])
            room = tile_view(scratch, hidden, columns)
            grad = gradient_at_logits(tile, room, targets, part, first=columns.start, vocab=problem.weight.shape[0])
            totals.add(grad if curve is None else grad.mul_(curve), columns)
        totals.end()
    return totals.result()


def prepare(problem: HeadProblem, hidden: Tensor) -> Tensor:
    """Hidden states [C, H] in the compute dtype, times what turns logits into base 2 where that costs no precision."""
    hidden = hidden.to(problem.compute_dtype)
    return hidden if problem.compute_dtype != problem.dtype else hidden * problem.factor


def project(problem: HeadProblem, prepared: Tensor, columns: slice, *, out: Tensor) -> Tensor:
    """Tempered, scaled and capped logits [C, T] of one vocabulary tile, in base 2."""
    weight, factor, cap = problem.weight[columns].to(problem.compute_dtype), problem.factor, problem.cap
    if problem.compute_dtype == problem.dtype:
        torch.mm(prepared, weight.T, out=out)
    else:
        out.copy_(prepared @ weight.T).mul_(factor)
    if problem.bias is not None:
        out.add_(problem.bias[columns].to(problem.dtype), alpha=factor)
    return out if cap is None else out.tanh_().mul_(cap)


def row_factors(problem: HeadProblem, upstream: Upstream) -> Tensor:
    """[C] what the rows of `gradient_at_logits` are yet to be multiplied by."""
    if upstream.entropy is None and upstream.mean_logprobs is None and upstream.support is None:
        assert upstream.logprobs is not None, "tokens without a gradient are left out"
        return upstream.logprobs * -problem.slope
    return torch.full_like(upstream.log_total, problem.slope)


def gradient_at_logits(
    tile: Tensor, scratch: Tensor, targets: Tensor, upstream: Upstream, *, first: int, vocab: int
) -> Tensor:
    """Gradient at the logits [C, T], but for `row_factors`.

    p - 1[target] where only log-probs of targets have one, else the sum of g_lp (1[target] - p), -g_H p (ln p + H),
    g_mean (1 / V - p) and g_k (1[id k] - p) for each further token k.

    Args:
        tile: [C, T] log2 of the probabilities; overwritten.
        scratch: [C, T] room.
        targets: [C] ids, which may lie outside this tile.
        upstream: of these tokens.
        first: id of the first token of the tile.
        vocab: V.
    """
    grad_h, grad_mean, grad_support = upstream.entropy, upstream.mean_logprobs, upstream.support
    value = torch.zeros_like(upstream.log_total) if upstream.logprobs is None else upstream.logprobs
    spread = value if grad_mean is None else value + grad_mean
    if grad_support is not None:
        spread = spread + grad_support.sum(dim=-1)
    if grad_h is not None:
        torch.exp2(tile, out=scratch)
        # The floor keeps 0 * -inf, for tokens a model rules out, from being NaN.
        tile.clamp_min_(FLOOR).mul_((grad_h * -LN2)[:, None])
        tile.sub_((spread + grad_h * upstream.entropy_value)[:, None]).mul_(scratch)
    elif grad_mean is not None or grad_support is not None:
        torch.exp2(tile, out=tile).mul_(-spread[:, None])
    else:
        value = torch.full_like(upstream.log_total, -1.0)
        torch.exp2(tile, out=tile)
    if grad_mean is not None:
        tile.add_((grad_mean / vocab)[:, None])
    local = targets - first
    inside = ((local >= 0) & (local < tile.shape[1])).nonzero().squeeze(1)
    tile.index_put_((inside, local[inside]), value[inside], accumulate=True)
    if grad_support is not None:
        assert upstream.support_ids is not None, "gradients of further tokens come with their ids"
        places = upstream.support_ids - first
        rows, which = ((places >= 0) & (places < tile.shape[1])).nonzero(as_tuple=True)
        tile.index_put_((rows, places[rows, which]), grad_support[rows, which], accumulate=True)
    return tile


def target_logits(tile: Tensor, local: Tensor, default: Tensor) -> Tensor:
    """[C] the targets' logits where they lie in this tile [C, T], elsewhere `default` [C]."""
    return support_logits(tile, local[:, None], default[:, None]).squeeze(1)


def support_logits(tile: Tensor, local: Tensor, default: Tensor) -> Tensor:
    """[C, K] logits at positions [C, K] of this tile [C, T], and `default` [C, K] at those that lie outside."""
    value = tile.gather(1, local.clamp(0, tile.shape[1] - 1))
    return torch.where((local >= 0) & (local < tile.shape[1]), value, default)


class _Statistics:
    """Running sums of C tokens over vocabulary tiles, relative to the largest logit so far."""

    def __init__(self, problem: HeadProblem, rows: slice, extras: ExtraOutputs) -> None:
        targets = problem.targets[rows]

        def filled(value: float) -> Tensor:
            return torch.full((len(targets),), value, dtype=problem.dtype, device=targets.device)

        self._targets = targets
        self.peak = filled(FLOOR)
        """[C] the largest logit so far."""
        self._total, self._moment = filled(0.0), filled(0.0)
        self._chosen = filled(-math.inf)
        self._squares = filled(0.0) if extras.sum_squared_probs else None
        self._best = (filled(-math.inf), torch.zeros_like(targets)) if extras.top1 else None
        self._top = TopTokens(problem, extras.top_k) if extras.top_k else None
        self._sum = filled(0.0) if extras.mean_logprobs else None
        self._support: Tensor | None = None
        self._support_ids = None if problem.support is None else problem.support[rows]
        if self._support_ids is not None:
            self._support = torch.full_like(self._support_ids, -math.inf, dtype=problem.dtype)
        self._vocab = problem.weight.shape[0]

    def fold(self, tile: Tensor, scratch: Tensor, columns: slice) -> None:
        """Take in the logits [C, T] of one vocabulary tile, and leave them less the largest so far."""
        self._chosen = target_logits(tile, self._targets - columns.start, self._chosen)
        if self._best is not None:
            place = tile.argmax(dim=-1)  # the first of equals
            value = tile.gather(1, place[:, None]).squeeze(1)
            larger = value > self._best[0]
            self._best = (
                torch.where(larger, value, self._best[0]),
                torch.where(larger, place + columns.start, self._best[1]),
            )
        if self._top is not None:
            self._top.fold(tile, columns)
        if self._sum is not None:
            self._sum.add_(tile.sum(dim=-1))
        if self._support is not None and self._support_ids is not None:
            self._support = support_logits(tile, self._support_ids - columns.start, self._support)
        peak = torch.maximum(self.peak, tile.clamp_min_(FLOOR).amax(dim=-1))
        tile.sub_(peak[:, None])
        torch.exp2(tile, out=scratch)
        step = self.peak - peak
        rescale = step.exp2()
        if self._squares is not None:
            self._squares.mul_(rescale.square()).add_(torch.linalg.vector_norm(scratch, dim=-1).square())
        self._moment.add_(step * self._total).mul_(rescale)
        self._total.mul_(rescale).add_(scratch.sum(dim=-1))
        self._moment.add_(scratch.mul_(tile).sum(dim=-1))
        self.peak = peak

    def result(self) -> HeadResult:
        log_total = self.peak + self._total.log2()
        top = self._top
        return HeadResult(
            logprobs=(self._chosen - log_total).mul_(LN2),
            entropy=(self._total.log2() - self._moment / self._total).mul_(LN2),
            log_total=log_total,
            sum_squared_probs=None if self._squares is None else self._squares / self._total.square(),
            top1=None if self._best is None else self._best[1] == self._targets,
            top_ids=None if top is None else top.ids,
            top_logprobs=None if top is None or top.logits is None else (top.logits - log_total[:, None]).mul_(LN2),
            mean_logprobs=None if self._sum is None else (self._sum / self._vocab - log_total).mul_(LN2),
            support_logprobs=None if self._support is None else (self._support - log_total[:, None]).mul_(LN2),
        )


def slope_of_cap(problem: HeadProblem, tile: Tensor, shift: Tensor | None, *, out: Tensor) -> Tensor:
    """Derivative [C, T] of the capped logits by the uncapped: 1 - tanh²."""
    assert problem.cap is not None, "only capped logits have one"
    if shift is None:
        torch.mul(tile, 1.0 / problem.cap, out=out)
    else:
        torch.add(tile, shift[:, None], out=out).mul_(1.0 / problem.cap)
    return out.square_().neg_().add_(1.0)


def left_rows(left: Tensor, rows: slice, chosen: slice | Tensor) -> Tensor:
    """What was kept of a token tile, of its chosen tokens only."""
    return left if isinstance(chosen, slice) else left[chosen - rows.start]


def kept_tiles(problem: HeadProblem, *, sides: int = 1) -> int:
    """How many tiles of logits may be kept, each of so many heads."""
    size = problem.dtype.itemsize * sides
    whole = problem.hidden.shape[0] * problem.weight.shape[0] * size
    if whole * _WORTH_KEEPING > _KEPT_BYTES:
        return 0
    return int(_KEPT_BYTES // max(problem.tile_size * size, 1))
