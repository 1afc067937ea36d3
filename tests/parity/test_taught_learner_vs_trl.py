"""A learner's loss and gradients with a teacher are those of TRL's trainers on the same logits.

The whole path on our side: samples, layout, teacher, chunked head, losses, micro-batches. On TRL's: one padded batch of
whole logits. Averages are followed over several steps.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taught_batches import TEMPERATURE, batch_of, row_logits, said, taught_samples
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
from trl_ray.config.losses.policy_options import LossType
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.config.teacher_options import TeacherConfig, TeacherKind, TeacherOptions, TeacherSource, TeacherWeights
from trl_ray.models.policy_loading import load_policy
from trl_ray.types import TrainBatch, TrainingSample

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
BETAS = [0.0, 0.25, 0.5, 1.0]
TOP_K = 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("other"), family="llama", seed=3)


def learner_of(path: str, loss: LossSection, kind: TeacherKind | None, teacher: str, **weights: Any) -> PolicyLearner:
    return PolicyLearner(
        model=ModelConfig(model_name_or_path=path, gradient_checkpointing=False),
        training=TrainingConfig(learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0),
        loss=loss,
        temperature=TEMPERATURE,
        total_updates=10,
        teacher=None
        if kind is None
        else TeacherSource(
            name="t",
            kind=kind,
            model=ModelConfig(model_name_or_path=teacher),
            options=TeacherOptions(model_name_or_path=teacher) if kind is TeacherKind.EXTERNAL else TeacherConfig(),
            weights=None if kind is TeacherKind.EXTERNAL else TeacherWeights(teacher_model_kind=kind, **weights),
        ),
    )


class Padded:
    """Samples as TRL's trainers hold them: one batch, padded at the right."""

    def __init__(self, samples: Sequence[TrainingSample], student: Any, teacher: Any) -> None:
        self.samples, self.student, self.teacher = samples, student, teacher
        self.width = max(len(sample.completion_ids) for sample in samples)
        self.ids = self.pad([torch.from_numpy(sample.completion_ids.astype(np.int64)) for sample in samples])
        self.mask = self.pad([torch.from_numpy(sample.loss_mask).float() for sample in samples])
        self.distilled = torch.tensor([sample.is_distilled for sample in samples]).float()

    def pad(self, rows: Sequence[Tensor]) -> Tensor:
        """[B, W, ...]"""
        return torch.stack([torch.cat((row, row.new_zeros(self.width - len(row), *row.shape[1:]))) for row in rows])

    @property
    def student_logits(self) -> Tensor:
        return self.pad([row_logits(self.student, sample) for sample in self.samples])

    @property
    def teacher_logits(self) -> Tensor:
        with torch.no_grad():
            return self.pad([row_logits(self.teacher, sample, in_context=True) for sample in self.samples])

    @property
    def labels(self) -> Tensor:
        return self.ids.masked_fill(self.mask == 0, -100)


def gradients_of(learner: PolicyLearner, batch: TrainBatch) -> tuple[float, list[Tensor]]:
    """Loss and gradients of an update, which is not made."""
    passed = learner._passes.train(batch)
    found = [weight.grad.clone() for weight in learner._model.parameters() if weight.grad is not None]
    learner._backend.discard()
    return passed.loss, found


def same(learner: PolicyLearner, samples: Sequence[TrainingSample], theirs: Tensor, student: Any) -> None:
    """Loss and every gradient, however the update is cut."""
    want = torch.autograd.grad(theirs, list(student.parameters()))
    for size in (8, 3):
        loss, got = gradients_of(learner, batch_of(samples, size=size))
        assert loss == pytest.approx(float(theirs.detach()), rel=1e-4, abs=1e-5)
        for one, expected in zip(got, want, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4 * scale + 1e-7)


