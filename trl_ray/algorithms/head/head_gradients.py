"""The sums that a backward pass through the chunked head fills: gradients of hidden states, weight and bias.

gradient at logits [C,T] --> hidden [C,H] += · weight [T,H]     weight [T,H] += ·ᵀ hidden [C,H]     bias [T] += Σ
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from trl_ray.algorithms.head.head_problem import HeadGradients, HeadProblem, Upstream


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
