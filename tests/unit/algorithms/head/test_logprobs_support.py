"""Log-probs of further tokens out of the chunked head: those that are named, and the most probable ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ray.algorithms.head import logprobs_tiles
from trl_ray.algorithms.head.head_problem import ExtraOutputs, LogitTransform, TileShape
from trl_ray.algorithms.head.logprobs import TokenLogprobs, token_logprobs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, WIDTH, VOCAB = 7, 5, 11
CAPPED = LogitTransform(scale=1.5, softcap=2.0)
TOP = ExtraOutputs(top_k=3, top_gradient=True)


def inputs(device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias; targets [7]; four further ids [7, 4] of each, with repeats and the target."""
    torch.manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    leaves = [torch.randn(shape, dtype=torch.float64, device=device).requires_grad_() for shape in shapes]
    targets = torch.randint(0, VOCAB, (TOKENS,), device=device)
    support = torch.randint(0, VOCAB, (TOKENS, 4), device=device)
    support[:, 1], support[:, 2] = targets, support[:, 0]
    return leaves, targets, support


def everything(leaves: list[Tensor], transform: LogitTransform) -> Tensor:
    """[7, 11] from logits that exist."""
    logits = torch.nn.functional.linear(*leaves) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return torch.log_softmax(logits / 0.7, dim=-1)


def head(leaves: list[Tensor], targets: Tensor, support: Tensor | None, **options: Any) -> TokenLogprobs:
    return token_logprobs(leaves[0], leaves[1], targets, support=support, bias=leaves[2], temperature=0.7, **options)


def total(parts: list[tuple[float, Tensor]]) -> Tensor:
    """A weighted sum in which every entry has another weight and the third token has none."""
    found = torch.zeros((), dtype=torch.float64, device=parts[0][1].device)
    for weight, value in parts:
        each = torch.sin(torch.arange(value.numel(), device=value.device, dtype=value.dtype) + 1).view(value.shape)
        each[2] = 0.0
        found = found + weight * (each * value).sum()
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
@pytest.mark.parametrize("transform", [LogitTransform(), CAPPED])
@pytest.mark.parametrize("weights", [(0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0), (0.7, -0.3, 0.5, 0.9)])
def test_named_and_most_probable_tokens_have_the_plain_values_and_gradients(
    device: str, chunk_size: int | None, transform: LogitTransform, weights: tuple[float, ...]
) -> None:
    leaves, targets, support = inputs(device)
    scores = head(leaves, targets, support, chunk_size=chunk_size, transform=transform, extras=TOP)
    assert scores.support_logprobs is not None and scores.top_logprobs is not None
    logp = everything(leaves, transform)
    actual = [scores.logprobs, scores.entropy, scores.support_logprobs, scores.top_logprobs]
    expected = [logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)]
    expected += [logp.gather(1, support), logp.topk(3).values]
    grads = []
    for outputs in (actual, expected):
        weighted = [(weight, value) for weight, value in zip(weights, outputs, strict=True) if weight]
        grads.append(torch.autograd.grad(total(weighted), leaves))
    for got, want in zip([*actual, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keep", [True, False])
def test_several_token_tiles_give_what_one_gives(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    leaves, targets, support = inputs()
    monkeypatch.setattr("trl_ray.algorithms.head.logprobs.tile_shape", lambda *_, **__: TileShape(tokens=3, vocab=4))
    monkeypatch.setattr(logprobs_tiles, "_KEPT_BYTES", 2 * 3 * 4 * 8 if keep else 0)
    monkeypatch.setattr(logprobs_tiles, "_WORTH_KEEPING", 0.0)
    scores = head(leaves, targets, support, transform=CAPPED)
    assert scores.support_logprobs is not None
    wanted = everything(leaves, CAPPED).gather(1, support)
    got = torch.autograd.grad(total([(1.0, scores.support_logprobs)]), leaves)
    want = torch.autograd.grad(total([(1.0, wanted)]), leaves)
    for one, other in zip([scores.support_logprobs, *got], [wanted, *want], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", [LogitTransform(), CAPPED])
def test_an_id_outside_the_vocabulary_stands_for_no_token(transform: LogitTransform) -> None:
    leaves, targets, support = inputs()
    outside = support.clone()
    outside[:, 0], outside[:, 2] = -1, VOCAB
    scores = head(leaves, targets, outside, chunk_size=4, transform=transform)
    assert scores.support_logprobs is not None
    assert bool(torch.isneginf(scores.support_logprobs[:, [0, 2]]).all())
    got = torch.autograd.grad(scores.support_logprobs[:, [1, 3]].sum(), leaves)
    want = torch.autograd.grad(everything(leaves, transform).gather(1, support[:, [1, 3]]).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_target_among_the_named_tokens_has_the_very_same_logprob() -> None:
    leaves, targets, support = inputs()
    scores = head([leaf.detach().float() for leaf in leaves], targets, support, chunk_size=4)
    assert scores.support_logprobs is not None
    assert scores.support_logprobs[:, 1].tolist() == scores.logprobs.tolist()


def test_nothing_is_named_unless_asked_for_and_no_top_is_differentiable() -> None:
    leaves, targets, support = inputs()
    assert head(leaves, targets, None).support_logprobs is None
    fixed = head(leaves, targets, support, extras=ExtraOutputs(top_k=3))
    assert fixed.top_logprobs is not None and not fixed.top_logprobs.requires_grad


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    leaves, targets, support = inputs()
    scores = head([leaves[0][:0], *leaves[1:]], targets[:0], support[:0])
    assert scores.support_logprobs is not None and scores.support_logprobs.shape == (0, 4)
    scores.support_logprobs.sum().backward()
    assert leaves[1].grad is not None and not leaves[1].grad.any()


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes() // result.itemsize)
        return result


def test_no_block_is_larger_than_a_tile() -> None:
    """2000 tokens in two tiles, 500 words in tiles of 10."""
    hidden, weight = torch.randn(2000, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    support = torch.randint(0, 500, (2000, 3))
    with Largest() as largest:
        scores = token_logprobs(
            hidden, weight, support[:, 0], support=support, temperature=1.0, chunk_size=10, extras=TOP
        )
        assert scores.support_logprobs is not None and scores.top_logprobs is not None
        (scores.support_logprobs + scores.top_logprobs).sum().backward()
    assert largest.size == 2000 * 6  # both lists together, as wide as they are; a tile has 1000 * 10