class SDPOStandIn:
    """What TRL's SDPO trainer asks of itself in the losses."""

    def __init__(self, options: SDPOObjective, padded: Padded, student: Tensor, teacher: Tensor) -> None:
        self.args = SimpleNamespace(
            distillation_mode=options.distillation_mode.value,
            distillation_topk=options.distillation_topk,
            distillation_alpha=options.distillation_alpha,
            distillation_add_tail=options.distillation_add_tail,
            distillation_is_clip=options.distillation_is_clip,
            distillation_weight=options.distillation_weight,
        )
        self.accelerator = SimpleNamespace(gather=lambda value: value)
        self._metrics: Any = {"train": defaultdict(list)}
        self.use_teacher_server, self.teacher_model = False, None
        self.model, self.current_gradient_accumulation_steps = SimpleNamespace(training=True), 1
        self.importance_sampling_level, self.loss_type = "token", options.loss_type.value
        self.epsilon_low = self.epsilon_high = options.epsilon
        self._padded, self._student, self._teacher = padded, student, teacher

    def _log_self_distillation_metric(self, mode: str, value: float) -> None:
        self._metrics[mode]["distillation_loss"].append(value)

    def _forward_logits(self, **_: Any) -> Tensor:
        return self._student

    def _compute_teacher_student_logits(self, *_: Any) -> SimpleNamespace:
        padded = self._padded
        return SimpleNamespace(
            completion_ids=padded.ids,
            completion_mask=padded.mask,
            loss_mask=padded.mask * padded.distilled[:, None],
            student_logits=self._student,
            teacher_logits=self._teacher,
        )

    def _compute_policy_loss(self, *given: Any) -> Any:
        from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

        return SDPOTrainer._compute_policy_loss(self, *given)

    def _compute_self_distillation_loss(self, *given: Any) -> Any:
        from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

        return SDPOTrainer._compute_self_distillation_loss(self, *given)


def trls_sdpo(options: SDPOObjective, padded: Padded, *, with_old: bool) -> tuple[Tensor, SDPOStandIn]:
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    logits = padded.student_logits / TEMPERATURE
    trainer = SDPOStandIn(options, padded, logits, padded.teacher_logits / TEMPERATURE)
    inputs: dict[str, Any] = {
        "prompt_ids": padded.ids[:, :1],
        "prompt_mask": padded.mask[:, :1],
        "completion_ids": padded.ids,
        "completion_mask": padded.mask,
        "advantages": torch.tensor([sample.advantage for sample in padded.samples]),
    }
    if with_old:
        olds = [sample.old_logprobs for sample in padded.samples]
        inputs["old_per_token_logps"] = padded.pad([torch.from_numpy(old) for old in olds if old is not None])
    loss: Tensor = SDPOTrainer.compute_loss(trainer, trainer.model, inputs)
    return loss, trainer


def with_old(samples: Sequence[TrainingSample], student: Any) -> list[TrainingSample]:
    """As after a first pass under weights a little away from the student's."""
    rng = np.random.default_rng(0)
    found = []
    for sample in samples:
        logs = (row_logits(student, sample).detach() / TEMPERATURE).log_softmax(-1)
        own = logs.gather(-1, torch.from_numpy(sample.completion_ids.astype(np.int64))[:, None])[:, 0].numpy()
        found.append(replace(sample, old_logprobs=own + rng.normal(0, 0.5, len(own)).astype(np.float32)))
    return found


