"""Log-prob and entropy of chosen tokens from hidden states, a chunk of tokens at a time.

    hidden [N,H] --chunk--> logits [C,V] --> logprob [C], entropy [C]       (logits are dropped)
    backward: the logits of each chunk are computed again; those of the last chunk are still there

At most two [chunk, V] blocks live at once, whatever N is. Rows to be left out are not passed in at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenLogprobs:
    """What a language-model head says about N tokens."""

    logprobs: Tensor
    """[N] float32 natural log-prob of each target at the given temperature."""
    entropy: Tensor
    """[N] float32 entropy in nats of the distribution each target was drawn from."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float,
    chunk_size: int,
    compute_dtype: torch.dtype | None = None,
) -> TokenLogprobs:
    """Log-softmax of ``(hidden @ weight.T + bias) / temperature`` at the targets, and its entropy.

    Matrix products run in `compute_dtype`, everything after them in float32. Both results are differentiable.

    Args:
        hidden: [N, H] final hidden states that predict the targets.
        weight: [V, H] of the language-model head.
        targets: [N] token ids.
        bias: [V], for heads that have one.
        temperature: > 0.
        chunk_size: tokens projected onto the vocabulary at a time.
        compute_dtype: of the matrix products; None keeps the weight's.
    """
    assert hidden.dim() == 2 and hidden.shape[0] == targets.shape[0], "one row of hidden states per target"
    assert temperature > 0 and chunk_size > 0, "temperature and chunk size must be positive"
    logprobs, entropy = _ChunkedHead.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, float(temperature), int(chunk_size), compute_dtype or weight.dtype
    )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Logits [C, V] in float32, divided by the temperature."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    if bias is not None:
        logits += bias.float()
    if temperature != 1.0:
        logits /= temperature
    return logits


class _ChunkedHead(torch.autograd.Function):
    """The projection, log-softmax and entropy as one node of the graph that stores no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        logprobs = torch.empty(n, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        cast_weight, kept = weight.to(dtype), None
        for start in range(0, n, chunk_size):
            kept = None  # frees the block before the next one is made
            rows = slice(start, start + chunk_size)
            logits = _logits(hidden[rows].to(dtype), cast_weight, bias, temperature)
            logits -= logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(1, targets[rows, None]).squeeze(1)
            kept = torch.exp(logits)
            total = kept.sum(dim=-1)
            # H = log Z - sum p z. The clamp keeps 0 * -inf, for tokens a model rules out, from being NaN.
            mean_logit = logits.clamp_min_(torch.finfo(torch.float32).min).mul_(kept).sum(dim=-1) / total
            logprobs[rows] = chosen - total.log()
            entropy[rows] = total.log() - mean_logit
            kept /= total[:, None]
            del logits
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.settings = (temperature, chunk_size, dtype)
        ctx.kept = kept if any(ctx.needs_input_grad[:3]) else None
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        temperature, chunk_size, dtype = ctx.settings
        if grads[0] is None and grads[1] is None:
            return (None,) * 7
        cast_weight = weight.to(dtype)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        # Last chunk first: its probabilities are the ones the forward pass left behind.
        for start in reversed(range(0, hidden.shape[0], chunk_size)):
            rows = slice(start, start + chunk_size)
            part = hidden[rows].to(dtype)
            probs, ctx.kept = ctx.kept, None
            if probs is None:
                probs = _logits(part, cast_weight, bias, temperature)
                probs.sub_(probs.amax(dim=-1, keepdim=True)).exp_()
                probs /= probs.sum(dim=-1, keepdim=True)
            dlogits = _grad_logits(probs, targets[rows], entropy[rows], *(g if g is None else g[rows] for g in grads))
            if grad_bias is not None:
                grad_bias += dlogits.sum(0) / temperature
            dlogits = dlogits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (dlogits @ cast_weight / temperature).to(grad_hidden.dtype)
            if grad_weight is not None:
                _accumulate(grad_weight, dlogits, part, 1.0 / temperature)
        return (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _grad_logits(
    probs: Tensor, targets: Tensor, entropy: Tensor, grad_lp: Tensor | None, grad_h: Tensor | None
) -> Tensor:
    """Gradient at the tempered logits [C, V]: g_lp (1[target] - p) - g_H p (log p + H). Overwrites `probs`."""
    if grad_h is None:
        assert grad_lp is not None, "backward is called with at least one gradient"
        dlogits = probs.mul_(-grad_lp[:, None])
    else:
        plogp = torch.xlogy(probs, probs).mul_(-grad_h[:, None])
        scale = -grad_h * entropy if grad_lp is None else -grad_h * entropy - grad_lp
        dlogits = probs.mul_(scale[:, None]).add_(plogp)
    if grad_lp is not None:
        dlogits.scatter_add_(1, targets[:, None], grad_lp[:, None])
    return dlogits


def _accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor, scale: float) -> None:
    """Add ``scale * dlogits.T @ hidden`` [V, H] to a float32 total, in place where the product is float32 too."""
    if dlogits.dtype == torch.float32:
        total.addmm_(dlogits.T, hidden, alpha=scale)
    else:
        total.add_((dlogits.T @ hidden).float(), alpha=scale)
