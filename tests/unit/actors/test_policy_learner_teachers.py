"""The learner of distillation and self-distillation: teachers at hand and teachers that have spoken."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taught_batches import TEMPERATURE, batch_of, said, taught_samples
from tiny_models import build_tiny_model
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.config.losses.distillation_options import (
    DistillationLossConfig,
    DistillationMode,
    DistillationObjective,
    SDPOObjective,
    Support,
)
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.config.teacher_options import (
    AdapterAverage,
    TeacherConfig,
    TeacherKind,
    TeacherOptions,
    TeacherSource,
    TeacherWeights,
)
from trl_ray.models.policy_loading import load_policy
from trl_ray.types import StepResult, TrainingSample

SAMPLED = SDPOObjective()
FULL_LOGITS = SDPOObjective(distillation_mode=DistillationMode.FULL_LOGITS, distillation_alpha=0.5)
TOPK = SDPOObjective(distillation_mode=DistillationMode.TOPK_LOGITS, distillation_topk=5, distillation_add_tail=True)
BLEND = SDPOObjective(distillation_weight=0.5, beta=0.05, entropy_coef=0.01)
PEFT = {"use_peft": True, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The student's directory."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model of the same vocabulary."""
    return build_tiny_model(tmp_path_factory.mktemp("other"), family="llama", seed=3)


def held(kind: TeacherKind, path: str, average: AdapterAverage = AdapterAverage.FACTORS) -> TeacherSource:
    weights = TeacherWeights(
        teacher_model_kind=kind, teacher_update_rate=0.3, teacher_sync_steps=2, teacher_adapter_average=average
    )
    return TeacherSource(
        name="t",
        kind=kind,
        model=ModelConfig(model_name_or_path=path),
        options=TeacherOptions(model_name_or_path=path) if kind is TeacherKind.EXTERNAL else TeacherConfig(),
        weights=None if kind is TeacherKind.EXTERNAL else weights,
    )


def learner_of(
    path: str,
    loss: LossSection,
    teacher: TeacherSource | None = None,
    *,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **options: Any,
) -> PolicyLearner:
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    return PolicyLearner(
        model=ModelConfig(model_name_or_path=path, gradient_checkpointing=False, **(model or {})),
        training=TrainingConfig(**defaults | (training or {})),
        loss=loss,
        temperature=TEMPERATURE,
        total_updates=10,
        teacher=teacher,
        **options,
    )


def flat(learner: PolicyLearner) -> Tensor:
    return torch.cat([weight.detach().flatten().clone() for _, weight in learner._backend.weights()])


def samples_for(loss: LossSection, seed: int) -> list[TrainingSample]:
    """Only self-distillation leaves samples out."""
    return taught_samples(seed, hinted=isinstance(loss, SDPOObjective))


CASES: dict[str, tuple[LossSection, TeacherKind, dict[str, Any], AdapterAverage]] = {
    "live": (FULL_LOGITS, TeacherKind.LIVE, {}, AdapterAverage.FACTORS),
    "base": (SAMPLED, TeacherKind.BASE, {}, AdapterAverage.FACTORS),
    "base-adapter": (TOPK, TeacherKind.BASE, PEFT, AdapterAverage.FACTORS),
    "ema": (TOPK, TeacherKind.EMA, {}, AdapterAverage.FACTORS),
    "ema-blend": (BLEND, TeacherKind.EMA, {}, AdapterAverage.FACTORS),
    "ema-factors": (FULL_LOGITS, TeacherKind.EMA, PEFT, AdapterAverage.FACTORS),
    "ema-product": (SAMPLED, TeacherKind.EMA, PEFT, AdapterAverage.PRODUCT),
    "external": (
        DistillationLossConfig(beta=0.5, loss_support=Support.UNION),
        TeacherKind.EXTERNAL,
        {},
        AdapterAverage.FACTORS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    case: str, tiny: str, other: str, tmp_path: Path
) -> None:
    loss, kind, model, average = CASES[case]
    teacher = held(kind, other if kind is TeacherKind.EXTERNAL else tiny, average)
    straight = learner_of(tiny, loss, teacher, model=model)
    for step in range(1, 4):
        straight.step(batch_of(samples_for(loss, step), step=step, size=3))
    saved = straight.save(str(tmp_path), step=3, extra={})
    resumed = learner_of(tiny, loss, teacher, model=model, checkpoint=saved)
    for step in range(4, 7):
        batch = batch_of(samples_for(loss, step), step=step, size=3)
        one, two = straight.step(batch), resumed.step(batch)
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm) and not one.skipped
    assert torch.equal(flat(straight), flat(resumed))
    assert (Path(saved) / "teacher").is_dir() is (kind is TeacherKind.EMA)


@pytest.mark.parametrize("case", CASES)
def test_how_an_update_is_cut_does_not_matter(case: str, tiny: str, other: str) -> None:
    loss, kind, model, average = CASES[case]
    results: list[StepResult] = []
    for size in (8, 3):
        teacher = held(kind, other if kind is TeacherKind.EXTERNAL else tiny, average)
        learner = learner_of(tiny, loss, teacher, model=model, training={"adam_epsilon": 1.0})
        learner.step(batch_of(samples_for(loss, 1), step=1, size=size))
        results.append(learner.step(batch_of(samples_for(loss, 3), step=2, size=size)))
    whole, cut = results
    assert cut.loss == pytest.approx(whole.loss, rel=1e-3, abs=1e-5)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)
    assert cut.metrics.keys() == whole.metrics.keys()


