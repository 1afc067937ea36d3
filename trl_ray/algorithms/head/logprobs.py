"""Log-prob and entropy of chosen tokens straight from hidden states; no logits [N, V] are ever made.

    hidden [N,H], weight [V,H], targets [N] --tiles--> TokenLogprobs [N]
                                               `-- torch (the reference) or, on CUDA, Triton kernels

The logsumexp runs online over tiles of the vocabulary inside tiles of tokens; the backward pass computes the tiles
again. Rows to be left out are not passed in at all.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_ray.algorithms.head import logprobs_tiles
from trl_ray.algorithms.head.head_problem import (
    ExtraOutputs,
    HeadProblem,
    HeadResult,
    LogitTransform,
    TileShape,
    Upstream,
)

__all__ = ["ExtraOutputs", "HeadBackend", "LogitTransform", "TokenLogprobs", "tile_shape", "token_logprobs"]


class HeadBackend(StrEnum):
    """Who computes the tiles."""

    TORCH = "torch"
    TRITON = "triton"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenLogprobs:
    """What a language-model head says about N tokens: float32, or float64 where it computes in that."""

    logprobs: Tensor
    """[N] natural log-prob of each target at the given temperature; differentiable."""
    entropy: Tensor
    """[N] entropy in nats of the distribution each target was drawn from; differentiable."""
    sum_squared_probs: Tensor | None = None
    """[N] sum over the vocabulary of the squared probability, in (0, 1]; like what follows only where asked for."""
    top1: Tensor | None = None
    """[N] bool: whether the target is the most probable token, the first of them where several are."""
    top_ids: Tensor | None = None
    """[N, K] int64 ids of the K most probable tokens, most probable first; equals in any order."""
    top_logprobs: Tensor | None = None
    """[N, K] their natural log-probs; differentiable where that was asked for."""
    mean_logprobs: Tensor | None = None
    """[N] mean over the vocabulary of the natural log-probs; differentiable."""
    support_logprobs: Tensor | None = None
    """[N, K] natural log-probs of the further tokens that were named; differentiable."""
    divergence: Tensor | None = None
    """[N'] nats between this head and a teacher's over the whole vocabulary, where that was asked for; differentiable.
    `token_logprobs` knows of no teacher."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    support: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float,
    chunk_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    transform: LogitTransform | None = None,
    extras: ExtraOutputs | None = None,
    backend: HeadBackend | None = None,
) -> TokenLogprobs:
    """Log-softmax of ``transform(hidden @ weight.T + bias) / temperature`` at the targets, its entropy, and extras.

    Products of the forward pass run in `compute_dtype`; everything after them, and all sums of gradients, in float32
    (float64 where the products do). Online softmax: Milakov & Gimelshein, https://arxiv.org/abs/1805.02867.

    Args:
        hidden: [N, H] final hidden states that predict the targets.
        weight: [V, H] of the language-model head.
        targets: [N] token ids.
        support: [N, K] further token ids, whose log-probs are given too. One outside the vocabulary stands for no
            token: its log-prob is -inf, and its gradient must be 0. Ids may be repeated.
        bias: [V], for heads that have one.
        temperature: > 0.
        chunk_size: vocabulary entries in a tile, and no more memory than a few tiles. None lets the device decide, and
            keeps the logits of few tokens (up to 640 MiB) for the backward pass, which is then a quarter faster.
        compute_dtype: of the products of the forward pass; None keeps the weight's.
        transform: the model's scale and soft-capping of logits; None has neither.
        extras: what else to compute; None is nothing.
        backend: None chooses Triton on CUDA where it is installed; mean log-probs over the vocabulary are torch's.
    """
    assert hidden.dim() == 2 and hidden.shape[0] == targets.shape[0], "one row of hidden states per target"
    assert temperature > 0 and (chunk_size is None or chunk_size > 0), "temperature and chunk size must be positive"
    transform, extras = transform or LogitTransform(), extras or ExtraOutputs()
    assert transform.scale > 0 and (transform.softcap is None or transform.softcap > 0), "scale and cap are positive"
    assert support is None or support.shape[0] == hidden.shape[0], "one row of further ids per target"
    assert extras.top_k or not extras.top_gradient, "a gradient of the most probable tokens needs their number"
    if extras.mean_logprobs:
        assert backend is not HeadBackend.TRITON, "the Triton kernels compute no mean log-probs over the vocabulary"
        backend = HeadBackend.TORCH
    settings = _Settings(
        temperature=float(temperature),
        transform=transform,
        compute_dtype=compute_dtype or weight.dtype,
        tile=tile_shape(hidden.shape[0], weight.shape[0], chunk_size=chunk_size, device=hidden.device),
        extras=extras,
        backend=backend or _backend(hidden.device, compute_dtype or weight.dtype),
        # Whoever names a chunk size is short of memory, and without gradients nothing would read what is kept.
        keep=chunk_size is None and torch.is_grad_enabled(),
    )
    logprobs, entropy, mean, further, values, squares, top1, ids = _Head.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, support, settings
    )
    return TokenLogprobs(
        logprobs=logprobs,
        entropy=entropy,
        sum_squared_probs=squares,
        top1=top1,
        top_ids=ids,
        top_logprobs=values,
        mean_logprobs=mean,
        support_logprobs=further,
    )


