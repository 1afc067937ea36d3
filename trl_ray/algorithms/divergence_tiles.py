"""The divergence of two language-model heads over the whole vocabulary, and its gradient, a tile at a time.

    student hidden [C,H] · weight [T,H] --> z_S [C,T] --.
    teacher hidden [C,H'] · weight [T,H'] -> z_T [C,T] --+--> sums over tiles [C] --> divergence, what backward needs [C]
                                                         `--> gradient at z_S [C,T] --> student's hidden, weight, bias

    beta = 0      KL(T || S) = E_T[z_T - z_S] - ln Z_T + ln Z_S      gradient p_S - p_T                        one pass
    beta = 1      KL(S || T) = E_S[z_S - z_T] - ln Z_S + ln Z_T      gradient p_S (ln p_S - ln p_T - KL)       one pass
    in between    beta KL(T || M) + (1 - beta) KL(S || M)            gradient (1 - beta) p_S (ln p_S - ln p_M - KL(S || M))
                  M = (1 - beta) S + beta T; it takes both normalisers first, hence two passes

Logits are in base 2, as in `logprobs_tiles`. Five [C,T] blocks live at once and serve all tiles. Small problems keep both
sides' logits for the passes that follow; all others compute them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ray.algorithms.head_gradients import GradientTotals, active_rows
from trl_ray.algorithms.head_problem import FLOOR, LN2, HeadGradients, HeadProblem, tile_view
from trl_ray.algorithms.logprobs_tiles import kept_tiles, left_rows, prepare, project, slope_of_cap


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DivergenceProblem:
    """Two heads with the same vocabulary and the same tiles, and N tokens that both predict."""

    student: HeadProblem
    teacher: HeadProblem
    beta: float
    """From 0 to 1."""

    @property
    def is_mixed(self) -> bool:
        """Whether both sides are compared with their mixture."""
        return 0 < self.beta < 1


KeptPair = tuple[Tensor, Tensor]
"""Logits [C, T] of student and teacher in base 2."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DivergenceResult:
    """What a forward pass finds for N tokens."""

    divergence: Tensor
    """[N] nats"""
    student_total: Tensor
    """[N] log2 of the sum of all exponentials; like what follows for the backward pass."""
    teacher_total: Tensor
    """[N]"""
    student_kl: Tensor
    """[N] nats, from the student to what it is compared with: teacher or mixture; not read where beta is 0."""
    kept: dict[tuple[int, int], KeptPair]
    """By token tile and vocabulary tile."""


def forward(problem: DivergenceProblem, *, keep: bool) -> DivergenceResult:
    """Divergences of all tokens.

    Args:
        problem: N tokens and two heads.
        keep: leave logits to the passes that follow where that pays.
    """
    tiles = _Tiles(problem, room=kept_tiles(problem.student, sides=2) if keep else 0)
    parts = [_fold(problem, tiles, row, rows) for row, rows in enumerate(problem.student.token_tiles())]
    empty = problem.student.hidden.new_zeros(0, dtype=problem.student.dtype)
    columns = [torch.cat(values) for values in zip(*parts, strict=True)] if parts else [empty] * 4
    return DivergenceResult(
        divergence=columns[0],
        student_total=columns[1],
        teacher_total=columns[2],
        student_kl=columns[3],
        kept=tiles.kept,
    )


