"""The chunked head gives the values and gradients of TRL's chunked log-prob kernel."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.head.head_problem import ExtraOutputs, LogitTransform
from trl_ray.algorithms.head.logprobs import token_logprobs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, WIDTH, VOCAB = 37, 24, 101
ALL = ExtraOutputs(sum_squared_probs=True, top1=True)


def _leaves(device: str, dtype: torch.dtype, *, with_bias: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    # Logits of a few units: at larger ones TRL's float32 is itself off by more than 1e-5 from the exact gradients.
    leaves = [torch.randn(TOKENS, WIDTH), torch.randn(VOCAB, WIDTH) / 5]
    leaves += [torch.randn(VOCAB) / 2] if with_bias else []
    targets = torch.randint(0, VOCAB, (TOKENS,))
    # Some targets are the most probable token.
    targets[::3] = torch.nn.functional.linear(*leaves)[::3].argmax(-1)
    return [leaf.to(device, dtype).requires_grad_() for leaf in leaves], targets.to(device)


def _ours(leaves: list[Tensor], targets: Tensor, temperature: float, transform: LogitTransform) -> list[Tensor]:
    scores = token_logprobs(
        leaves[0],
        leaves[1],
        targets,
        bias=leaves[2] if len(leaves) > 2 else None,
        temperature=temperature,
        chunk_size=32,
        transform=transform,
        extras=ALL,
    )
    assert scores.sum_squared_probs is not None and scores.top1 is not None
    return [scores.logprobs, scores.entropy, scores.sum_squared_probs, scores.top1]


def _theirs(leaves: list[Tensor], targets: Tensor, temperature: float, transform: LogitTransform) -> list[Any]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logprobs, entropy, log_squares, _, is_top1 = ChunkedLogProbFunction.apply(
        leaves[0],
        leaves[1],
        leaves[2] if len(leaves) > 2 else None,
        targets,
        temperature,
        32,
        transform.softcap,
        transform.scale,
    )
    return [logprobs, entropy, log_squares.exp(), is_top1]


def _compare(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> None:
    torch.manual_seed(1)
    upstream = torch.randn(2, TOKENS).to(leaves[0].device)
    grads = [
        torch.autograd.grad((upstream[0] * out[0] + upstream[1] * out[1]).sum(), leaves) for out in (found, expected)
    ]
    assert torch.equal(found[3], expected[3]) and 0 < int(found[3].sum()) < TOKENS
    for got, want in zip([*found[:3], *grads[0]], [*expected[:3], *grads[1]], strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=2.0, softcap=5.0)]
)
def test_values_and_gradients_equal_trls(
    dtype: torch.dtype, with_bias: bool, temperature: float, transform: LogitTransform, device: str
) -> None:
    """TRL folds in float32 even for float64 inputs, so that 1e-5 is what can be asked for there, too."""
    leaves, targets = _leaves(device, dtype, with_bias=with_bias)
    found = _ours(leaves, targets, temperature, transform)
    assert found[0].dtype == dtype
    _compare(found, _theirs(leaves, targets, temperature, transform), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_weight_gets_the_gradients_of_both_its_uses(dtype: torch.dtype) -> None:
    (_, weight), targets = _leaves("cpu", dtype, with_bias=False)
    ids = torch.randint(0, VOCAB, (TOKENS,))
    outputs = [
        function([torch.tanh(weight[ids]), weight], targets, 0.9, LogitTransform(softcap=5.0))
        for function in (_ours, _theirs)
    ]
    _compare(outputs[0], outputs[1], [weight])
