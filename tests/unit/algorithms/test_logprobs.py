"""Chunked log-probs and entropies against the plain log-softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.logprobs import token_logprobs


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> list[Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    logp = torch.log_softmax(logits, dim=-1)
    return [logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)]


def _inputs(with_bias: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(7, 5), torch.randn(11, 5)] + ([torch.randn(11)] if with_bias else [])
    return [leaf.requires_grad_() for leaf in leaves], torch.randint(0, 11, (7,))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
def test_values_and_gradients_equal_the_plain_log_softmax(
    with_bias: bool, chunk_size: int, weights: tuple[float, float]
) -> None:
    leaves, targets = _inputs(with_bias)
    bias = leaves[2] if with_bias else None
    upstream = torch.randn(2, 7)
    scores = token_logprobs(leaves[0], leaves[1], targets, bias=bias, temperature=0.7, chunk_size=chunk_size)
    actual = [scores.logprobs, scores.entropy]
    expected = _plain(leaves[0], leaves[1], targets, bias, 0.7)
    grads = []
    for outputs in (actual, expected):
        total = sum((w * u * o).sum() for w, u, o in zip(weights, upstream, outputs, strict=True) if w)
        assert isinstance(total, Tensor)
        grads.append(torch.autograd.grad(total, leaves))
    for got, want in zip([*actual, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_backward_may_run_twice() -> None:
    leaves, targets = _inputs(False)
    scores = token_logprobs(leaves[0], leaves[1], targets, temperature=1.0, chunk_size=100)
    first = torch.autograd.grad(scores.logprobs.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(scores.logprobs.sum(), leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_a_token_the_model_rules_out_does_not_make_the_entropy_nan() -> None:
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    scores = token_logprobs(
        torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), bias=bias, temperature=1.0, chunk_size=4
    )
    torch.testing.assert_close(scores.entropy, torch.tensor([0.6931472]))
    torch.testing.assert_close(scores.logprobs, torch.tensor([-0.6931472]))


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do() -> None:
    leaves, targets = _inputs(False)
    weight = leaves[1].detach()
    token_logprobs(leaves[0], weight, targets, temperature=1.0, chunk_size=2).logprobs.sum().backward()
    assert weight.grad is None and leaves[0].grad is not None


def test_no_block_is_larger_than_a_chunk_of_logits() -> None:
    """1000 tokens in chunks of 10 over 50 words: no tensor of 1000 x 50 numbers is ever made."""
    hidden, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        scores = token_logprobs(hidden, weight, torch.zeros(1000, dtype=torch.long), temperature=1.0, chunk_size=10)
        scores.logprobs.sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest < 1000 * 50 * 4