MODES: list[dict[str, Any]] = [
    {"distillation_mode": DistillationMode.SAMPLED_TOKEN},
    *({"distillation_mode": DistillationMode.FULL_LOGITS, "distillation_alpha": alpha} for alpha in BETAS),
    *(
        {
            "distillation_mode": DistillationMode.TOPK_LOGITS,
            "distillation_topk": TOP_K,
            "distillation_alpha": alpha,
            "distillation_add_tail": add_tail,
        }
        for alpha, add_tail in ((0.0, True), (0.5, True), (0.5, False), (1.0, False))
    ),
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
@pytest.mark.parametrize(("weight", "clip"), [(1.0, None), (1.0, 1.3), (0.4, 1.3)])
def test_a_learners_self_distillation_is_trls_in_every_mode(
    mode: dict[str, Any], weight: float, clip: float | None, tiny: str
) -> None:
    options = SDPOObjective(
        **mode,
        distillation_weight=weight,
        distillation_is_clip=clip,
        loss_type=LossType.GRPO,
        vllm_importance_sampling_correction=False,
    )
    learner = learner_of(tiny, options, TeacherKind.LIVE, tiny)
    student = load_policy(ModelConfig(model_name_or_path=tiny, gradient_checkpointing=False)).eval()
    samples = with_old(taught_samples(0), student)
    theirs, trainer = trls_sdpo(options, Padded(samples, student, student), with_old=True)
    metrics = learner.evaluate(batch_of(samples, size=3)).metrics
    logged = trainer._metrics["train"]["distillation_loss"][0]
    assert metrics["self_distillation/distillation_loss"].value == pytest.approx(logged, rel=1e-4)
    if weight < 1:
        policy = trainer._metrics["train"]["self_distillation/policy_loss"][0]
        assert metrics["self_distillation/policy_loss"].value == pytest.approx(policy, rel=1e-4, abs=1e-5)
    if clip is not None:
        assert 0 < metrics["self_distillation/is_clipped"].value < 1
    same(learner, samples, theirs, student)


@pytest.mark.parametrize("mode", [MODES[0], MODES[6], MODES[7]], ids=["sampled", "topk-tail", "topk"])
def test_self_distillation_from_what_engines_said_is_trls_from_its_server(mode: dict[str, Any], tiny: str) -> None:
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    options = SDPOObjective(**mode)
    learner = learner_of(tiny, options, None, tiny)
    student = load_policy(ModelConfig(model_name_or_path=tiny, gradient_checkpointing=False)).eval()
    samples = said(student, with_old(taught_samples(4), student), top_k=TOP_K)
    padded = Padded(samples, student, student)
    teacher = (padded.teacher_logits / TEMPERATURE).log_softmax(-1)
    top, absent = teacher.topk(TOP_K, dim=-1), padded.mask == 0
    answers = {
        "actual_logprobs": teacher.gather(-1, padded.ids[..., None]).squeeze(-1).masked_fill(absent, -torch.inf),
        "topk_logprobs": top.values.masked_fill(absent[..., None], -torch.inf),
        "topk_token_ids": top.indices,
    }
    trainer: Any = SDPOStandIn(options, padded, padded.student_logits / TEMPERATURE, teacher)
    trainer.state, trainer._last_loaded_step = SimpleNamespace(global_step=0), 0
    trainer.temperature = TEMPERATURE
    trainer._get_teacher_token_logprobs_from_server = lambda *_: answers
    olds = [sample.old_logprobs for sample in samples]
    theirs = SDPOTrainer._compute_server_distillation_loss(
        trainer,
        trainer.model,
        {
            "prompt_ids": padded.ids[:, :1],
            "prompt_mask": padded.mask[:, :1],
            "completion_ids": padded.ids,
            "completion_mask": padded.mask,
            "self_distillation_mask": padded.distilled,
            "old_per_token_logps": padded.pad([torch.from_numpy(old) for old in olds if old is not None]),
        },
    )
    same(learner, samples, theirs, student)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("support", "add_tail"), [(Support.FULL, True), (None, True), (None, False)])
