"""The chunked head against the plain log-softmax: values, gradients, extras, memory; on every device there is."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ray.algorithms.head import logprobs_tiles
from trl_ray.algorithms.head.head_problem import ExtraOutputs, LogitTransform
from trl_ray.algorithms.head.logprobs import TokenLogprobs, tile_shape, token_logprobs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, WIDTH, VOCAB = 7, 5, 11
PLAIN = LogitTransform()


def _plain(
    leaves: list[Tensor], targets: Tensor, temperature: float, transform: LogitTransform = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N], entropies [N] and all log-probs [N, V], from logits that exist."""
    logits = torch.nn.functional.linear(*leaves) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1), logp


def _inputs(
    with_bias: bool = False, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(TOKENS, WIDTH), torch.randn(VOCAB, WIDTH)] + ([torch.randn(VOCAB)] if with_bias else [])
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    return leaves, torch.randint(0, VOCAB, (TOKENS,)).to(device)


def _head(leaves: list[Tensor], targets: Tensor, **options: Any) -> TokenLogprobs:
    bias = leaves[2] if len(leaves) > 2 else None
    return token_logprobs(leaves[0], leaves[1], targets, bias=bias, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(scale=0.5), LogitTransform(scale=1.5, softcap=2.0)])
def test_values_and_gradients_equal_the_plain_log_softmax(
    with_bias: bool, chunk_size: int | None, weights: tuple[float, float], transform: LogitTransform, device: str
) -> None:
    leaves, targets = _inputs(with_bias, device=device)
    upstream = torch.randn(2, TOKENS, device=device)
    scores = _head(leaves, targets, temperature=0.7, chunk_size=chunk_size, transform=transform)
    actual = [scores.logprobs, scores.entropy]
    expected = list(_plain(leaves, targets, 0.7, transform)[:2])
    grads = []
    for outputs in (actual, expected):
        total = sum((w * u * o).sum() for w, u, o in zip(weights, upstream, outputs, strict=True) if w)
        assert isinstance(total, Tensor)
        grads.append(torch.autograd.grad(total, leaves))
    for got, want in zip([*actual, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_several_token_tiles_give_what_one_gives(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """Seven tokens in tiles of 3, 3 and 1; with room for the logits of two of the nine tiles, or for none."""
    leaves, targets = _inputs(True, dtype=torch.float64)
    shape = tile_shape(TOKENS, VOCAB, chunk_size=4, device=torch.device("cpu"))
    monkeypatch.setattr(
        "trl_ray.algorithms.head.logprobs.tile_shape", lambda *args, **kwargs: type(shape)(tokens=3, vocab=4)
    )
    monkeypatch.setattr(logprobs_tiles, "_KEPT_BYTES", 2 * 3 * 4 * 8 if keep else 0)
    monkeypatch.setattr(logprobs_tiles, "_WORTH_KEEPING", 0.0)
    scores = _head(leaves, targets, temperature=0.7, transform=LogitTransform(softcap=2.0))
    assert len(scores.logprobs.grad_fn.kept) == (2 if keep else 0)  # type: ignore[union-attr]
    expected = _plain(leaves, targets, 0.7, LogitTransform(softcap=2.0))
    upstream = torch.randn(2, TOKENS, dtype=torch.float64)
    got = torch.autograd.grad((upstream[0] * scores.logprobs + upstream[1] * scores.entropy).sum(), leaves)
    want = torch.autograd.grad((upstream[0] * expected[0] + upstream[1] * expected[1]).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_numerical_ones_in_float64() -> None:
    leaves, targets = _inputs(True, dtype=torch.float64)
    transform = LogitTransform(scale=0.8, softcap=1.5)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        scores = _head(list(tensors), targets, temperature=1.3, chunk_size=4, transform=transform)
        return scores.logprobs, scores.entropy

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 3, 100, None])
@pytest.mark.parametrize("weights", [(0.0, 0.0, 1.0), (0.9, 0.0, 0.1), (0.7, -0.3, 0.5)])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(scale=1.5, softcap=2.0)])
def test_mean_logprobs_over_the_vocabulary_have_the_plain_values_and_gradients(
    chunk_size: int | None, weights: tuple[float, float, float], transform: LogitTransform, device: str
) -> None:
    leaves, targets = _inputs(True, device=device, dtype=torch.float64)
    upstream = torch.randn(3, TOKENS, device=device, dtype=torch.float64)
    upstream[:, 2] = 0.0
    extras = ExtraOutputs(mean_logprobs=True)
    scores = _head(leaves, targets, temperature=0.7, chunk_size=chunk_size, transform=transform, extras=extras)
    assert scores.mean_logprobs is not None
    logp, entropy, everything = _plain(leaves, targets, 0.7, transform)
    actual, expected = [scores.logprobs, scores.entropy, scores.mean_logprobs], [logp, entropy, everything.mean(-1)]
    grads = []
    for outputs in (actual, expected):
        total = sum((w * u * o).sum() for w, u, o in zip(weights, upstream, outputs, strict=True) if w)
        assert isinstance(total, Tensor)
        grads.append(torch.autograd.grad(total, leaves))
    for got, want in zip([*actual, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_mean_logprobs_of_half_precision_are_near_those_of_float32() -> None:
    leaves, targets = _inputs(True)
    halves = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().float().requires_grad_() for leaf in halves]
    found = _head(halves, targets, temperature=0.7, extras=ExtraOutputs(mean_logprobs=True)).mean_logprobs
    wanted = _plain(exact, targets, 0.7)[2].mean(-1)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    got, want = torch.autograd.grad(found.sum(), halves), torch.autograd.grad(wanted.sum(), exact)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [2, 5, None])
