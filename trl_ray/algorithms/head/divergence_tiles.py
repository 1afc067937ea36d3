"""The divergence of two language-model heads over the whole vocabulary, and its gradient, a tile at a time.

    student hidden [C,H] · weight [T,H] ---> z_S [C,T] --.
    teacher hidden [C,H'] · weight [T,H'] -> z_T [C,T] --+--> sums [C] --> divergence, what the backward pass needs [C]
                                                         `--> gradient at z_S [C,T] --> student's hidden, weight, bias

    beta = 0     KL(T || S) = E_T[z_T - z_S] - ln Z_T + ln Z_S    gradient p_S - p_T                      one pass
    beta = 1     KL(S || T) = E_S[z_S - z_T] - ln Z_S + ln Z_T    gradient p_S (ln p_S - ln p_T - KL)     one pass
    in between   beta KL(T || M) + (1 - beta) KL(S || M)          gradient (1 - beta) p_S (ln p_S - ln p_M - KL(S || M))
                 M = (1 - beta) S + beta T                        both normalisers come first: two passes

Logits are in base 2, as in `logprobs_tiles`. Four or five [C,T] blocks live at once and serve all tiles. Small problems
keep both sides' logits for the passes that follow; all others compute them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_ray.algorithms.head.head_problem import (
    FLOOR,
    LN2,
    GradientTotals,
    HeadGradients,
    HeadProblem,
    active_rows,
    tile_view,
)
from trl_ray.algorithms.head.logprobs_tiles import kept_tiles, left_rows, prepare, project, slope_of_cap

_STUDENT, _TEACHER = 0, 1


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TilePair:
    """Logits [C, T] of both sides in base 2; none is below `FLOOR`."""

    student: Tensor
    teacher: Tensor


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
    kept: dict[tuple[int, int], TilePair] = field(default_factory=dict)
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

    def joined(name: str) -> Tensor:
        return torch.cat([empty, *(getattr(part, name) for part in parts)])

    return DivergenceResult(
        divergence=joined("divergence"),
        student_total=joined("student_total"),
        teacher_total=joined("teacher_total"),
        student_kl=joined("student_kl"),
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
            pair = tiles.logits(column, columns)
            curve = None
            if slopes is not None:
                curve = slope_of_cap(student, pair.student, None, out=tile_view(slopes, hidden, columns))
            grad = _gradient(
                problem,
                tiles.log_probabilities(pair, found.student_total[chosen], found.teacher_total[chosen]),
                found.student_kl[chosen],
                scratch=(tiles.room(0, pair.student), tiles.room(1, pair.student)),
            )
            totals.add(grad if curve is None else grad.mul_(curve), columns)
        totals.end()
    return totals.result()


class _Tiles:
    """Logits of both sides, tile by tile: those that were kept, or computed into blocks that all tiles share."""

    def __init__(
        self, problem: DivergenceProblem, *, room: int, kept: dict[tuple[int, int], TilePair] | None = None
    ) -> None:
        self._problem, self._room = problem, room
        self.kept: dict[tuple[int, int], TilePair] = {} if kept is None else kept
        self._uses_up = kept is not None
        self._student, self._teacher = problem.student.buffer(), problem.student.buffer()
        self._scratch = [problem.student.buffer() for _ in range(3 if problem.is_mixed else 2)]

    def begin(self, row: int, rows: slice, chosen: slice | Tensor) -> None:
        """Begin a token tile, of which only `chosen` tokens are wanted."""
        self._row, self._rows, self._chosen = row, rows, chosen
        problem = self._problem
        self._prepared = [prepare(side, side.hidden[chosen]) for side in (problem.student, problem.teacher)]

    def logits(self, column: int, columns: slice) -> TilePair:
        """Logits of one vocabulary tile, which must not be written into."""
        place = (self._row, column)
        left = self.kept.pop(place, None) if self._uses_up else self.kept.get(place)
        if left is not None:
            return TilePair(
                student=left_rows(left.student, self._rows, self._chosen),
                teacher=left_rows(left.teacher, self._rows, self._chosen),
            )
        is_kept = not self._uses_up and len(self.kept) < self._room
        problem = self._problem
        pair = TilePair(
            student=self._projected(problem.student, columns, self._prepared[0], None if is_kept else self._student),
            teacher=self._projected(problem.teacher, columns, self._prepared[1], None if is_kept else self._teacher),
        )
        if is_kept:
            self.kept[place] = pair
        return pair

    def log_probabilities(self, pair: TilePair, student_total: Tensor, teacher_total: Tensor) -> TilePair:
        """Logits less the totals [C], to be written into; logits that were not kept are gone."""
        shared = (self._student, self._teacher)
        student, teacher = (block[: pair.student.numel()].view(pair.student.shape) for block in shared)
        torch.sub(pair.student, student_total[:, None], out=student)
        torch.sub(pair.teacher, teacher_total[:, None], out=teacher)
        return TilePair(student=student, teacher=teacher)

    def _projected(self, side: HeadProblem, columns: slice, prepared: Tensor, block: Tensor | None) -> Tensor:
        out = tile_view(side.buffer() if block is None else block, prepared, columns)
        return project(side, prepared, columns, out=out).clamp_min_(FLOOR)

    def room(self, which: int, like: Tensor) -> Tensor:
        """A block of its own, as large as a tile."""
        return self._scratch[which][: like.numel()].view(like.shape)


def _fold(problem: DivergenceProblem, tiles: _Tiles, row: int, rows: slice) -> DivergenceResult:
    """What is found for one token tile."""
    tiles.begin(row, rows, rows)
    sums = _Sums(problem, rows)
    for column, columns in enumerate(problem.student.vocab_tiles()):
        sums.fold(tiles.logits(column, columns), tiles)
    student, teacher = sums.total(_STUDENT), sums.total(_TEACHER)
    if not problem.is_mixed:
        divergence = sums.divergence()
        return DivergenceResult(
            divergence=divergence, student_total=student, teacher_total=teacher, student_kl=divergence
        )
    student_kl, teacher_kl = torch.zeros_like(student), torch.zeros_like(student)
    for column, columns in enumerate(problem.student.vocab_tiles()):
        logs = tiles.log_probabilities(tiles.logits(column, columns), student, teacher)
        p_student, p_teacher, log_mixture = (tiles.room(which, logs.student) for which in range(3))
        torch.exp2(logs.student, out=p_student)
        torch.exp2(logs.teacher, out=p_teacher)
        torch.mul(p_student, 1 - problem.beta, out=log_mixture).add_(p_teacher, alpha=problem.beta)
        _log2(log_mixture)
        student_kl.add_(p_student.mul_(logs.student.sub_(log_mixture)).sum(dim=-1), alpha=LN2)
        teacher_kl.add_(p_teacher.mul_(logs.teacher.sub_(log_mixture)).sum(dim=-1), alpha=LN2)
    return DivergenceResult(
        divergence=problem.beta * teacher_kl + (1 - problem.beta) * student_kl,
        student_total=student,
        teacher_total=teacher,
        student_kl=student_kl,
    )


class _Sums:
    """Running sums of C tokens over vocabulary tiles, each side's relative to its largest logit so far.

    Of the exponentials of both sides; and, unless the divergence is that from a mixture, of one side's exponentials
    times how far its logits are above the other's.
    """

    def __init__(self, problem: DivergenceProblem, rows: slice) -> None:
        like = problem.student.hidden[rows, 0]

        def filled(value: float) -> Tensor:
            return torch.full_like(like, value, dtype=problem.student.dtype)

        self._peaks, self._exponentials = [filled(FLOOR), filled(FLOOR)], [filled(0.0), filled(0.0)]
        self._above = _STUDENT if problem.beta == 1 else _TEACHER
        self._gap = None if problem.is_mixed else filled(0.0)

    def fold(self, pair: TilePair, tiles: _Tiles) -> None:
        """Take in the logits of one vocabulary tile."""
        logits = (pair.student, pair.teacher)
        for side, z in enumerate(logits):
            peak = torch.maximum(self._peaks[side], z.amax(dim=-1))
            rescale = (self._peaks[side] - peak).exp2()
            powers = torch.sub(z, peak[:, None], out=tiles.room(0, z)).exp2_()
            self._exponentials[side].mul_(rescale).add_(powers.sum(dim=-1))
            self._peaks[side] = peak
            if self._gap is not None and side == self._above:
                gaps = torch.sub(z, logits[1 - side], out=tiles.room(1, z))
                self._gap.mul_(rescale).add_(gaps.mul_(powers).sum(dim=-1))

    def total(self, side: int) -> Tensor:
        """[C] log2 of the sum of all exponentials."""
        return self._peaks[side] + self._exponentials[side].log2()

    def divergence(self) -> Tensor:
        """[C] nats."""
        assert self._gap is not None, "a mixture takes another pass"
        above, other = self._above, 1 - self._above
        return (self._gap / self._exponentials[above] - self.total(above) + self.total(other)).mul_(LN2)


def _gradient(
    problem: DivergenceProblem,
    logs: TilePair,
    student_kl: Tensor,
    *,
    scratch: tuple[Tensor, Tensor],
) -> Tensor:
    """Gradient of the divergence at the student's tempered logits [C, T], but for the factor of a mixture.

    Args:
        problem: says which divergence.
        logs: [C, T] log2 of both sides' probabilities; overwritten.
        student_kl: [C] nats.
        scratch: two times [C, T] room.
    """
    if problem.beta == 0:
        return logs.student.exp2_().sub_(logs.teacher.exp2_())
    p_student, other = torch.exp2(logs.student, out=scratch[0]), logs.teacher
    if problem.is_mixed:
        other = torch.exp2(logs.teacher, out=scratch[1]).mul_(problem.beta).add_(p_student, alpha=1 - problem.beta)
        _log2(other)
    return logs.student.sub_(other).mul_(LN2).sub_(student_kl[:, None]).mul_(p_student)


def _log2(probabilities: Tensor) -> None:
    """In place; what is 0 on both sides of a mixture counts nothing, whatever finite number stands for its log."""
    probabilities.clamp_min_(torch.finfo(probabilities.dtype).tiny).log2_()
