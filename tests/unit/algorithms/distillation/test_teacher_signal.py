"""What teachers in actors said becomes a signal, with or without the completion's own token in its support."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.distillation.teacher_signal import (
    NO_TOKEN,
    TeacherNeeds,
    TeacherSignal,
    TeacherTokens,
    blank_signal,
    signal_from_scores,
    with_own_token,
)
from trl_ray.algorithms.head.divergence import SupportLogprobs, support_divergence
from trl_ray.algorithms.head.logprobs import TokenLogprobs

INF, NAN = math.inf, math.nan


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def student(own: Tensor, support: Tensor | None = None) -> TokenLogprobs:
    return TokenLogprobs(logprobs=own, entropy=torch.zeros_like(own), support_logprobs=support)


def said(
    own: Tensor, ids: Tensor | None = None, top: Tensor | None = None, tail: Tensor | None = None
) -> TeacherTokens:
    has_teacher = torch.ones(1, dtype=torch.bool)
    return TeacherTokens(has_teacher=has_teacher, logprobs=own, top_ids=ids, top_logprobs=top, tail=tail)


def test_without_a_support_a_teachers_log_probs_are_all_there_is() -> None:
    found = signal_from_scores(said(logs(0.5)), student(logs(0.25)), torch.tensor([3]), TeacherNeeds())
    assert torch.equal(found.of_tokens, logs(0.5)) and found.support is None and found.divergence is None


def test_a_teachers_list_is_the_support_with_the_students_view_of_it_and_the_tail_that_came_along() -> None:
    ids, top, ours = torch.tensor([[7, 2]]), logs(0.5, 0.25)[None], logs(0.1, 0.2)[None]
    needs = TeacherNeeds(teacher_top_k=2)
    found = signal_from_scores(
        said(logs(0.5), ids, top, logs(0.25)), student(logs(0.1), ours), torch.tensor([7]), needs
    )
    assert found.support is not None and found.support.teacher_tail is not None
    assert torch.equal(found.support.teacher, top) and torch.equal(found.support.student, ours)
    assert torch.equal(found.support.teacher_tail, logs(0.25))


def test_a_new_own_token_takes_its_mass_from_the_tail_and_one_of_the_list_counts_once() -> None:
    """Lists of 1/2 and 1/4; the tokens have 1/8 of the last quarter, and the list's 1/4."""
    support = SupportLogprobs(
        student=logs(0.4, 0.4).expand(2, 2), teacher=logs(0.5, 0.25).expand(2, 2), teacher_tail=logs(0.25, 0.25)
    )
    ids, own = torch.tensor([[7, 2], [7, 2]]), torch.tensor([5, 2])
    found = with_own_token(support, ids, logs(0.1, 0.4), logs(0.125, 0.25), own)
    torch.testing.assert_close(found.teacher.exp(), torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.0]]))
    assert found.teacher_tail is not None
    assert found.teacher_tail.exp().tolist() == pytest.approx([0.125, 0.25])
    forward = [0.5 * math.log(0.5 / 0.4), 0.25 * math.log(0.25 / 0.4)]
    expected = [sum(forward) + 0.125 * math.log(0.125 / 0.1) * 2, sum(forward) + 0.25 * math.log(0.25 / 0.2)]
    assert support_divergence(found, beta=0.0, add_tail=True).tolist() == pytest.approx(expected, abs=1e-6)


def test_an_own_token_that_has_all_of_the_tail_leaves_a_finite_one() -> None:
    support = SupportLogprobs(student=logs(0.4)[None], teacher=logs(0.75)[None], teacher_tail=logs(0.25))
    found = with_own_token(support, torch.tensor([[7]]), logs(0.1), logs(0.2500001), torch.tensor([5]))
    assert bool(torch.isfinite(support_divergence(found, beta=0.5, add_tail=True)).all())


def test_samples_that_no_teacher_was_asked_about_diverge_by_0_and_pull_nowhere() -> None:
    own = logs(0.5, 0.25).requires_grad_()
    found = blank_signal(student(own))
    total = found.over_support(beta=1.0, add_tail=True) + found.over_support(beta=0.0, add_tail=False)
    total = total + found.over_vocabulary
    (grad,) = torch.autograd.grad(total.sum(), own)
    assert total.tolist() == [0, 0] and grad.tolist() == [0, 0] and found.of_tokens.tolist() == [0, 0]


def test_a_list_that_nobody_has_is_blank() -> None:
    needs = TeacherNeeds(teacher_top_k=4)
    found = signal_from_scores(said(torch.zeros(1)), student(logs(0.5)), torch.tensor([1]), needs)
    assert found.over_support(beta=1.0, add_tail=True).tolist() == [0]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_own_log_prob_that_is_not_finite_is_bad(value: float) -> None:
    assert TeacherSignal(logprobs=torch.tensor([-1.0, value])).bad_tokens().tolist() == [False, True]
    assert TeacherSignal(divergence=torch.tensor([value, 0.0])).bad_tokens().tolist() == [True, False]


def test_minus_infinity_stands_for_no_token_in_a_list_and_for_nothing_else() -> None:
    ours, theirs = torch.full((5, 2), -1.0), torch.full((5, 2), -1.0)
    theirs[0, 1], theirs[1, 1], theirs[2, 0], ours[3, 0] = -INF, NAN, INF, -INF
    theirs[4, 0] = ours[4, 0] = -INF
    found = TeacherSignal(support=SupportLogprobs(student=ours, teacher=theirs))
    assert found.bad_tokens().tolist() == [False, True, True, True, False]
    tails = SupportLogprobs(
        student=ours[4:].expand(3, 2), teacher=theirs[4:].expand(3, 2), teacher_tail=torch.tensor([-INF, NAN, INF])
    )
    assert TeacherSignal(support=tails).bad_tokens().tolist() == [False, True, True]


def test_what_only_the_learner_can_tell_is_not_taken_from_lists() -> None:
    ids = torch.tensor([[NO_TOKEN]])
    with pytest.raises(AssertionError, match="hold the teacher"):
        signal_from_scores(
            said(logs(0.5), ids, logs(0.5)[None]),
            student(logs(0.5), logs(0.5)[None]),
            torch.tensor([1]),
            TeacherNeeds(student_top_k=1, resident=True),
        )