def test_extras_are_those_of_the_whole_distribution(device: str, chunk_size: int | None) -> None:
    leaves, _ = _inputs(True, device=device)
    transform = LogitTransform(scale=2.0, softcap=3.0)
    logp = _plain(leaves, torch.zeros(TOKENS, dtype=torch.long, device=device), 0.9, transform)[2]
    targets = logp.argmax(dim=-1)
    targets[::2] = logp[::2].argmin(dim=-1)
    extras = ExtraOutputs(sum_squared_probs=True, top1=True, top_k=3)
    scores = _head(leaves, targets, temperature=0.9, chunk_size=chunk_size, transform=transform, extras=extras)
    assert scores.sum_squared_probs is not None and scores.top_logprobs is not None and scores.top1 is not None
    torch.testing.assert_close(scores.sum_squared_probs, logp.exp().square().sum(-1))
    torch.testing.assert_close(scores.top_logprobs, logp.topk(3).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.top_ids, logp.topk(3).indices)
    assert scores.top1.tolist() == [False, True] * 3 + [False]
    assert not scores.sum_squared_probs.requires_grad and not scores.top_logprobs.requires_grad


def test_nothing_is_extra_unless_asked_for() -> None:
    leaves, targets = _inputs()
    scores = _head(leaves, targets, temperature=1.0)
    assert scores.sum_squared_probs is scores.top1 is scores.top_ids is scores.top_logprobs is None


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_of_equal_logits_the_first_is_the_top_one(chunk_size: int) -> None:
    weight = torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    scores = token_logprobs(
        torch.ones(2, 1),
        weight,
        torch.tensor([1, 2]),
        temperature=1.0,
        chunk_size=chunk_size,
        extras=ExtraOutputs(top1=True),
    )
    assert scores.top1 is not None and scores.top1.tolist() == [True, False]


def test_more_top_tokens_than_the_vocabulary_has_are_all_of_it() -> None:
    leaves, targets = _inputs()
    ids = _head(leaves, targets, temperature=1.0, chunk_size=4, extras=ExtraOutputs(top_k=50)).top_ids
    assert ids is not None and ids.shape == (TOKENS, VOCAB)
    assert ids.sort(dim=-1).values.tolist() == [list(range(VOCAB))] * TOKENS


def test_a_uniform_distribution_has_the_entropy_and_squares_known_by_hand() -> None:
    scores = token_logprobs(
        torch.zeros(1, 2),
        torch.zeros(8, 2),
        torch.tensor([3]),
        temperature=0.5,
        chunk_size=3,
        extras=ExtraOutputs(sum_squared_probs=True),
    )
    torch.testing.assert_close(scores.entropy, torch.tensor([math.log(8)]))
    torch.testing.assert_close(scores.logprobs, torch.tensor([-math.log(8)]))
    torch.testing.assert_close(scores.sum_squared_probs, torch.tensor([0.125]))


def test_logits_far_apart_neither_overflow_nor_lose_the_target() -> None:
    weight = torch.tensor([[-4000.0], [0.0], [4000.0]])
    for order in ([0, 1, 2], [2, 1, 0]):
        scores = token_logprobs(
            torch.ones(1, 1), weight[order], torch.tensor([order.index(0)]), temperature=1.0, chunk_size=1
        )
        torch.testing.assert_close(scores.logprobs, torch.tensor([-8000.0]))
        torch.testing.assert_close(scores.entropy, torch.tensor([0.0]))


