"""Divergences over some tokens of the vocabulary and over one: values known by hand, unions, tails, what is masked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.head.divergence import (
    SupportLogprobs,
    is_first,
    log_tail,
    realised_reverse_kl,
    sampled_reverse_kl,
    support_divergence,
    unique_support,
)

INF = math.inf


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def both(student: Tensor, teacher: Tensor) -> SupportLogprobs:
    return SupportLogprobs(student=student, teacher=teacher)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 0.130812), (0.25, 0.024870), (0.5, 0.033822), (1.0, 0.143841)])
def test_two_coins_are_as_far_apart_as_by_hand(beta: float, expected: float) -> None:
    """A student of 1/2 and 1/2 and a teacher of 3/4 and 1/4."""
    found = support_divergence(both(logs(0.5, 0.5), logs(0.75, 0.25)), beta=beta, add_tail=False)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_a_tail_is_one_more_outcome() -> None:
    """1/2, 1/4 and a rest of 1/4 from 1/4, 1/4 and a rest of 1/2: 1/2 ln 2 - 1/4 ln 2."""
    found = support_divergence(both(logs(0.5, 0.25), logs(0.25, 0.25)), beta=1.0, add_tail=True)
    assert found.item() == pytest.approx(0.25 * math.log(2))


def test_without_a_tail_both_sides_are_normalised() -> None:
    """0.3 and 0.3 are a fair coin, and 0.03 and 0.01 one of 3/4."""
    found = support_divergence(both(logs(0.3, 0.3), logs(0.03, 0.01)), beta=0.0, add_tail=False)
    assert found.item() == pytest.approx(0.130812, abs=1e-6)


def test_a_tail_that_came_along_is_taken_and_its_least_mass_is_that_of_a_full_support() -> None:
    given = SupportLogprobs(student=logs(0.5), teacher=logs(0.25), teacher_tail=torch.tensor([math.log(0.5)]))
    found = support_divergence(given, beta=1.0, add_tail=True)
    assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(1))
    none_left = SupportLogprobs(student=logs(0.5), teacher=logs(1.0), teacher_tail=torch.tensor([-INF]))
    found = support_divergence(none_left, beta=1.0, add_tail=True)
    assert found.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-7), rel=1e-6)
    torch.testing.assert_close(found, support_divergence(both(logs(0.5), logs(1.0)), beta=1.0, add_tail=True))


def test_a_full_support_leaves_a_ten_millionth() -> None:
    assert log_tail(logs(0.5, 0.5)).exp().item() == pytest.approx(1e-7, rel=1e-5)
    assert log_tail(logs(0.5, 0.25)).exp().item() == pytest.approx(0.25)


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_entries_that_stand_for_no_token_change_neither_value_nor_gradient(beta: float, add_tail: bool) -> None:
    student = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    teacher = torch.tensor([[-1.5, -1.0], [-2.0, -0.7]])
    filled = torch.cat((student, torch.tensor([[-0.1], [-INF]])), dim=1)
    plain = support_divergence(both(student, teacher), beta=beta, add_tail=add_tail)
    more = support_divergence(
        both(filled, torch.cat((teacher, torch.full((2, 1), -INF)), dim=1)), beta=beta, add_tail=add_tail
    )
    torch.testing.assert_close(more, plain)
    (want,) = torch.autograd.grad(plain.sum(), student)
    (got,) = torch.autograd.grad(more.sum(), student)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_place_without_any_token_has_no_divergence_and_no_gradient(beta: float, add_tail: bool) -> None:
    student = torch.tensor([[-INF, -1.0]], requires_grad=True)
    found = support_divergence(both(student, torch.full((1, 2), -INF)), beta=beta, add_tail=add_tail)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert found.item() == 0 and not grad.any()


def test_a_teachers_nan_is_not_taken_for_no_token() -> None:
    found = support_divergence(both(logs(0.5, 0.25), logs(0.5, math.nan)), beta=1.0, add_tail=True)
    assert math.isnan(found.item())


def test_a_token_that_the_student_rules_out_leaves_its_reverse_kl_finite() -> None:
    student = logs(0.5, 0.5, 0.0).requires_grad_()
    found = support_divergence(both(student, logs(0.25, 0.5, 0.25)), beta=1.0, add_tail=False)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert found.item() == pytest.approx(0.5 * math.log(2))
    assert bool(grad.isfinite().all()) and grad[0, 2] == 0


def test_the_teacher_gets_no_gradient() -> None:
    teacher = logs(0.75, 0.25).requires_grad_()
    tail = torch.tensor([-3.0], requires_grad=True)
    student = logs(0.5, 0.25).requires_grad_()
    given = SupportLogprobs(student=student, teacher=teacher, teacher_tail=tail)
    (support_divergence(given, beta=0.5, add_tail=True).sum() + sampled_reverse_kl(student, teacher).sum()).backward()
    assert student.grad is not None and teacher.grad is None and tail.grad is None


def test_a_token_counts_where_it_stands_first() -> None:
    ids = torch.tensor([[5, 2, 5, 2, 7], [3, 3, 3, 3, 1]])
    assert is_first(ids).tolist() == [[True, True, False, False, True], [True, False, False, False, True]]


def test_in_a_wide_list_the_first_of_many_equals_is_found_too() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (3, 200))
    expected = [[row.index(value) == place for place, value in enumerate(row)] for row in ids.tolist()]
    assert is_first(ids).tolist() == expected


def test_an_entry_for_no_token_does_not_hide_a_token_with_its_id() -> None:
    """A server fills short lists up with id 0, which is a token too."""
    ids, teacher = torch.tensor([[4, 0, 0, 4]]), torch.tensor([[-1.0, -INF, -2.0, -1.0]])
    found = unique_support(ids, torch.tensor([[-1.0, -1.5, -1.5, -1.0]]), teacher)
    assert found.teacher.tolist() == [[-1.0, -INF, -2.0, -INF]]


def test_a_union_with_itself_is_what_it_was() -> None:
    student, teacher = logs(0.5, 0.25), logs(0.25, 0.25)
    ids = torch.tensor([[8, 3]])
    doubled = unique_support(ids.repeat(1, 2), student.repeat(1, 2), teacher.repeat(1, 2))
    for add_tail in (True, False):
        torch.testing.assert_close(
            support_divergence(doubled, beta=0.5, add_tail=add_tail),
            support_divergence(both(student, teacher), beta=0.5, add_tail=add_tail),
        )


def test_the_score_function_form_has_the_gradient_of_the_log_ratio_times_that_of_the_logprob() -> None:
    student = torch.tensor([math.log(0.5)], requires_grad=True)
    found = sampled_reverse_kl(student, torch.tensor([math.log(0.25)]))
    assert found.item() == pytest.approx(-(math.log(2) ** 2))
    (grad,) = torch.autograd.grad(found, student)
    assert grad.item() == pytest.approx(math.log(2))


def test_the_score_function_forms_mean_gradient_is_that_of_the_reverse_kl() -> None:
    """Over all tokens by their probability: no sampling, no tolerance to tune."""
    torch.manual_seed(0)
    logits = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), torch.randn(1, 7, dtype=torch.float64).log_softmax(-1)
    (want,) = torch.autograd.grad(
        support_divergence(both(student, teacher), beta=1.0, add_tail=False).sum(), logits, retain_graph=True
    )
    mean = (student.exp().detach() * sampled_reverse_kl(student[0], teacher[0])).sum()
    (got,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(got, want)


def test_one_token_and_the_rest_are_two_outcomes() -> None:
    """1/2 against 1/4: 1/2 ln 2 + 1/2 ln 2/3."""
    found = realised_reverse_kl(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]))
    assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
