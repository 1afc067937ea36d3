"""The losses of distillation: values by hand, what is left out, and that the cut of an update does not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.distillation.distillation_loss import distillation_loss, weighted_advantages
from trl_ray.algorithms.distillation.sdpo_loss import clipped_ratio, sdpo_loss
from trl_ray.algorithms.distillation.teacher_signal import TeacherSignal
from trl_ray.algorithms.head.divergence import SupportLogprobs
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossOutput
from trl_ray.algorithms.metric_merging import merge_metrics
from trl_ray.config.losses.distillation_options import (
    DistillationLossConfig,
    DistillationMode,
    DistillationObjective,
    SDPOLossConfig,
    Support,
)

FULL = DistillationLossConfig(loss_support=Support.FULL)
IW_OPD = DistillationLossConfig(distillation_objective=DistillationObjective.IW_OPD)
SDPO_FULL = SDPOLossConfig(distillation_mode=DistillationMode.FULL_LOGITS)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def completions(*lengths: int) -> TokenSequences:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return TokenSequences(sample_index=index, num_sequences=len(lengths))


def given(logprobs: Tensor, teacher: TeacherSignal, **others: Any) -> dict[str, Any]:
    """For `distillation_loss`."""
    others = {"tokens": completions(len(logprobs)), "num_valid_tokens": len(logprobs), **others}
    scores = TokenLogprobs(logprobs=logprobs, entropy=torch.zeros_like(logprobs))
    return {"scores": scores, "teacher": teacher, **others}


def sdpo(**others: Any) -> dict[str, Any]:
    """For `sdpo_loss`. Two completions of two tokens and one; the second is not distilled."""
    values: dict[str, Any] = {
        "tokens": completions(2, 1),
        "logprobs": numbers(-1, -2, -3),
        "teacher": TeacherSignal(divergence=numbers(1, 3, 5)),
        "is_distilled": torch.tensor([True, False]),
        "num_samples": 2,
    }
    return {**values, **others}


def test_every_token_of_the_update_counts_alike() -> None:
    found = distillation_loss(
        **given(numbers(-1, -1), TeacherSignal(divergence=numbers(1, 3)), num_valid_tokens=8), config=FULL
    )
    assert found.loss.item() == 0.5
    assert found.metrics["distillation/loss"].value == 2 and found.metrics["distillation/loss"].weight == 2


def test_labels_lose_their_share_of_cross_entropy_and_the_students_own_tokens_do_not() -> None:
    """(3/4 of 4 + 1/4 of 2 + 4) / 2."""
    config = FULL.replace(cross_entropy_weight=0.25)
    inputs = given(numbers(-2, -8), TeacherSignal(divergence=numbers(4, 4)), is_label=torch.tensor([True, False]))
    found = distillation_loss(**inputs, config=config)
    assert found.loss.item() == 3.75
    assert found.metrics["distillation/cross_entropy"].value == 2
    everywhere = distillation_loss(**{**inputs, "is_label": None}, config=config)
    assert everywhere.loss.item() == (3.5 + 5) / 2


def test_the_support_says_what_is_taken_of_the_teacher() -> None:
    student = numbers(math.log(0.5))
    support = SupportLogprobs(student=numbers(math.log(0.5))[:, None], teacher=numbers(math.log(0.25))[:, None])
    signal = TeacherSignal(logprobs=numbers(math.log(0.25)), support=support, divergence=numbers(7))
    binary = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    for wanted, expected in (
        (Support.FULL, 7.0),
        (Support.SAMPLED, -(math.log(2) ** 2)),
        (Support.REALISED, binary),
        (Support.TEACHER, binary),
        (Support.STUDENT, binary),
        (Support.UNION, binary),
    ):
        loss = distillation_loss(**given(student, signal), config=DistillationLossConfig(loss_support=wanted)).loss
        assert loss.item() == pytest.approx(expected), wanted


def test_below_beta_one_the_realised_token_has_company() -> None:
    """Student and teacher swap 3/4 and 1/4: a mixture of two even ones."""
    support = SupportLogprobs(student=numbers(0.75, 0.25).log()[None], teacher=numbers(0.25, 0.75).log()[None])
    signal = TeacherSignal(logprobs=numbers(-9), support=support)
    config = DistillationLossConfig(loss_support=Support.REALISED, beta=0.5, loss_add_tail=False)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(**given(numbers(-9), signal), config=config).loss.item() == pytest.approx(expected)


def test_early_tokens_weigh_more_in_importance_weighted_distillation() -> None:
    """Advantages 1, -1 and 2 with 0, 1/4 and 1/2 of their sum before them."""
    logprobs = numbers(-1, -2, -3).requires_grad_()
    inputs = given(logprobs, TeacherSignal(logprobs=numbers(-4, -6, -1)), sampler_logprobs=numbers(-5, -5, -3))
    weighted = weighted_advantages(completions(3), numbers(-4, -6, -1), numbers(-5, -5, -3), IW_OPD)
    assert weighted.weights.tolist() == [1.5, 1.375, 1.25] and weighted.plain.tolist() == [1, -1, 2]
    found = distillation_loss(**inputs, config=IW_OPD)
    assert found.loss.item() == pytest.approx(6.25 / 3)
    (grad,) = torch.autograd.grad(found.loss, logprobs)
    torch.testing.assert_close(grad, -numbers(1.5, -1.375, 2.5) / 3)
    means = {name.removeprefix("iw_opd/"): metric.value for name, metric in found.metrics.items() if "iw_opd" in name}
    assert means == pytest.approx(
        {"mean_advantage": 2.625 / 3, "mean_abs_advantage": 4 / 3, "mean_weight": 1.375, "min_weight": 1.25}
        | {"max_weight": 1.5}
    )


def test_without_a_sampler_the_students_own_logprobs_are_the_baseline_and_get_no_gradient_from_it() -> None:
    logprobs = numbers(-1, -2).requires_grad_()
    inputs = given(logprobs, TeacherSignal(logprobs=numbers(-2, -1)))
    weighted = weighted_advantages(completions(2), numbers(-2, -1), logprobs, IW_OPD)
    assert weighted.plain.tolist() == [-1, 1] and not weighted.weights.requires_grad
    (grad,) = torch.autograd.grad(distillation_loss(**inputs, config=IW_OPD).loss, logprobs)
    torch.testing.assert_close(grad, numbers(1.5, -1.25) / 2)


def test_weights_begin_anew_with_each_completion_and_agreement_weighs_all_alike() -> None:
    teacher, sampler = numbers(-2, -4, -1, -1, -3), numbers(*[-1.0] * 5)
    weights = weighted_advantages(completions(2, 0, 2, 1), teacher, sampler, IW_OPD).weights
    torch.testing.assert_close(weights, numbers(1.5, 1.375, 1.5, 1.5, 1.5))


def test_self_distillation_is_a_mean_over_all_samples_of_means_over_tokens() -> None:
    """(1 + 3) / 2 of the one that is distilled, and 0 of the other, over 2."""
    found = sdpo_loss(**sdpo(), config=SDPO_FULL)
    assert found.loss.item() == 1
    assert found.metrics["self_distillation/distillation_loss"].value == 2
    assert found.metrics["self_distillation/distillation_loss"].weight == 2


def test_the_blend_is_convex() -> None:
    config = SDPO_FULL.replace(distillation_weight=0.25)
    found = sdpo_loss(**sdpo(policy_loss=torch.tensor(10.0)), config=config)
    assert found.loss.item() == 7.75
    assert found.metrics["self_distillation/policy_loss"].value == 10
    only_policy = sdpo_loss(
        **sdpo(policy_loss=torch.tensor(10.0), teacher=TeacherSignal()),
        config=SDPO_FULL.replace(distillation_weight=0.0),
    )
    assert only_policy.loss.item() == 10


def test_a_ratio_is_clipped_from_above_alone_and_followed_for_20_nats() -> None:
    ratio = clipped_ratio(numbers(math.log(4), math.log(0.5), -30, 0), numbers(0, 0, 0, 0).requires_grad_(), 2.0)
    torch.testing.assert_close(ratio, numbers(2, 0.5, math.exp(-20), 1))
    assert clipped_ratio(numbers(30), numbers(0), 1e9).item() == pytest.approx(math.exp(20))
    assert not ratio.requires_grad


def test_tokens_of_samples_that_are_trained_on_again_weigh_as_much_as_the_policy_has_moved() -> None:
    """Ratios of 4, held at 2, and of 1/2: (2 * 1 + 1/2 * 3) / 2 / 2."""
    inputs = sdpo(logprobs=numbers(-1, -2, -3), old_logprobs=numbers(-1, -2, -3) - numbers(4, 0.5, 1).log())
    found = sdpo_loss(**inputs, config=SDPO_FULL)
    assert found.loss.item() == pytest.approx(0.875)
    assert found.metrics["self_distillation/is_ratio"].value == pytest.approx(1.25)
    assert found.metrics["self_distillation/is_clipped"].value == 0.5
    assert sdpo_loss(**inputs, config=SDPO_FULL.replace(distillation_is_clip=None)).loss.item() == 1


def test_the_modes_take_what_they_say_of_the_teacher() -> None:
    support = SupportLogprobs(student=numbers(*[0.5] * 3).log()[:, None], teacher=numbers(*[0.25] * 3).log()[:, None])
    signal = TeacherSignal(logprobs=numbers(-2, -4, -9), support=support, divergence=numbers(1, 3, 5))
    binary = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    top = {"distillation_topk": 1, "distillation_add_tail": True}
    for config, expected in (
        (SDPO_FULL, 1.0),
        (SDPOLossConfig(), (1 * -1 + 2 * -2) / 2 / 2),
        (SDPOLossConfig(distillation_mode=DistillationMode.TOPK_LOGITS, **top), binary / 2),
    ):
        found = sdpo_loss(**sdpo(teacher=signal), config=config)
        assert found.loss.item() == pytest.approx(expected)
        assert found.metrics["self_distillation/logprob_abs_diff"].value == 1.5


def test_what_is_not_distilled_may_be_anything_and_gets_no_gradient() -> None:
    divergence = torch.tensor([1.0, 3.0, torch.nan], requires_grad=True)
    found = sdpo_loss(**sdpo(teacher=TeacherSignal(divergence=divergence)), config=SDPO_FULL)
    (grad,) = torch.autograd.grad(found.loss, divergence)
    assert found.loss.item() == 1 and grad.tolist() == [0.25, 0.25, 0]


def test_a_micro_batch_without_anything_to_distil_has_a_loss_of_0_with_a_gradient_of_0() -> None:
    logprobs = numbers(-1, -2, -3).requires_grad_()
    inputs = sdpo(
        logprobs=logprobs, teacher=TeacherSignal(logprobs=numbers(0, 0, 0)), is_distilled=torch.tensor([False, False])
    )
    found = sdpo_loss(**inputs, config=SDPOLossConfig())
    (grad,) = torch.autograd.grad(found.loss, logprobs)
    assert found.loss.item() == 0 and not grad.any()
    assert found.metrics["self_distillation/distillation_loss"].weight == 0


def test_a_policy_loss_that_weighs_something_must_be_given() -> None:
    with pytest.raises(AssertionError, match=r"a policy loss of weight 0\.5"):
        sdpo_loss(**sdpo(), config=SDPO_FULL.replace(distillation_weight=0.5))


def pieces(lengths: list[int], cuts: list[list[int]]) -> list[tuple[Tensor, TokenSequences]]:
    """Places of the tokens of each micro-batch's completions."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    found = []
    for chosen in cuts:
        places = [place for index in chosen for place in range(starts[index], starts[index] + lengths[index])]
        found.append((torch.tensor(places, dtype=torch.int64), completions(*[lengths[index] for index in chosen])))
    return found