def test_backward_may_run_twice() -> None:
    leaves, targets = _inputs()
    scores = _head(leaves, targets, temperature=1.0)
    first = torch.autograd.grad(scores.logprobs.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(scores.logprobs.sum(), leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_a_token_the_model_rules_out_makes_neither_entropy_nor_gradient_nan(chunk_size: int | None) -> None:
    bias = torch.tensor([-torch.inf, 0.0, 0.0])
    hidden = torch.zeros(2, 2, requires_grad=True)
    scores = token_logprobs(
        hidden, torch.zeros(3, 2), torch.tensor([1, 0]), bias=bias, temperature=1.0, chunk_size=chunk_size
    )
    torch.testing.assert_close(scores.entropy, torch.tensor([math.log(2)] * 2))
    torch.testing.assert_close(scores.logprobs, torch.tensor([-math.log(2), -torch.inf]))
    (scores.logprobs[0] + 3 * scores.entropy.sum()).backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do() -> None:
    leaves, targets = _inputs()
    weight = leaves[1].detach()
    token_logprobs(leaves[0], weight, targets, temperature=1.0, chunk_size=2).logprobs.sum().backward()
    assert weight.grad is None and leaves[0].grad is not None


@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("zeros", [[0, 3, 4], list(range(TOKENS))])
def test_tokens_without_a_gradient_are_left_out_and_change_nothing(zeros: list[int], chunk_size: int | None) -> None:
    leaves, targets = _inputs(True)
    upstream = torch.randn(TOKENS)
    upstream[zeros] = 0.0
    scores = _head(leaves, targets, temperature=0.7, chunk_size=chunk_size)
    got = torch.autograd.grad((upstream * scores.logprobs).sum(), leaves)
    want = torch.autograd.grad((upstream * _plain(leaves, targets, 0.7)[0]).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_not_taken_for_none() -> None:
    leaves, targets = _inputs()
    scores = _head(leaves, targets, temperature=1.0)
    (scores.logprobs[0] * torch.nan).backward()
    assert leaves[0].grad is not None and bool(leaves[0].grad[0].isnan().all())


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    leaves, targets = _inputs()
    extras = ExtraOutputs(sum_squared_probs=True, top1=True)
    scores = token_logprobs(leaves[0][:0], leaves[1], targets[:0], temperature=1.0, extras=extras)
    scores.logprobs.sum().backward()
    assert scores.logprobs.shape == scores.entropy.shape == (0,)
    assert leaves[1].grad is not None and not leaves[1].grad.any()


def test_half_precision_ends_with_the_logits_and_sums_are_float32() -> None:
    """Logits are rounded to bfloat16; what follows, down to both gradients, is exact in float32."""
    torch.manual_seed(0)
    leaves = [torch.randn(64, 32).bfloat16(), torch.randn(512, 32).bfloat16()]
    logits = (leaves[0] @ leaves[1].T).double()
    leaves = [leaf.float().requires_grad_() for leaf in leaves]
    targets = torch.randint(0, 512, (64,))
    scores = _head(leaves, targets, temperature=1.0, chunk_size=16, compute_dtype=torch.bfloat16)
    got = torch.autograd.grad(scores.logprobs.sum(), leaves)
    grad = torch.nn.functional.one_hot(targets, 512) - logits.softmax(dim=-1)
    want = [logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]]
    want += [grad @ leaves[1].double(), grad.T @ leaves[0].double()]
    for a, b in zip([scores.logprobs, *got], want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    leaves, targets = _inputs()
    loss = _head(leaves, targets, temperature=1.0).logprobs.square().sum()
    (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class _Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes() // result.itemsize)
        return result


def test_no_block_is_larger_than_a_tile_and_none_is_kept_when_its_size_is_given() -> None:
    """2000 tokens in two tiles, 500 words in tiles of 10; the inputs, [2000, 4] and [500, 4], are smaller."""
    hidden, weight = torch.randn(2000, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with _Largest() as largest:
        scores = token_logprobs(hidden, weight, torch.zeros(2000, dtype=torch.long), temperature=1.0, chunk_size=10)
        assert not scores.logprobs.grad_fn.kept  # type: ignore[union-attr]
        (scores.logprobs + scores.entropy).sum().backward()
    assert largest.size == 1000 * 10


def test_few_tokens_keep_their_logits_and_a_pass_without_gradients_keeps_none() -> None:
    leaves, targets = _inputs()
    assert _head(leaves, targets, temperature=1.0).logprobs.grad_fn.kept  # type: ignore[union-attr]
    with torch.no_grad():
        assert _head(leaves, targets, temperature=1.0).logprobs.grad_fn is None


def test_a_tile_is_at_most_16_mib_and_holds_no_mere_rest() -> None:
    shape = tile_shape(8192, 151_936, chunk_size=None, device=torch.device("cpu"))
    assert (shape.tokens, shape.vocab) == (1024, 4000)
    assert tile_shape(1100, 100, chunk_size=None, device=torch.device("cpu")).tokens == 550
    assert tile_shape(8192, 151_936, chunk_size=32_768, device=torch.device("cpu")).vocab == 32_768


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_give_what_the_reference_gives() -> None:
    """In a process of its own: whether Triton interprets kernels is settled when they are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("triton_against_reference.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 cases agree" in done.stdout
