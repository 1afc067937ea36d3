"""Distillation and SDPO behind the `Loss` protocol: what they ask for, what moves a sample, what is not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.distillation.distillation_loss import DistillationLoss
from trl_ray.algorithms.distillation.sdpo_loss import SDPOLoss
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds, TeacherSignal
from trl_ray.algorithms.head.divergence import SupportLogprobs
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import (
    Loss,
    LossInputs,
    LossNeeds,
    StepTotals,
    first_non_finite_sample,
    sample_tokens,
)
from trl_ray.algorithms.loss_registry import build_loss
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.losses.distillation_options import (
    DistillationLossConfig,
    DistillationMode,
    DistillationObjective,
    SDPOObjective,
    Support,
)
from trl_ray.config.losses.policy_options import LossConfig, OldLogprobs
from trl_ray.types import TrainingSample

FULL = DistillationLossConfig(loss_support=Support.FULL)
IW_OPD = DistillationLossConfig(distillation_objective=DistillationObjective.IW_OPD)
FULL_LOGITS = {"distillation_mode": DistillationMode.FULL_LOGITS}
TOPK = {"distillation_mode": DistillationMode.TOPK_LOGITS, "distillation_topk": 5}


def sample(length: int, **changes: Any) -> TrainingSample:
    values: dict[str, Any] = {
        "group_id": 0,
        "prompt_ids": np.array([1], dtype=np.int32),
        "completion_ids": np.arange(length, dtype=np.int32),
        "loss_mask": np.ones(length, dtype=bool),
        "sampler_logprobs": np.full(length, -1.0, dtype=np.float32),
        "advantage": 1.0,
    }
    return TrainingSample(**values | changes)


def inputs(samples: list[TrainingSample], logprobs: Tensor, teacher: TeacherSignal | None, **totals: Any) -> LossInputs:
    count = len(logprobs)
    given = {"num_valid_tokens": count, "num_samples": len(samples), "num_micro_batches": 1, **totals}
    return LossInputs(
        samples=samples,
        tokens=sample_tokens(samples),
        scores=TokenLogprobs(logprobs=logprobs, entropy=torch.full((count,), 0.5)),
        teacher=teacher,
        micro_batch_tokens=count,
        totals=StepTotals(**given),
    )


NEEDS: list[tuple[Any, TeacherNeeds | None]] = [
    (DistillationLossConfig(), TeacherNeeds(teacher_top_k=20)),
    (DistillationLossConfig(loss_support=Support.STUDENT), TeacherNeeds(student_top_k=20, resident=True)),
    (
        DistillationLossConfig(loss_support=Support.UNION, loss_top_k=3),
        TeacherNeeds(teacher_top_k=3, student_top_k=3, resident=True),
    ),
    (DistillationLossConfig(loss_support=Support.FULL, beta=0.25), TeacherNeeds(beta=0.25, resident=True)),
    (DistillationLossConfig(loss_support=Support.SAMPLED), TeacherNeeds()),
    (DistillationLossConfig(loss_support=Support.REALISED), TeacherNeeds()),
    (
        DistillationLossConfig(loss_support=Support.REALISED, beta=0.5, loss_top_k=2),
        TeacherNeeds(teacher_top_k=2, own_token=True),
    ),
    (IW_OPD, TeacherNeeds()),
    (SDPOObjective(), TeacherNeeds()),
    (SDPOObjective(**FULL_LOGITS, distillation_alpha=0.5), TeacherNeeds(beta=0.5, resident=True)),
    (SDPOObjective(**TOPK), TeacherNeeds(student_top_k=5)),
    (SDPOObjective(distillation_weight=0.0), None),
]


@pytest.mark.parametrize(("options", "needs"), NEEDS)
def test_what_is_asked_of_a_teacher(options: Any, needs: TeacherNeeds | None) -> None:
    loss: Loss = build_loss(options)
    assert loss.needs == LossNeeds(teacher=needs)
    assert build_loss(options).totals([sample(2)]) == {} and loss.joined({}) == {}


def test_self_distillations_options_are_not_taken_for_those_of_the_policy_loss_that_they_extend() -> None:
    assert isinstance(build_loss(SDPOObjective()), SDPOLoss) and isinstance(build_loss(LossConfig()), PolicyLoss)
    assert isinstance(build_loss(FULL), DistillationLoss)


def test_a_reference_is_asked_for_where_the_policy_part_has_a_kl() -> None:
    assert build_loss(SDPOObjective(beta=0.1, distillation_weight=0.5)).needs.reference
    assert not build_loss(SDPOObjective(distillation_weight=0.5)).needs.reference


def test_a_sample_moves_by_its_advantage_or_by_what_it_is_taught() -> None:
    plain, idle = sample(2, is_distilled=False), sample(2, is_distilled=False, advantage=0.0)
    taught, cut = sample(2, advantage=0.0), sample(2, loss_mask=np.zeros(2, dtype=bool))
    for weight, moving in ((1.0, [False, False, True, False]), (0.5, [True, False, True, False]), (0.0, [1, 0, 0, 0])):
        loss = build_loss(SDPOObjective(distillation_weight=weight))
        assert [loss.has_gradient(each) for each in (plain, idle, taught, cut)] == [bool(each) for each in moving]


def test_only_examples_of_the_dataset_are_labels() -> None:
    """1/4 of the cross-entropy 2 beside 3/4 of 4, and 4, over two tokens."""
    loss = DistillationLoss(FULL.replace(cross_entropy_weight=0.25))
    samples = [sample(1, is_label=True), sample(1)]
    found = loss(inputs(samples, torch.tensor([-2.0, -8.0]), TeacherSignal(divergence=torch.tensor([4.0, 4.0]))))
    assert found.loss.item() == 3.75 and found.metrics["distillation/cross_entropy"].value == 2
    assert found.metrics["entropy"].value == 0.5


def test_a_label_has_no_sampler_to_weigh_its_advantage_by() -> None:
    """Sampled: teacher -2 above the sampler's -1 by -1. Label: above the student's own -4 by 2. Both weigh 1.5."""
    samples = [sample(1), sample(1, is_label=True, sampler_logprobs=np.zeros(1, np.float32))]
    given = inputs(samples, torch.tensor([-4.0, -4.0]), TeacherSignal(logprobs=torch.tensor([-2.0, -2.0])))
    found = DistillationLoss(IW_OPD)(given)
    assert found.metrics["iw_opd/mean_advantage"].value == pytest.approx(1.5 * (2 - 1) / 2)


def test_distillation_leaves_no_sample_out() -> None:
    given = inputs([sample(1, is_distilled=False)], torch.tensor([-1.0]), TeacherSignal(divergence=torch.tensor([1.0])))
    with pytest.raises(AssertionError, match="leaves samples out"):
        DistillationLoss(FULL)(given)
    empty = inputs([sample(1), sample(0, is_distilled=False)], torch.tensor([-1.0]), given.teacher)
    assert DistillationLoss(FULL)(empty).loss.item() == 1


def test_self_distillation_blends_with_the_whole_policy_loss() -> None:
    """Half of -1 (ratio 1, advantage 1, no correction) and half of (3 + 0) / 2."""
    options = SDPOObjective(distillation_weight=0.5, vllm_importance_sampling_correction=False, **FULL_LOGITS)
    samples = [sample(1), sample(1, is_distilled=False)]
    found = build_loss(options)(
        inputs(samples, torch.tensor([-1.0, -1.0]), TeacherSignal(divergence=torch.tensor([3.0, 9.0])))
    )
    assert found.loss.item() == pytest.approx(0.5 * -1 + 0.5 * 1.5)
    assert found.metrics["self_distillation/policy_loss"].value == -1
    assert {"clip/low", "importance/mean", "entropy"} <= found.metrics.keys()


def test_without_a_policy_part_its_metrics_are_entropy_and_the_lag_of_the_sampler() -> None:
    given = inputs([sample(2)], torch.tensor([-1.0, -1.0]), TeacherSignal(logprobs=torch.tensor([-1.0, -2.0])))
    found = build_loss(SDPOObjective())(given)
    assert found.metrics["entropy"].value == 0.5 and found.metrics["kl/sampler"].value == 0
    assert "importance/mean" not in found.metrics and "self_distillation/policy_loss" not in found.metrics
    assert found.metrics["self_distillation/logprob_abs_diff"].value == 0.5


def test_without_a_weight_no_teacher_is_looked_at() -> None:
    found = build_loss(SDPOObjective(distillation_weight=0.0))(inputs([sample(1)], torch.tensor([-1.0]), None))
    assert found.loss.item() == -1 and "self_distillation/distillation_loss" not in found.metrics


@pytest.mark.parametrize(
    ("old", "first_pass", "ratio"), [("policy", None, None), ("policy", -1.5, 0.5), ("sampler", None, 0.0)]
)
def test_a_token_is_weighed_against_whoever_was_the_old_policy(
    old: str, first_pass: float | None, ratio: float | None
) -> None:
    """Policy -1 against -1.5 of a first pass, or the sampler's -1."""
    known = None if first_pass is None else np.full(1, first_pass, np.float32)
    loss = build_loss(SDPOObjective(**FULL_LOGITS, old_logprobs=OldLogprobs(old)))
    given = inputs([sample(1, old_logprobs=known)], torch.tensor([-1.0]), TeacherSignal(divergence=torch.tensor([2.0])))
    found = loss(given)
    if ratio is None:
        assert "self_distillation/is_ratio" not in found.metrics and found.loss.item() == 2
    else:
        assert found.metrics["self_distillation/is_ratio"].value == pytest.approx(math.exp(ratio))
        assert found.loss.item() == pytest.approx(2 * math.exp(ratio))