@pytest.mark.parametrize("case", ["live", "ema-blend", "ema-factors", "external"])
def test_an_evaluation_is_the_loss_of_the_next_step_and_changes_nothing(case: str, tiny: str, other: str) -> None:
    loss, kind, model, average = CASES[case]
    teacher = held(kind, other if kind is TeacherKind.EXTERNAL else tiny, average)
    learner = learner_of(tiny, loss, teacher, model=model)
    learner.step(batch_of(samples_for(loss, 1), step=1))
    batch, before = batch_of(samples_for(loss, 2), step=2, size=3), flat(learner)
    evaluated = learner.evaluate(batch)
    assert torch.equal(flat(learner), before)
    result = learner.step(batch)
    assert evaluated.loss == pytest.approx(result.loss, rel=1e-3, abs=1e-5)
    assert evaluated.metrics.keys() <= result.metrics.keys()


SAID = {
    "top-k": DistillationLossConfig(beta=0.5, loss_top_k=4),
    "realised": DistillationLossConfig(beta=0.5, loss_top_k=4, loss_support=Support.REALISED),
    "sampled": DistillationLossConfig(loss_support=Support.SAMPLED),
    "iw-opd": DistillationLossConfig(distillation_objective=DistillationObjective.IW_OPD),
    "sdpo": SAMPLED,
    "sdpo-topk": TOPK,
}


def scored(path: str, seed: int) -> list[TrainingSample]:
    return said(load_policy(ModelConfig(model_name_or_path=path)).eval(), taught_samples(seed), top_k=4, tail=True)


@pytest.mark.parametrize("name", SAID)
def test_samples_that_teachers_have_scored_need_no_teacher_at_hand(name: str, tiny: str, other: str) -> None:
    """And may be evaluated on, and cut as one likes."""
    loss = SAID[name]
    samples = scored(other, 1)
    if isinstance(loss, DistillationLossConfig):
        samples = [sample for sample in samples if sample.is_distilled]
    whole, single = learner_of(tiny, loss), learner_of(tiny, loss)
    evaluated = whole.evaluate(batch_of(samples))
    one, many = whole.step(batch_of(samples)), single.step(batch_of(samples, size=1))
    assert evaluated.loss == pytest.approx(one.loss, rel=1e-4)
    assert many.loss == pytest.approx(one.loss, rel=1e-4) and many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert one.grad_norm > 0 and whole._teacher is None


def test_a_student_comes_nearer_to_its_teacher(tiny: str, other: str) -> None:
    samples = taught_samples(1, hinted=False)
    for loss in (
        DistillationLossConfig(beta=0.0, loss_support=Support.FULL),
        DistillationLossConfig(beta=0.5, loss_support=Support.UNION),
    ):
        learner = learner_of(tiny, loss, held(TeacherKind.EXTERNAL, other), training={"learning_rate": 3e-3})
        losses = [learner.step(batch_of(samples, step=step)).loss for step in range(1, 9)]
        assert losses[-1] < 0.7 * losses[0]


def test_a_live_teacher_that_sees_the_same_has_nothing_to_teach(tiny: str) -> None:
    samples = taught_samples(1, hinted=False)
    learner = learner_of(tiny, FULL_LOGITS, held(TeacherKind.LIVE, tiny))
    result = learner.step(batch_of(samples))
    assert result.loss == pytest.approx(0.0, abs=1e-6) and result.grad_norm == pytest.approx(0.0, abs=1e-4)


def test_without_a_weight_no_teacher_is_held_or_asked(tiny: str) -> None:
    options = SDPOObjective(distillation_weight=0.0)
    learner = learner_of(tiny, options, held(TeacherKind.EMA, tiny))
    assert learner._teacher is None
    assert learner.step(batch_of(taught_samples(1))).grad_norm > 0


@pytest.mark.parametrize("place", ["own", "top"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_trained_on_what_a_teacher_cannot_have_said(place: str, value: float, tiny: str, other: str) -> None:
    samples = [sample for sample in scored(other, 1) if sample.is_distilled]
    scores = samples[2].teacher
    assert scores is not None and scores.top_logprobs is not None
    bad = (scores.logprobs if place == "own" else scores.top_logprobs).copy()
    bad[np.flatnonzero(samples[2].loss_mask)[-1]] = value
    spoilt = replace(scores, logprobs=bad) if place == "own" else replace(scores, top_logprobs=bad)
    samples[2] = replace(samples[2], teacher=spoilt)
    learner = learner_of(tiny, SAID["top-k"])
    before = flat(learner)
    result = learner.step(batch_of(samples))
    assert result.skipped and torch.equal(flat(learner), before)
    (event,) = learner.drain().events
    assert event.detail["sample"] == 2 and event.detail["group_id"] == samples[2].group_id


def test_a_teacher_with_a_weight_must_be_at_hand_where_only_the_learner_can_tell(tiny: str) -> None:
    with pytest.raises(AssertionError, match="hold the teacher"):
        learner_of(tiny, FULL_LOGITS)


def test_an_average_moves_with_the_last_update_of_a_step_only(tiny: str) -> None:
    learner = learner_of(tiny, SAMPLED, held(TeacherKind.EMA, tiny))
    learner.step(batch_of(taught_samples(1), step=1))
    teacher = learner._teacher
    assert teacher is not None
    initial = torch.cat([weight.flatten().clone() for weight in teacher._policy.parameters()])
    for is_last in (False, True):
        learner.step(replace(batch_of(taught_samples(2), step=2), is_last_update=is_last))
        now = torch.cat([weight.flatten() for weight in teacher._policy.parameters()])
        assert torch.equal(now, initial) is not is_last