@pytest.mark.parametrize("config", [FULL.replace(cross_entropy_weight=0.5), IW_OPD])
@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]])
def test_how_an_update_is_cut_changes_neither_distillation_nor_its_metrics(
    config: DistillationLossConfig, cuts: list[list[int]]
) -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 0, 4]
    logprobs, teacher, sampler, divergence = torch.randn(4, 8, dtype=torch.float64)

    def of(places: Tensor, tokens: TokenSequences) -> LossOutput:
        signal = TeacherSignal(logprobs=teacher[places], divergence=divergence[places])
        inputs = given(logprobs[places], signal, tokens=tokens, sampler_logprobs=sampler[places], num_valid_tokens=8)
        return distillation_loss(**inputs, config=config)

    whole = of(torch.arange(8), completions(*lengths))
    parts = [of(places, tokens) for places, tokens in pieces(lengths, cuts)]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    merged = merge_metrics([part.metrics for part in parts])
    for name, metric in whole.metrics.items():
        assert merged[name].value == pytest.approx(metric.value, rel=1e-12), name


@pytest.mark.parametrize("cuts", [[[0], [1], [2], [3]], [[2, 0], [3, 1]]])
def test_how_an_update_is_cut_changes_neither_self_distillation_nor_its_metrics(cuts: list[list[int]]) -> None:
    torch.manual_seed(0)
    lengths, distilled = [3, 1, 0, 4], [True, False, True, True]
    logprobs, teacher, old = torch.randn(3, 8, dtype=torch.float64)

    def of(chosen: list[int], places: Tensor, tokens: TokenSequences) -> LossOutput:
        inputs = sdpo(
            tokens=tokens,
            logprobs=logprobs[places],
            teacher=TeacherSignal(logprobs=teacher[places]),
            old_logprobs=old[places],
            is_distilled=torch.tensor([distilled[index] for index in chosen]),
            num_samples=4,
        )
        return sdpo_loss(**inputs, config=SDPOLossConfig())

    whole = of([0, 1, 2, 3], torch.arange(8), completions(*lengths))
    parts = [of(chosen, *piece) for chosen, piece in zip(cuts, pieces(lengths, cuts), strict=True)]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    merged = merge_metrics([part.metrics for part in parts])
    for name, metric in whole.metrics.items():
        assert merged[name].value == pytest.approx(metric.value, rel=1e-12), name