def backward(
    problem: DivergenceProblem, found: DivergenceResult, upstream: Tensor, *, needs: tuple[bool, bool, bool]
) -> HeadGradients:
    """Gradients of the student's hidden states, weight and bias. Tokens without a gradient cost nothing.

    Args:
        problem: as in the forward pass.
        found: its result, whose logits are used up.
        upstream: [N] gradients of the divergences.
        needs: which of the three are wanted.
    """
    student = problem.student
    totals, tiles = GradientTotals(student, needs), _Tiles(problem, room=0, kept=found.kept)
    weight = 1 - problem.beta if problem.is_mixed else 1.0
    slopes = None if student.cap is None else student.buffer()
    for row, rows in enumerate(student.token_tiles()):
        chosen = active_rows(upstream[rows] != 0, rows)
        if chosen is None:
            continue
        hidden = student.hidden[chosen]
        factors = upstream[chosen] * (student.slope * weight)
        totals.begin(chosen, hidden.to(student.dtype) * factors[:, None], factors)
        tiles.begin(row, rows, chosen)
        for column, columns in enumerate(student.vocab_tiles()):
            z_student, z_teacher = tiles.logits(column, columns)
            curve = None
            if slopes is not None:
                curve = slope_of_cap(student, z_student, None, out=tile_view(slopes, hidden, columns))
            grad = _gradient(
                problem,
                tiles.less(z_student, found.student_total[chosen], tiles.student),
                tiles.less(z_teacher, found.teacher_total[chosen], tiles.teacher),
                found.student_kl[chosen],
                scratch=(tiles.room(0, z_student), tiles.room(1, z_student)),
            )
            totals.add(grad if curve is None else grad.mul_(curve), columns)
        totals.end()
    return totals.result()


class _Tiles:
    """Logits of both sides, tile by tile: those that were kept, or computed into blocks that all tiles share."""

    def __init__(
        self, problem: DivergenceProblem, *, room: int, kept: dict[tuple[int, int], KeptPair] | None = None
    ) -> None:
        self._problem, self._room = problem, room
        self.kept: dict[tuple[int, int], KeptPair] = {} if kept is None else kept
        self._uses_up = kept is not None
        self.student, self.teacher = problem.student.buffer(), problem.student.buffer()
        self._scratch = [problem.student.buffer() for _ in range(3 if problem.is_mixed else 2)]

    def begin(self, row: int, rows: slice, chosen: slice | Tensor) -> None:
        """Begin a token tile, of which only `chosen` tokens are wanted."""
        self._row, self._rows, self._chosen = row, rows, chosen
        problem = self._problem
        self._prepared = [prepare(side, side.hidden[chosen]) for side in (problem.student, problem.teacher)]

    def logits(self, column: int, columns: slice) -> KeptPair:
        """Logits [C, T] of both sides in base 2, not to be written into: none is below `FLOOR`."""
        place = (self._row, column)
        left = self.kept.pop(place, None) if self._uses_up else self.kept.get(place)
        if left is not None:
            z_student, z_teacher = (left_rows(z, self._rows, self._chosen) for z in left)
            return z_student, z_teacher
        is_kept = not self._uses_up and len(self.kept) < self._room
        problem = self._problem
        sides = ((problem.student, self.student), (problem.teacher, self.teacher))
        found = []
        for prepared, (side, shared) in zip(self._prepared, sides, strict=True):
            out = tile_view(side.buffer() if is_kept else shared, prepared, columns)
            found.append(project(side, prepared, columns, out=out).clamp_min_(FLOOR))
        pair = (found[0], found[1])
        if is_kept:
            self.kept[place] = pair
        return pair

    def less(self, z: Tensor, shift: Tensor, shared: Tensor) -> Tensor:
        """Logits [C, T] less [C], in the block of their side, where they may have been before."""
        return torch.sub(z, shift[:, None], out=shared[: z.numel()].view(z.shape))

    def room(self, which: int, like: Tensor) -> Tensor:
        """A block of its own, as large as a tile."""
        return self._scratch[which][: like.numel()].view(like.shape)