def tile_shape(tokens: int, vocab: int, *, chunk_size: int | None, device: torch.device) -> TileShape:
    """Tokens and vocabulary entries in one tile; both cut evenly, so that no tile is a mere rest.

    On a CPU a tile of 4 to 16 MiB keeps matrix products at full speed while what follows them finds it in the cache; a
    GPU wants far larger products.
    """
    if device.type == "cpu":
        cells, most_tokens, words = 2**22, 1024, max(4096, 2**20 // max(tokens, 1))
    else:
        cells, most_tokens, words = 2**26, 4096, 16384
    width = min(chunk_size, vocab) if chunk_size else _even(vocab, words, multiple=16)
    # With a wider tile there are fewer tokens to it, down to where products would become slow.
    height = min(most_tokens, max(cells // width, most_tokens // 4))
    return TileShape(tokens=_even(tokens, height, multiple=1), vocab=width)


def _even(size: int, longest: int, *, multiple: int) -> int:
    pieces = max(1, -(-size // longest))
    length = -(-max(size, 1) // pieces)
    return -(-length // multiple) * multiple


def _backend(device: torch.device, dtype: torch.dtype) -> HeadBackend:
    """Triton where there is a GPU for it; its kernels compute in float32."""
    # Found, not imported: that is left to the module with the kernels.
    has_triton = device.type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    return HeadBackend.TRITON if has_triton else HeadBackend.TORCH


def _module(backend: HeadBackend) -> ModuleType:
    if backend is HeadBackend.TORCH:
        return logprobs_tiles
    from trl_ray.algorithms.head import logprobs_triton

    return logprobs_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What is no tensor."""

    temperature: float
    transform: LogitTransform
    compute_dtype: torch.dtype
    tile: TileShape
    extras: ExtraOutputs
    backend: HeadBackend
    keep: bool

    def problem(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, support: Tensor | None
    ) -> HeadProblem:
        return HeadProblem(
            hidden=hidden,
            weight=weight,
            bias=bias,
            targets=targets,
            temperature=self.temperature,
            transform=self.transform,
            compute_dtype=self.compute_dtype,
            tile=self.tile,
            support=support,
        )


class _Head(torch.autograd.Function):
    """The head, log-softmax and entropy as one node of the graph that stores no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        support: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor | None, ...]:
        problem = settings.problem(hidden, weight, bias, targets, support)
        found: HeadResult = _module(settings.backend).forward(
            problem, settings.extras, keep=settings.keep and any(ctx.needs_input_grad[:3])
        )
        # What no loss reads comes back as None rather than as zeros, and its terms are left out.
        ctx.set_materialize_grads(False)
        top_ids = found.top_ids if settings.extras.top_gradient else None
        ctx.save_for_backward(hidden, weight, bias, targets, support, top_ids, found.log_total, found.entropy)
        # Not saved like the others: tiles of logits are large, and the backward pass frees each as it uses it up.
        ctx.settings, ctx.kept = settings, found.kept
        fixed = [found.sum_squared_probs, found.top1, found.top_ids]
        if not settings.extras.top_gradient:
            fixed.append(found.top_logprobs)
        ctx.mark_non_differentiable(*(extra for extra in fixed if extra is not None))
        differentiable = (found.logprobs, found.entropy, found.mean_logprobs, found.support_logprobs)
        return *differentiable, found.top_logprobs, *fixed[:3]

    @staticmethod
    # Tiles are computed again outside of autograd: there is nothing that a second derivative could follow.
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, support, top_ids, log_total, entropy = ctx.saved_tensors
        # Computing every tile again would give zeros.
        if all(grad is None for grad in grads[:5]):
            return (None,) * 6
        settings: _Settings = ctx.settings
        # Named and most probable tokens are alike on the way back: ids, each with a gradient.
        further = [(ids, grad) for ids, grad in ((support, grads[3]), (top_ids, grads[4])) if grad is not None]
        kept, ctx.kept = ctx.kept, {}
        found = _module(settings.backend).backward(
            settings.problem(hidden, weight, bias, targets, support),
            Upstream(
                logprobs=grads[0],
                entropy=grads[1],
                mean_logprobs=grads[2],
                support=torch.cat([grad for _, grad in further], dim=1) if further else None,
                support_ids=torch.cat([ids for ids, _ in further], dim=1) if further else None,
                entropy_value=entropy,
                log_total=log_total,
            ),
            kept,
            needs=ctx.needs_input_grad[:3],
        )
        return found.hidden, found.weight, found.bias, None, None, None
