"""How far a student is from its teacher at each token: the generalised Jensen-Shannon divergence, and one-token forms.

    teacher's log-probs [N,K] of some tokens --.
    student's log-probs [N,K] of the same ----+--> SupportLogprobs --tail or renormalised--> support_divergence [N]
    both sides' hidden states and heads ------> vocabulary_divergence [N], tile by tile (divergence_tiles.py)
    both sides' log-probs [N] of the token that was sampled --> sampled_reverse_kl [N], realised_reverse_kl [N]

    beta = 0      KL(T || S)
    beta = 1      KL(S || T)
    in between    beta KL(T || M) + (1 - beta) KL(S || M),  M = (1 - beta) S + beta T      https://arxiv.org/abs/2306.13649

Gradients flow to the student only. All log-probs are natural, of logits over one temperature for both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl_ray.algorithms.head import divergence_tiles
from trl_ray.algorithms.head.divergence_tiles import DivergenceProblem, DivergenceResult
from trl_ray.algorithms.head.head_problem import FLOOR, HeadProblem, LogitTransform
from trl_ray.algorithms.head.logprobs import tile_shape

LARGEST_LOG_MASS = -1e-7
"""Log of the largest mass that a support is taken to hold, so that its tail has a log."""
_LEAST_LOG_TAIL = math.log(-math.expm1(LARGEST_LOG_MASS))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupportLogprobs:
    """What both sides say of K tokens of the vocabulary at each of N places."""

    student: Tensor
    """[N, K] with gradient."""
    teacher: Tensor
    """[N, K] of the same tokens; -inf where an entry stands for no token, or for one that stands there twice."""
    teacher_tail: Tensor | None = None
    """[N] log of the mass that the teacher gives to all other tokens; None: what its log-probs leave over. Where these
    have been rounded, the tail that came along is better."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadInput:
    """Hidden states and the language-model head that reads them."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    transform: LogitTransform = field(default_factory=LogitTransform)
    """The model's scale and soft-capping of logits."""


def support_divergence(given: SupportLogprobs, *, beta: float, add_tail: bool) -> Tensor:
    """Divergences [N] in nats over some tokens of the vocabulary, each counted once; differentiable.

    With a tail, all other tokens together are one more outcome, so that less is said than by the whole vocabulary but
    nothing else. Without, both sides are normalised over the tokens at hand. Where no entry stands for a token it is 0.

    Args:
        given: log-probs of both sides.
        beta: from 0 to 1.
        add_tail: count the rest of the vocabulary as one outcome.
    """
    assert given.student.shape == given.teacher.shape, "both sides are asked about the same tokens"
    assert 0 <= beta <= 1, f"beta must lie between 0 and 1, got {beta}"
    is_token = ~torch.isneginf(given.teacher)
    # Finite stand-ins instead of infinities: none of these entries counts, and 0 times infinity is no gradient.
    student = given.student.masked_fill(~is_token, FLOOR).clamp_min(FLOOR)
    teacher = given.teacher.detach().to(student.dtype).masked_fill(~is_token, FLOOR)
    if add_tail:
        student = torch.cat((student, log_tail(student)[:, None]), dim=-1)
        tail = log_tail(teacher) if given.teacher_tail is None else given.teacher_tail.detach().to(teacher.dtype)
        teacher = torch.cat((teacher, tail.clamp_min(_LEAST_LOG_TAIL)[:, None]), dim=-1)
        is_token = torch.cat((is_token, torch.ones_like(is_token[:, :1])), dim=-1)
    else:
        student = student - student.logsumexp(dim=-1, keepdim=True)
        teacher = teacher - teacher.logsumexp(dim=-1, keepdim=True)
    return _divergences(student, teacher, beta).masked_fill(~is_token, 0.0).sum(dim=-1)


def log_tail(logprobs: Tensor) -> Tensor:
    """Logs [N] of the mass that tokens with log-probs [N, K] leave over; at least 1e-7 of it."""
    return torch.log(-torch.expm1(logprobs.logsumexp(dim=-1).clamp(max=LARGEST_LOG_MASS)))


def unique_support(ids: Tensor, student: Tensor, teacher: Tensor) -> SupportLogprobs:
    """The union of lists of tokens: each is counted where it stands first.

    Args:
        ids: [N, K] the lists side by side.
        student: [N, K] log-probs of these, with gradient.
        teacher: [N, K] the same; -inf where an entry stands for no token, whatever its id.
    """
    is_repeated = ~is_first(ids.masked_fill(torch.isneginf(teacher), -1))
    return SupportLogprobs(student=student, teacher=teacher.masked_fill(is_repeated, -math.inf))


def is_first(ids: Tensor) -> Tensor:
    """[N, K] bool: which ids [N, K] do not stand in their row before."""
    # A stable sort puts equal ids side by side in the order they stood in.
    ordered, order = ids.sort(dim=-1, stable=True)
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(is_new).scatter_(-1, order, is_new)