def test_a_learners_distillation_is_trls_for_every_beta(
    beta: float, support: Support | None, add_tail: bool, tiny: str, other: str
) -> None:
    """Over the whole vocabulary, and over the support that TRL takes for the beta."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    taken = support or {0.0: Support.TEACHER, 1.0: Support.STUDENT}.get(beta, Support.UNION)
    options = DistillationLossConfig(beta=beta, loss_support=taken, loss_top_k=TOP_K, loss_add_tail=add_tail)
    learner = learner_of(tiny, options, TeacherKind.EXTERNAL, other)
    models = [load_policy(ModelConfig(model_name_or_path=path, gradient_checkpointing=False)) for path in (tiny, other)]
    samples = taught_samples(1, hinted=False)
    padded = Padded(samples, *(model.eval() for model in models))
    theirs = IWOPDTrainer.generalized_jsd_loss(
        padded.student_logits,
        padded.teacher_logits,
        padded.labels,
        beta=beta,
        temperature=TEMPERATURE,
        num_items_in_batch=int(padded.mask.sum()),
        **({} if support is Support.FULL else {"top_k": TOP_K, "add_tail": add_tail}),
    )
    same(learner, samples, theirs, models[0])


@pytest.mark.parametrize("support", [Support.TEACHER, Support.STUDENT, Support.UNION])
@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_a_learners_support_with_any_beta_is_trls_masked_divergence(
    support: Support, beta: float, tiny: str, other: str
) -> None:
    from trl.experimental.iw_opd.iw_opd_trainer import _add_tail_bucket, _jsd_divergence

    options = DistillationLossConfig(beta=beta, loss_support=support, loss_top_k=TOP_K)
    learner = learner_of(tiny, options, TeacherKind.EXTERNAL, other)
    models = [load_policy(ModelConfig(model_name_or_path=path, gradient_checkpointing=False)) for path in (tiny, other)]
    samples = taught_samples(2, hinted=False)
    padded = Padded(samples, *(model.eval() for model in models))
    where = padded.mask.bool()
    student = (padded.student_logits[where] / TEMPERATURE).log_softmax(-1)
    teacher = (padded.teacher_logits[where] / TEMPERATURE).log_softmax(-1)
    keep = torch.zeros(student.shape, dtype=torch.bool)
    for side, wanted in ((teacher, Support.TEACHER), (student, Support.STUDENT)):
        if support in (wanted, Support.UNION):
            keep.scatter_(1, side.topk(TOP_K).indices, True)
    ours, mask = _add_tail_bucket(student.masked_fill(~keep, -torch.inf), keep)
    target, _ = _add_tail_bucket(teacher.masked_fill(~keep, -torch.inf), keep)
    theirs = _jsd_divergence(ours, target, beta, mask).sum() / int(where.sum())
    same(learner, samples, theirs, models[0])


def test_a_learners_importance_weighted_distillation_is_trls(tiny: str, other: str) -> None:
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    options = DistillationLossConfig(distillation_objective=DistillationObjective.IW_OPD)
    learner = learner_of(tiny, options, TeacherKind.EXTERNAL, other)
    models = [load_policy(ModelConfig(model_name_or_path=path, gradient_checkpointing=False)) for path in (tiny, other)]
    samples = taught_samples(3, hinted=False)
    padded = Padded(samples, *(model.eval() for model in models))
    trainer = SimpleNamespace(
        temperature=TEMPERATURE,
        iw_opd_epsilon=options.iw_opd_epsilon,
        iw_opd_gamma=options.iw_opd_gamma,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    teacher = (padded.teacher_logits / TEMPERATURE).log_softmax(-1).gather(-1, padded.ids[..., None]).squeeze(-1)
    rollout = [torch.from_numpy(each.sampler_logprobs) for each in samples if each.sampler_logprobs is not None]
    theirs = IWOPDTrainer._compute_iw_opd_loss(
        trainer,
        padded.student_logits,
        padded.ids,
        padded.labels,
        teacher,
        rollout_logprobs=padded.pad(rollout),
        num_items_in_batch=int(padded.mask.sum()),
    )
    same(learner, samples, theirs, models[0])


@pytest.mark.parametrize(("rate", "every"), [(0.05, 1), (0.3, 2), (1.0, 1)])
def test_a_learners_average_is_trls_over_the_steps_bit_for_bit(rate: float, every: int, tiny: str) -> None:
    from trl.experimental.sdpo.teacher_sync import SyncTeacherModelCallback

    learner = learner_of(
        tiny, SDPOObjective(), TeacherKind.EMA, tiny, teacher_update_rate=rate, teacher_sync_steps=every
    )
    theirs = load_policy(ModelConfig(model_name_or_path=tiny), trainable=False)
    for step in range(1, 6):
        learner.step(batch_of(taught_samples(step), step=step))
        if step % every == 0:
            SyncTeacherModelCallback._sync_target_model(learner._model, theirs, rate)
    assert learner._teacher is not None
    own = dict(learner._teacher._policy.named_parameters())
    for name, weight in theirs.named_parameters():
        assert own[name].equal(weight), name