def _fold(
    problem: DivergenceProblem, tiles: _Tiles, row: int, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergences, both sides' log2 totals and the student's KL [C] of one token tile."""
    tiles.begin(row, rows, rows)
    by_student = problem.beta == 1
    sums = _Sums(problem, rows)
    for column, columns in enumerate(problem.student.vocab_tiles()):
        z_student, z_teacher = tiles.logits(column, columns)
        first, second = (z_student, z_teacher) if by_student else (z_teacher, z_student)
        sums.fold(first, second, tiles)
    of_first, of_second = sums.totals()
    student, teacher = (of_first, of_second) if by_student else (of_second, of_first)
    if not problem.is_mixed:
        divergence = sums.divergence()
        return divergence, student, teacher, divergence
    of_teacher, of_student = torch.zeros_like(student), torch.zeros_like(student)
    for column, columns in enumerate(problem.student.vocab_tiles()):
        z_student, z_teacher = tiles.logits(column, columns)
        log_student = tiles.less(z_student, student, tiles.student)
        log_teacher = tiles.less(z_teacher, teacher, tiles.teacher)
        p_student, p_teacher, log_mixture = (tiles.room(which, z_student) for which in range(3))
        torch.exp2(log_student, out=p_student)
        torch.exp2(log_teacher, out=p_teacher)
        torch.mul(p_student, 1 - problem.beta, out=log_mixture).add_(p_teacher, alpha=problem.beta)
        _log2(log_mixture)
        of_student.add_(p_student.mul_(log_student.sub_(log_mixture)).sum(dim=-1), alpha=LN2)
        of_teacher.add_(p_teacher.mul_(log_teacher.sub_(log_mixture)).sum(dim=-1), alpha=LN2)
    divergence = problem.beta * of_teacher + (1 - problem.beta) * of_student
    return divergence, student, teacher, of_student


class _Sums:
    """Running sums of C tokens, each side's relative to its largest logit so far.

    Of the exponentials of both sides, and of the first side's exponentials times how far its logits are above the
    other's, unless the divergence is that from a mixture.
    """

    def __init__(self, problem: DivergenceProblem, rows: slice) -> None:
        like = problem.student.hidden[rows, 0]

        def filled(value: float) -> Tensor:
            return torch.full_like(like, value, dtype=problem.student.dtype)

        self._peaks, self._exponentials = [filled(FLOOR), filled(FLOOR)], [filled(0.0), filled(0.0)]
        self._gap = None if problem.is_mixed else filled(0.0)

    def fold(self, first: Tensor, second: Tensor, tiles: _Tiles) -> None:
        """Take in the logits [C, T] of one vocabulary tile."""
        for side, z in ((1, second), (0, first)):
            peak = torch.maximum(self._peaks[side], z.amax(dim=-1))
            rescale = (self._peaks[side] - peak).exp2()
            powers = torch.sub(z, peak[:, None], out=tiles.room(0, z)).exp2_()
            self._exponentials[side].mul_(rescale).add_(powers.sum(dim=-1))
            self._peaks[side] = peak
        if self._gap is not None:
            gaps = torch.sub(first, second, out=tiles.room(1, first))
            self._gap.mul_(rescale).add_(gaps.mul_(powers).sum(dim=-1))

    def totals(self) -> tuple[Tensor, Tensor]:
        """[C] each, log2 of the sum of all exponentials."""
        first, second = (
            peak + total.log2() for peak, total in zip(self._peaks, self._exponentials, strict=True)
        )
        return first, second

    def divergence(self) -> Tensor:
        """[C] nats, KL(first || second)."""
        assert self._gap is not None, "a mixture takes another pass"
        first, second = self.totals()
        return (self._gap / self._exponentials[0] - first + second).mul_(LN2)


def _gradient(
    problem: DivergenceProblem,
    log_student: Tensor,
    log_teacher: Tensor,
    student_kl: Tensor,
    *,
    scratch: tuple[Tensor, Tensor],
) -> Tensor:
    """Gradient of the divergence at the student's tempered logits [C, T], but for the factor of a mixture.

    Args:
        problem: says which divergence.
        log_student: [C, T] log2 of probabilities; overwritten.
        log_teacher: [C, T] the same.
        student_kl: [C] nats.
        scratch: two times [C, T] room.
    """
    if problem.beta == 0:
        return log_student.exp2_().sub_(log_teacher.exp2_())
    p_student, other = torch.exp2(log_student, out=scratch[0]), log_teacher
    if problem.is_mixed:
        other = torch.exp2(log_teacher, out=scratch[1]).mul_(problem.beta).add_(p_student, alpha=1 - problem.beta)
        _log2(other)
    return log_student.sub_(other).mul_(LN2).sub_(student_kl[:, None]).mul_(p_student)


def _log2(probabilities: Tensor) -> None:
    """In place; what is 0 on both sides of a mixture counts nothing, whatever finite number stands for its log."""
    probabilities.clamp_min_(torch.finfo(probabilities.dtype).tiny).log2_()
