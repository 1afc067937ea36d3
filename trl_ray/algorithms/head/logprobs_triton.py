"""The chunked language-model head on CUDA: tiles of logits from cuBLAS, folded and turned into gradients by Triton.

    forward    hidden [C,H] · weight [T,H]ᵀ --> tile [C,T] --_fold_kernel--> running statistics [C]
    backward   the same tile again --_gradient_kernel, in place--> gradient at logits [C,T] --> head_gradients

Same results as `logprobs_tiles`, its reference. The tile is in the compute dtype, everything else in float32; each
kernel reads a tile once. Logits are in base 2, as there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

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

if importlib.util.find_spec("triton") is not None:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]

_BLOCK = 2048
"""Logits of one token that a program handles at a time."""


def _jit(kernel: Callable[..., Any]) -> Any:
    """A Triton kernel; where Triton is missing the module still imports, and `logprobs` does not call it."""
    return kernel if importlib.util.find_spec("triton") is None else triton.jit(kernel)


def forward(problem: HeadProblem, extras: ExtraOutputs, *, keep: bool) -> HeadResult:
    """As `logprobs_tiles.forward`; no logits are kept."""
    del keep
    buffer = _buffer(problem)
    parts = [] if len(problem.targets) else [_Statistics(problem, slice(0, 0), extras).result(problem)]
    for rows in problem.token_tiles():
        hidden = problem.hidden[rows].to(problem.compute_dtype)
        state = _Statistics(problem, rows, extras)
        for columns in problem.vocab_tiles():
            tile = _project(problem, hidden, columns, out=tile_view(buffer, rows, columns))
            state.fold(problem, tile, columns)
        parts.append(state.result(problem))
    return joined(parts, {})


def backward(
    problem: HeadProblem, upstream: Upstream, kept: dict[tuple[int, int], KeptTile], *, needs: tuple[bool, bool, bool]
) -> HeadGradients:
    """As `logprobs_tiles.backward`."""
    assert not kept, "the forward pass keeps nothing"
    totals = GradientTotals(problem, needs)
    buffer = _buffer(problem)
    for rows in problem.token_tiles():
        chosen = with_gradient(upstream.select(rows), rows)
        if chosen is None:
            continue
        hidden = problem.hidden[chosen].to(problem.compute_dtype)
        totals.begin(chosen, hidden, None)
        part, targets = upstream.select(chosen), problem.targets[chosen].contiguous()
        for columns in problem.vocab_tiles():
            tile = _project(problem, hidden, columns, out=tile_view(buffer, hidden, columns))
            _gradient(problem, tile, targets, part, columns)
            totals.add(tile, columns)
        totals.end()
    return totals.result()


def _buffer(problem: HeadProblem) -> Tensor:
    return torch.empty(problem.tile_size, dtype=problem.compute_dtype, device=problem.hidden.device)


def _project(problem: HeadProblem, hidden: Tensor, columns: slice, *, out: Tensor) -> Tensor:
    """The head's output [C, T] without its bias, in the compute dtype."""
    return torch.mm(hidden, problem.weight[columns].to(problem.compute_dtype).T, out=out)


def _bias(problem: HeadProblem, columns: slice) -> Tensor | None:
    return None if problem.bias is None else problem.bias[columns].float()


