"""The divergence of two heads against whole logits: values, gradients, memory; what is kept and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ray.algorithms.head import divergence_tiles, logprobs_tiles
from trl_ray.algorithms.head.divergence import HeadInput, vocabulary_divergence
from trl_ray.algorithms.head.divergence_tiles import DivergenceProblem, DivergenceResult
from trl_ray.algorithms.head.head_problem import LogitTransform, TileShape

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BETAS = [0.0, 0.25, 0.5, 1.0]
TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 7, 5, 3, 11
CAPPED = LogitTransform(scale=1.5, softcap=2.0)


def sides(
    *, device: str = "cpu", transform: LogitTransform | None = None, dtype: torch.dtype = torch.float64
) -> tuple[HeadInput, HeadInput, list[Tensor]]:
    """A student, a teacher of another width and with another transform, and what the student trains."""
    torch.manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (TOKENS, TEACHER_WIDTH), (VOCAB, TEACHER_WIDTH)]
    tensors = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    student = HeadInput(
        hidden=leaves[0], weight=leaves[1], bias=leaves[2], transform=transform or LogitTransform(scale=0.8)
    )
    return student, HeadInput(hidden=tensors[3], weight=tensors[4], transform=LogitTransform(softcap=3.0)), leaves


def log_probabilities(side: HeadInput, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(side.hidden, side.weight, side.bias) * side.transform.scale
    if side.transform.softcap is not None:
        logits = side.transform.softcap * torch.tanh(logits / side.transform.softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def plain(student: HeadInput, teacher: HeadInput, beta: float, temperature: float) -> Tensor:
    """From logits that exist; a probability of 0 adds nothing."""
    s, t = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    if beta == 0:
        return (t.exp() * (t - s)).sum(-1)
    if beta == 1:
        return (s.exp() * (s - t)).sum(-1)
    m = torch.log((1 - beta) * s.exp() + beta * t.exp())
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
@pytest.mark.parametrize("transform", [None, CAPPED])
def test_values_and_gradients_equal_those_of_whole_logits(
    device: str, beta: float, chunk_size: int | None, transform: LogitTransform | None
) -> None:
    student, teacher, leaves = sides(device=device, transform=transform)
    upstream = torch.randn(TOKENS, device=device, dtype=torch.float64)
    upstream[[0, 4]] = 0.0  # tokens without a gradient
    found = vocabulary_divergence(student, teacher, beta=beta, temperature=0.7, chunk_size=chunk_size)
    wanted = plain(student, teacher, beta, 0.7)
    got = torch.autograd.grad((upstream * found).sum(), leaves)
    want = torch.autograd.grad((upstream * wanted).sum(), leaves)
    for one, other in zip([found, *got], [wanted, *want], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kept", [0, 2, 9])
def test_several_token_tiles_with_or_without_room_for_logits_give_what_one_gives(
    monkeypatch: pytest.MonkeyPatch, beta: float, kept: int
) -> None:
    """Seven tokens in tiles of 3, 3 and 1, words in tiles of 4; of nine tiles, each of both sides, some are kept."""
    monkeypatch.setattr("trl_ray.algorithms.head.divergence.tile_shape", lambda *_, **__: TileShape(tokens=3, vocab=4))
    monkeypatch.setattr(logprobs_tiles, "_KEPT_BYTES", kept * 2 * 3 * 4 * 8)
    monkeypatch.setattr(logprobs_tiles, "_WORTH_KEEPING", 0.0)
    student, teacher, leaves = sides(transform=CAPPED)
    found = vocabulary_divergence(student, teacher, beta=beta, temperature=1.3)
    assert len(found.grad_fn.kept) == kept  # type: ignore[union-attr]
    upstream = torch.randn(TOKENS, dtype=torch.float64)
    upstream[1] = 0.0
    want = torch.autograd.grad((upstream * plain(student, teacher, beta, 1.3)).sum(), leaves)
    # The second backward pass finds nothing kept.
    for _ in range(2):
        got = torch.autograd.grad((upstream * found).sum(), leaves, retain_graph=True)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_the_numerical_ones(beta: float) -> None:
    student, teacher, leaves = sides(transform=CAPPED)

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = HeadInput(hidden=hidden, weight=weight, bias=bias, transform=student.transform)
        return vocabulary_divergence(given, teacher, beta=beta, temperature=0.9, chunk_size=4)

    assert torch.autograd.gradcheck(divergence, leaves)


@pytest.mark.parametrize("beta", BETAS)
def test_the_teacher_gets_no_gradient_and_a_frozen_head_none_either(beta: float) -> None:
    _, teacher, leaves = sides()
    for tensor in (teacher.hidden, teacher.weight):
        tensor.requires_grad_()
    frozen = HeadInput(hidden=leaves[0], weight=leaves[1].detach())
    vocabulary_divergence(frozen, teacher, beta=beta, temperature=1.0).sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is teacher.hidden.grad is teacher.weight.grad is None


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_is_nowhere_away_from_it(beta: float) -> None:
    student, _, leaves = sides(dtype=torch.float32)
    found = vocabulary_divergence(student, student, beta=beta, temperature=0.5, chunk_size=3)
    grads = torch.autograd.grad(found.sum(), leaves)
    for value in (found, *grads):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk_size", [1, None])
def test_a_token_that_both_rule_out_adds_nothing_and_makes_nothing_nan(beta: float, chunk_size: int | None) -> None:
    """Of three words the first is ruled out; 1/2 and 1/2 are left to the student, 3/4 and 1/4 to the teacher."""
    student = HeadInput(
        hidden=torch.zeros(1, 2, requires_grad=True), weight=torch.zeros(3, 2), bias=torch.tensor([-torch.inf, 0, 0])
    )
    bias = torch.tensor([0.0, 0.75, 0.25]).log()
    teacher = HeadInput(hidden=torch.zeros(1, 2), weight=torch.zeros(3, 2), bias=bias)
    found = vocabulary_divergence(student, teacher, beta=beta, temperature=1.0, chunk_size=chunk_size)
    expected = {0.0: 0.130812, 0.25: 0.024870, 0.5: 0.033822, 1.0: 0.143841}[beta]
    assert found.item() == pytest.approx(expected, abs=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), student.hidden)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("beta", BETAS)
def test_no_tokens_give_nothing_and_zero_gradients(beta: float) -> None:
    _, teacher, leaves = sides()
    found = vocabulary_divergence(
        HeadInput(hidden=leaves[0][:0], weight=leaves[1]),
        HeadInput(hidden=teacher.hidden[:0], weight=teacher.weight),
        beta=beta,
        temperature=1.0,
    )
    found.sum().backward()
    assert found.shape == (0,) and leaves[1].grad is not None and not leaves[1].grad.any()


def test_half_precision_ends_with_the_logits_and_a_teacher_may_have_another() -> None:
    student, teacher, leaves = sides(dtype=torch.bfloat16)
    wide = HeadInput(hidden=teacher.hidden.float(), weight=teacher.weight.float(), transform=teacher.transform)
    for other in (teacher, wide):
        found = vocabulary_divergence(student, other, beta=0.5, temperature=1.0)
        exact = HeadInput(
            hidden=leaves[0].double(), weight=leaves[1].double(), bias=leaves[2].double(), transform=student.transform
        )
        target = HeadInput(hidden=teacher.hidden.double(), weight=teacher.weight.double(), transform=teacher.transform)
        wanted = plain(exact, target, 0.5, 1.0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=3e-2, atol=3e-2)


def test_a_gradient_that_is_not_finite_is_not_taken_for_none() -> None:
    student, teacher, leaves = sides()
    (vocabulary_divergence(student, teacher, beta=0.5, temperature=1.0)[0] * torch.nan).backward()
    assert leaves[0].grad is not None and bool(leaves[0].grad[0].isnan().all())


def test_vocabularies_of_different_size_are_refused() -> None:
    student, teacher, _ = sides()
    shorter = HeadInput(hidden=teacher.hidden, weight=teacher.weight[:-1])
    with pytest.raises(AssertionError, match="one vocabulary, got 11 and 10"):
        vocabulary_divergence(student, shorter, beta=0.5, temperature=1.0)


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


@pytest.mark.parametrize("beta", BETAS)
def test_no_block_is_larger_than_a_tile_and_none_is_kept_when_its_size_is_given(beta: float) -> None:
    """2000 tokens in two tiles, 500 words in tiles of 10; the inputs, [2000, 4] and [500, 4], are smaller."""
    hidden, weight = torch.randn(2000, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    teacher = HeadInput(hidden=torch.randn(2000, 4), weight=torch.randn(500, 4))
    with Largest() as largest:
        found = vocabulary_divergence(
            HeadInput(hidden=hidden, weight=weight), teacher, beta=beta, temperature=1.0, chunk_size=10
        )
        assert not found.grad_fn.kept  # type: ignore[union-attr]
        found.sum().backward()
    assert largest.size == 1000 * 10


@pytest.mark.parametrize(("beta", "without_gradient"), [(0.0, 0), (0.5, 1), (1.0, 0)])
def test_few_tokens_keep_their_logits_for_what_follows_the_backward_pass_or_that_over_the_mixture(
    monkeypatch: pytest.MonkeyPatch, beta: float, without_gradient: int
) -> None:
    found: list[DivergenceResult] = []
    forward = divergence_tiles.forward

    def watched(problem: DivergenceProblem, *, keep: bool) -> DivergenceResult:
        found.append(forward(problem, keep=keep))
        return found[-1]

    monkeypatch.setattr(divergence_tiles, "forward", watched)
    student, teacher, leaves = sides()
    vocabulary_divergence(student, teacher, beta=beta, temperature=1.0)
    with torch.no_grad():
        vocabulary_divergence(student, teacher, beta=beta, temperature=1.0)
    fixed = HeadInput(hidden=leaves[0].detach(), weight=leaves[1].detach())
    vocabulary_divergence(fixed, teacher, beta=beta, temperature=1.0)
    assert [len(result.kept) for result in found] == [1, without_gradient, without_gradient]