def sampled_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Score-function form [N] of the reverse KL at tokens that the student has sampled: sg(s - t) s.

    Its gradient, (s - t) grad s, is in the mean over the student's samples that of KL(S || T); its value is no
    divergence and has either sign.

    Args:
        student: [N] log-probs of the tokens, with gradient.
        teacher: [N]
    """
    return (student - teacher).detach() * student


def realised_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Reverse KL [N] between what both sides say of one question: this token, or any other?

    Args:
        student: [N] log-probs of the tokens, with gradient.
        teacher: [N]
    """
    given = SupportLogprobs(student=student[:, None], teacher=teacher[:, None])
    return support_divergence(given, beta=1.0, add_tail=True)


def vocabulary_divergence(
    student: HeadInput,
    teacher: HeadInput,
    *,
    beta: float,
    temperature: float,
    chunk_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divergences [N] in nats over the whole vocabulary, of which [N, V] exists on neither side.

    Gradients flow to the student's hidden states, weight and bias. Products of the forward pass run in `compute_dtype`,
    everything after them in float32 (float64 where the products do).

    Args:
        student: N tokens and a head.
        teacher: the same tokens, maybe in another context, and a head with the same vocabulary.
        beta: from 0 to 1.
        temperature: > 0, of both sides.
        chunk_size: vocabulary entries in a tile, and no more memory than seven tiles. None lets the device decide, and
            keeps the logits of few tokens (up to 640 MiB, both sides) for the passes that follow.
        compute_dtype: of the products; None keeps each weight's.
    """
    tokens, vocab = student.hidden.shape[0], student.weight.shape[0]
    assert teacher.hidden.shape[0] == tokens, "student and teacher predict the same tokens"
    assert teacher.weight.shape[0] == vocab, (
        f"student and teacher must have one vocabulary, got {vocab} and {teacher.weight.shape[0]} entries; cut both "
        "heads to the entries they share"
    )
    assert temperature > 0 and 0 <= beta <= 1, (
        f"a temperature above 0 and a beta from 0 to 1, got {temperature}, {beta}"
    )
    settings = _Settings(
        beta=float(beta),
        temperature=float(temperature),
        chunk_size=chunk_size,
        student_transform=student.transform,
        teacher_transform=teacher.transform,
        student_dtype=compute_dtype or student.weight.dtype,
        teacher_dtype=compute_dtype or _like(teacher.weight.dtype, student.weight.dtype),
        keep=chunk_size is None and (0 < beta < 1 or _needs_gradient(student)),
    )
    found: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student.hidden,
        student.weight,
        student.bias,
        teacher.hidden.detach(),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        settings,
    )
    return found


def _needs_gradient(side: HeadInput) -> bool:
    tensors = (side.hidden, side.weight, side.bias)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _like(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    """A teacher's dtype of products that is summed up in what the student's is: float64, or else float32."""
    return other if torch.float64 in (dtype, other) else dtype


def _divergences(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """What each outcome [N, K] adds, from log-probs of both sides."""
    if beta == 0:
        return teacher.exp() * (teacher - student)
    if beta == 1:
        return student.exp() * (student - teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What is no tensor."""

    beta: float
    temperature: float
    chunk_size: int | None
    student_transform: LogitTransform
    teacher_transform: LogitTransform
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    keep: bool

    def problem(self, tensors: tuple[Tensor | None, ...]) -> DivergenceProblem:
        """From hidden states, weight and bias of the student, then of the teacher."""
        student = self._side(tensors[:3], self.student_transform, self.student_dtype)
        teacher = self._side(tensors[3:], self.teacher_transform, self.teacher_dtype)
        return DivergenceProblem(student=student, teacher=teacher, beta=self.beta)

    def _side(self, tensors: tuple[Tensor | None, ...], transform: LogitTransform, dtype: torch.dtype) -> HeadProblem:
        hidden, weight, bias = tensors
        assert hidden is not None and weight is not None, "only a bias may be missing"
        return HeadProblem(
            hidden=hidden,
            weight=weight,
            bias=bias,
            targets=hidden.new_zeros(0, dtype=torch.int64),
            temperature=self.temperature,
            transform=transform,
            compute_dtype=dtype,
            tile=tile_shape(hidden.shape[0], weight.shape[0], chunk_size=self.chunk_size, device=hidden.device),
        )


class _Divergence(torch.autograd.Function):
    """Two heads and their divergence as one node of the graph that stores no logits but those worth keeping."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, settings = arguments
        found = divergence_tiles.forward(settings.problem(tuple(tensors)), keep=settings.keep)
        ctx.save_for_backward(*tensors, found.student_total, found.teacher_total, found.student_kl)
        ctx.settings, ctx.kept = settings, found.kept
        return found.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, student_total, teacher_total, student_kl = ctx.saved_tensors
        found = DivergenceResult(
            divergence=student_kl,
            student_total=student_total,
            teacher_total=teacher_total,
            student_kl=student_kl,
            kept=ctx.kept,
        )
        grads = divergence_tiles.backward(
            ctx.settings.problem(tuple(tensors)), found, upstream, needs=ctx.needs_input_grad[:3]
        )
        return grads.hidden, grads.weight, grads.bias, None, None, None, None