class _Statistics:
    """Running sums of C tokens over vocabulary tiles."""

    def __init__(self, problem: HeadProblem, rows: slice, extras: ExtraOutputs) -> None:
        targets = problem.targets[rows]

        def filled(value: float) -> Tensor:
            return torch.full((len(targets),), value, dtype=torch.float32, device=targets.device)

        self._targets = targets.contiguous()
        self._extras = extras
        self._peak, self._total, self._moment, self._squares = (
            filled(FLOOR),
            filled(0.0),
            filled(0.0),
            filled(0.0),
        )
        self._chosen = filled(-float("inf"))
        self._best, self._best_id = filled(-float("inf")), torch.full_like(self._targets, -1)
        self._top = TopTokens(problem, extras.top_k) if extras.top_k else None
        self._support: Tensor | None = None
        self._support_ids = None if problem.support is None else problem.support[rows]
        if self._support_ids is not None:
            self._support = torch.full_like(self._support_ids, -float("inf"), dtype=torch.float32)

    def fold(self, problem: HeadProblem, tile: Tensor, columns: slice) -> None:
        """Take in one tile [C, T]."""
        bias = _bias(problem, columns)
        if self._top is not None:
            self._top.fold(tile.float() if bias is None else tile + bias, columns)
        if self._support is not None and self._support_ids is not None:
            local = self._support_ids - columns.start
            inside = (local >= 0) & (local < tile.shape[1])
            output = _outputs(tile, bias, local.clamp(0, tile.shape[1] - 1))
            self._support = torch.where(inside, _base2(problem, output), self._support)
        _fold_kernel[(tile.shape[0],)](
            tile,
            tile.stride(0),
            tile if bias is None else bias,
            self._targets,
            self._peak,
            self._total,
            self._moment,
            self._squares,
            self._chosen,
            self._best,
            self._best_id,
            columns.start,
            tile.shape[1],
            problem.factor,
            problem.cap or 0.0,
            HAS_BIAS=bias is not None,
            HAS_CAP=problem.cap is not None,
            HAS_SQUARES=self._extras.sum_squared_probs,
            HAS_TOP1=self._extras.top1,
            FLOOR=FLOOR,
            BLOCK=_BLOCK,
        )

    def result(self, problem: HeadProblem) -> HeadResult:
        log_total = self._peak + self._total.log2()
        top = self._top
        values = None
        if top is not None and top.logits is not None:
            values = (_base2(problem, top.logits) - log_total[:, None]) * LN2
        return HeadResult(
            logprobs=(self._chosen - log_total) * LN2,
            entropy=(self._total.log2() - self._moment / self._total) * LN2,
            log_total=log_total,
            sum_squared_probs=self._squares / self._total.square() if self._extras.sum_squared_probs else None,
            top1=self._best_id == self._targets if self._extras.top1 else None,
            top_ids=None if top is None else top.ids,
            top_logprobs=values,
            support_logprobs=None if self._support is None else (self._support - log_total[:, None]) * LN2,
        )


def _outputs(tile: Tensor, bias: Tensor | None, places: Tensor) -> Tensor:
    """The head's outputs [C, K] at places [C, K] of a tile [C, T], with the bias [T]."""
    found = tile.gather(1, places).float()
    return found if bias is None else found + bias[places]


def _base2(problem: HeadProblem, output: Tensor) -> Tensor:
    """Logits in base 2 from the head's outputs with bias."""
    logits = output * problem.factor
    return logits if problem.cap is None else logits.tanh() * problem.cap


def _gradient(problem: HeadProblem, tile: Tensor, targets: Tensor, upstream: Upstream, columns: slice) -> None:
    """Overwrite the head's output [C, T] with the gradient at it."""
    bias = _bias(problem, columns)
    grad_lp = None if upstream.logprobs is None else upstream.logprobs.contiguous()
    at_ids: tuple[tuple[Tensor, Tensor], Tensor] | None = None
    if upstream.support is not None:
        # The kernel does what all of them share, -p times their sum; each one's own part is added at its id.
        at_ids = _gradient_at_ids(problem, tile, bias, targets, upstream, columns)
        targets = torch.full_like(targets, -1)
        shared = upstream.support.sum(dim=-1)
        grad_lp = (shared if grad_lp is None else shared + grad_lp).contiguous()
    grad_h = None if upstream.entropy is None else upstream.entropy.contiguous()
    log_total = upstream.log_total.contiguous()
    _gradient_kernel[(tile.shape[0], triton.cdiv(tile.shape[1], _BLOCK))](
        tile,
        tile.stride(0),
        tile if bias is None else bias,
        targets,
        log_total,
        upstream.entropy_value.contiguous(),
        log_total if grad_lp is None else grad_lp,
        log_total if grad_h is None else grad_h,
        columns.start,
        tile.shape[1],
        problem.factor,
        problem.cap or 0.0,
        problem.slope,
        HAS_BIAS=bias is not None,
        HAS_CAP=problem.cap is not None,
        HAS_LOGPROB=grad_lp is not None,
        HAS_ENTROPY=grad_h is not None,
        FLOOR=FLOOR,
        BLOCK=_BLOCK,
    )
    if at_ids is not None:
        tile.index_put_(at_ids[0], at_ids[1].to(tile.dtype), accumulate=True)


