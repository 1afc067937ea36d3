"""What the options of distillation refuse, and what they say a teacher must be asked."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.losses.distillation_options import (
    DistillationLossConfig,
    DistillationMode,
    DistillationObjective,
    DivergenceConfig,
    SDPOLossConfig,
    Support,
)
from trl_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_support": "sampled", "beta": 0.5}, "beta must be 1 with loss_support=sampled, got 0.5"),
        (
            {"loss_support": "teacher", "loss_top_k": 1, "loss_add_tail": False},
            "loss_add_tail must be true with loss_support=teacher, loss_top_k=1",
        ),
        (
            {"loss_support": "student", "loss_top_k": 1, "loss_add_tail": False},
            "loss_add_tail must be true with loss_support=student, loss_top_k=1",
        ),
        (
            {"loss_support": "realised", "loss_add_tail": False},
            "loss_add_tail must be true with loss_support=realised, loss_top_k=20 and beta=1",
        ),
        (
            {"distillation_objective": "iw_opd", "beta": 0.5},
            "beta must be 1 with distillation_objective=iw_opd, got 0.5",
        ),
    ],
)
def test_objectives_that_are_constant_or_estimate_something_else_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationLossConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_support": "union", "loss_top_k": 1, "loss_add_tail": False},
        {"loss_support": "realised", "beta": 0.5, "loss_add_tail": False},
        {"loss_support": "realised", "loss_top_k": 1},
        {"distillation_objective": "iw_opd", "loss_support": "teacher"},
    ],
)
def test_what_two_tokens_or_a_tail_make_a_distribution_of_is_allowed(options: dict[str, Any]) -> None:
    DistillationLossConfig(**options)


@pytest.mark.parametrize(
    ("support", "beta", "of_teacher", "of_student"),
    [
        (Support.FULL, 1.0, 0, 0),
        (Support.TEACHER, 1.0, 5, 0),
        (Support.STUDENT, 1.0, 0, 5),
        (Support.UNION, 1.0, 5, 5),
        (Support.SAMPLED, 1.0, 0, 0),
        (Support.REALISED, 1.0, 0, 0),
        (Support.REALISED, 0.5, 5, 0),
    ],
)
def test_a_support_says_how_many_tokens_teacher_and_student_must_name(
    support: Support, beta: float, of_teacher: int, of_student: int
) -> None:
    config = DivergenceConfig(loss_support=support, beta=beta, loss_top_k=5)
    assert (config.teacher_top_k, config.student_top_k) == (of_teacher, of_student)


def test_the_importance_weighted_objective_asks_for_the_completions_own_tokens_alone() -> None:
    config = DistillationLossConfig(distillation_objective=DistillationObjective.IW_OPD)
    assert (config.teacher_top_k, config.student_top_k) == (0, 0)


def test_self_distillation_over_one_token_needs_a_tail() -> None:
    options = {"distillation_mode": DistillationMode.TOPK_LOGITS, "distillation_topk": 1}
    with pytest.raises(ConfigError, match="distillation_add_tail must be true with distillation_topk=1"):
        SDPOLossConfig(**options)
    SDPOLossConfig(**options, distillation_add_tail=True)