def test_the_entropy_bonus_of_the_policy_part_adapts_and_is_kept() -> None:
    options = SDPOObjective(distillation_weight=0.5, use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=1.0)
    loss, other = build_loss(options), build_loss(options)
    found = loss(inputs([sample(1)], torch.tensor([-1.0]), TeacherSignal(logprobs=torch.tensor([-1.0]))))
    assert loss.after_update(found.metrics)["entropy_coef"].value == pytest.approx(0.105)
    other.load_state_dict(loss.state_dict())
    assert other.state_dict() == loss.state_dict() != build_loss(options).state_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_teacher_cannot_have_said_is_traced_to_its_sample(bad: float) -> None:
    samples, ours = [sample(1), sample(2)], torch.tensor([-1.0, -1.0, -1.0])
    fine = TeacherSignal(
        logprobs=torch.full((3,), -1.0),
        support=SupportLogprobs(student=torch.full((3, 2), -1.0), teacher=torch.tensor([[-1.0, -math.inf]] * 3)),
    )
    assert first_non_finite_sample(inputs(samples, ours, fine)) is None
    own = replace(fine, logprobs=torch.tensor([-1.0, -1.0, bad]))
    assert first_non_finite_sample(inputs(samples, ours, own)) == 1
    assert fine.support is not None
    listed = replace(
        fine, support=replace(fine.support, teacher=torch.tensor([[-1.0, bad], [-1.0, -1.0], [-1.0, -1.0]]))
    )
    assert first_non_finite_sample(inputs(samples, ours, listed)) == 0