def _gradient_at_ids(
    problem: HeadProblem, tile: Tensor, bias: Tensor | None, targets: Tensor, upstream: Upstream, columns: slice
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Places in the tile of targets and further tokens, and what is to be added there to the gradient."""
    assert upstream.support is not None and upstream.support_ids is not None, "gradients come with their ids"
    at_target = torch.zeros_like(upstream.log_total) if upstream.logprobs is None else upstream.logprobs
    grads = torch.cat((at_target[:, None], upstream.support), dim=1)
    local = torch.cat((targets[:, None], upstream.support_ids), dim=1) - columns.start
    inside = (local >= 0) & (local < tile.shape[1])
    grads = grads * problem.slope
    if problem.cap is not None:
        curve = (_outputs(tile, bias, local.clamp(0, tile.shape[1] - 1)) * problem.factor).tanh()
        grads = grads * (1.0 - curve.square())
    rows, which = inside.nonzero(as_tuple=True)
    return (rows, local[rows, which]), grads[rows, which]


@_jit
def _base2_logits(output, bias_ptr, offsets, mask, factor, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits in base 2 and their tanh (0 without a cap), from the head's output."""
    z = output.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offsets, mask=mask, other=0.0)
    z = z * factor
    curve = tl.zeros_like(z)
    if HAS_CAP:
        curve = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        z = cap * curve
    return z, curve


@_jit
def _fold_kernel(  # type: ignore[no-untyped-def]
    tile_ptr,
    stride,
    bias_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    moment_ptr,
    squares_ptr,
    chosen_ptr,
    best_ptr,
    best_id_ptr,
    first,
    width,
    factor,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: its row of a tile into its running statistics."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(target_ptr + row) - first
    peak = tl.load(peak_ptr + row)
    total = tl.load(total_ptr + row)
    moment = tl.load(moment_ptr + row)
    squares = tl.load(squares_ptr + row)
    chosen = tl.load(chosen_ptr + row)
    best = tl.load(best_ptr + row)
    best_id = tl.load(best_id_ptr + row)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < width
        output = tl.load(tile_ptr + row * stride + offsets, mask=mask, other=0.0)
        z, _ = _base2_logits(output, bias_ptr, offsets, mask, factor, cap, HAS_BIAS, HAS_CAP)
        z = tl.where(mask, z, -float("inf"))
        if (local >= start) & (local < start + BLOCK):
            chosen = tl.sum(tl.where(offsets == local, z, 0.0), axis=0)
        if HAS_TOP1:
            largest = tl.max(z, axis=0)
            place = tl.min(tl.where(z == largest, offsets, width), axis=0)
            best_id = tl.where(largest > best, (first + place).to(tl.int64), best_id)
            best = tl.maximum(best, largest)
        z = tl.maximum(z, FLOOR)
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        step = peak - new_peak
        rescale = tl.exp2(step)
        z = z - new_peak
        e = tl.where(mask, tl.exp2(z), 0.0)
        moment = (moment + step * total) * rescale + tl.sum(e * z, axis=0)
        total = total * rescale + tl.sum(e, axis=0)
        if HAS_SQUARES:
            squares = squares * rescale * rescale + tl.sum(e * e, axis=0)
        peak = new_peak
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, total)
    tl.store(moment_ptr + row, moment)
    tl.store(chosen_ptr + row, chosen)
    if HAS_SQUARES:
        tl.store(squares_ptr + row, squares)
    if HAS_TOP1:
        tl.store(best_ptr + row, best)
        tl.store(best_id_ptr + row, best_id)


@_jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    tile_ptr,
    stride,
    bias_ptr,
    target_ptr,
    log_total_ptr,
    entropy_ptr,
    grad_lp_ptr,
    grad_h_ptr,
    first,
    width,
    factor,
    cap,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one token: its outputs into g_lp (1[target] - p) - g_H p (ln p + H), through cap and scale."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < width
    pointers = tile_ptr + row * stride + offsets
    output = tl.load(pointers, mask=mask, other=0.0)
    z, curve = _base2_logits(output, bias_ptr, offsets, mask, factor, cap, HAS_BIAS, HAS_CAP)
    log_p = tl.maximum(z - tl.load(log_total_ptr + row), FLOOR)
    p = tl.exp2(log_p)
    grad = tl.zeros_like(p)
    if HAS_LOGPROB:
        is_target = offsets == tl.load(target_ptr + row) - first
        grad += tl.load(grad_lp_ptr + row) * (tl.where(is_target, 1.0, 0.0) - p)
    if HAS_ENTROPY:
        grad -= tl.load(grad_h_ptr + row) * p * (log_p * 0.6931471805599453 + tl.load(entropy_ptr + row))
    grad = grad * slope
    if HAS_CAP:
        grad = grad * (1.0 - curve * curve)
    tl.store(pointers, grad.to(tile_ptr.dtype.element_ty), mask=mask)
