"""Divergences and the losses of distillation give the values and gradients of TRL's trainers.

Both start from the same hidden states and heads: TRL from padded rows of logits, ours from trained tokens alone and the
chunked head.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.distillation.distillation_loss import distillation_loss
from trl_ray.algorithms.distillation.sdpo_loss import sdpo_loss
from trl_ray.algorithms.distillation.teacher_signal import TeacherSignal
from trl_ray.algorithms.head.divergence import (
    HeadInput,
    SupportLogprobs,
    support_divergence,
    unique_support,
    vocabulary_divergence,
)
from trl_ray.algorithms.head.head_problem import ExtraOutputs, LogitTransform
from trl_ray.algorithms.head.logprobs import TokenLogprobs, token_logprobs
from trl_ray.algorithms.loss import LossOutput
from trl_ray.config.losses.distillation_options import (
    DistillationLossConfig,
    DistillationMode,
    DistillationObjective,
    SDPOLossConfig,
    Support,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
BETAS = [0.0, 0.25, 0.5, 1.0]
ROWS, LENGTH, WIDTH, VOCAB, TOP_K, TEMPERATURE = 4, 6, 5, 13, 3, 0.7
LENGTHS = [6, 1, 4, 3]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """Rows of completions, each token of which student and teacher predict from a hidden state."""

    student: HeadInput
    """Of all [ROWS * LENGTH] places; leaves that want a gradient."""
    teacher: HeadInput
    ids: Tensor
    """[ROWS, LENGTH] the completions' tokens."""
    mask: Tensor
    """[ROWS, LENGTH] bool, True at trained tokens."""
    old: Tensor
    """[ROWS, LENGTH] log-probs of some older policy."""

    @property
    def places(self) -> Tensor:
        """[N] of the trained tokens."""
        return self.mask.reshape(-1).nonzero().squeeze(1)

    @property
    def tokens(self) -> TokenSequences:
        return TokenSequences(sample_index=self.places // LENGTH, num_sequences=ROWS)

    @property
    def targets(self) -> Tensor:
        return self.ids.reshape(-1)[self.places]

    @property
    def labels(self) -> Tensor:
        return torch.where(self.mask, self.ids, -100)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student.hidden, self.student.weight]

    def logits(self, side: HeadInput) -> Tensor:
        """[ROWS, LENGTH, VOCAB] before the temperature."""
        return (side.hidden @ side.weight.T).view(ROWS, LENGTH, VOCAB)

    def trained(self, side: HeadInput) -> HeadInput:
        return HeadInput(hidden=side.hidden[self.places], weight=side.weight)

    def scores(self, side: HeadInput, support: Tensor | None = None, top_k: int = 0) -> TokenLogprobs:
        return token_logprobs(
            side.hidden[self.places],
            side.weight,
            self.targets,
            support=support,
            temperature=TEMPERATURE,
            chunk_size=4,
            extras=ExtraOutputs(top_k=top_k, top_gradient=top_k > 0),
        )


def case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = False  # a tool's output in the middle
    return Case(
        student=HeadInput(
            hidden=normal(ROWS * LENGTH, WIDTH).requires_grad_(), weight=normal(VOCAB, WIDTH).requires_grad_()
        ),
        teacher=HeadInput(hidden=normal(ROWS * LENGTH, WIDTH + 2), weight=normal(VOCAB, WIDTH + 2)),
        ids=torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator),
        mask=mask,
        old=-3 * torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64),
    )


def same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients of two scalars."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    got, want = torch.autograd.grad(ours, leaves, retain_graph=True), torch.autograd.grad(theirs, leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def local_support(given: Case, support: Support) -> SupportLogprobs:
    """As a learner with the teacher in the same place finds it: one pass over the student's head."""
    their_top = given.scores(given.teacher, top_k=TOP_K)
    assert their_top.top_ids is not None and their_top.top_logprobs is not None
    if support is Support.TEACHER:
        ours = given.scores(given.student, their_top.top_ids)
        assert ours.support_logprobs is not None
        return SupportLogprobs(student=ours.support_logprobs, teacher=their_top.top_logprobs)
    asked = their_top.top_ids if support is Support.UNION else None
    ours = given.scores(given.student, asked, top_k=TOP_K)
    assert ours.top_ids is not None and ours.top_logprobs is not None
    scored = given.scores(given.teacher, ours.top_ids).support_logprobs
    assert scored is not None
    if support is Support.STUDENT:
        return SupportLogprobs(student=ours.top_logprobs, teacher=scored)
    assert ours.support_logprobs is not None
    return unique_support(
        torch.cat((their_top.top_ids, ours.top_ids), dim=1),
        torch.cat((ours.support_logprobs, ours.top_logprobs), dim=1),
        torch.cat((their_top.top_logprobs, scored), dim=1),
    )


def distilled(given: Case, teacher: TeacherSignal, **options: Any) -> Tensor:
    config, count = DistillationLossConfig(**options), len(given.places)
    return distillation_loss(given.tokens, given.scores(given.student), teacher, config, num_valid_tokens=count).loss


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=1.5, softcap=2.0)])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_the_whole_vocabulary_in_tiles_gives_what_trls_kernel_gives(
    beta: float, transform: LogitTransform, chunk_size: int | None
) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 24), (101, 24), (101,), (37, 16), (101, 16), (101,)]
    tensors = [torch.randn(shape, generator=generator) / (5 if len(shape) > 1 else 2) for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    ours = vocabulary_divergence(
        HeadInput(hidden=leaves[0], weight=leaves[1], bias=leaves[2], transform=transform),
        HeadInput(hidden=tensors[3], weight=tensors[4], bias=tensors[5], transform=LogitTransform(scale=0.5)),
        beta=beta,
        temperature=TEMPERATURE,
        chunk_size=chunk_size,
    )
    theirs, _ = ChunkedDivergenceFunction.apply(  # type: ignore[no-untyped-call]
        *tensors, beta, TEMPERATURE, transform.scale, transform.softcap, 0.5, None
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(37, generator=generator)
    got = torch.autograd.grad((upstream * ours).sum(), leaves)
    want = torch.autograd.grad((upstream * theirs).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_over_the_whole_vocabulary_is_trls(beta: float) -> None:
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    given = case()
    found = vocabulary_divergence(
        given.trained(given.student), given.trained(given.teacher), beta=beta, temperature=TEMPERATURE, chunk_size=4
    )
    ours = distilled(given, TeacherSignal(divergence=found), beta=beta, loss_support=Support.FULL)
    theirs = IWOPDTrainer.generalized_jsd_loss(
        given.logits(given.student),
        given.logits(given.teacher),
        given.labels,
        beta=beta,
        temperature=TEMPERATURE,
        num_items_in_batch=int(given.mask.sum()),
    )
    same(ours, theirs, given.leaves)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_the_support_that_trl_takes_for_a_beta_gives_its_loss(beta: float, add_tail: bool) -> None:
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    given = case()
    support = {0.0: Support.TEACHER, 1.0: Support.STUDENT}.get(beta, Support.UNION)
    found = TeacherSignal(support=local_support(given, support))
    ours = distilled(given, found, beta=beta, loss_support=support, loss_add_tail=add_tail, loss_top_k=TOP_K)
    theirs = IWOPDTrainer.generalized_jsd_loss(
        given.logits(given.student),
        given.logits(given.teacher),
        given.labels,
        beta=beta,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        add_tail=add_tail,
    )
    same(ours, theirs, given.leaves)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("support", [Support.TEACHER, Support.STUDENT, Support.UNION])
def test_every_support_with_every_beta_is_trls_masked_divergence(beta: float, add_tail: bool, support: Support) -> None:
    from trl.experimental.iw_opd.iw_opd_trainer import _add_tail_bucket, _jsd_divergence

    given = case()
    found = local_support(given, support)
    ours = support_divergence(found, beta=beta, add_tail=add_tail)
    mask = torch.isfinite(found.teacher)
    student, teacher = found.student.masked_fill(~mask, -torch.inf), found.teacher
    if add_tail:
        student, full_mask = _add_tail_bucket(student, mask)
        teacher, mask = _add_tail_bucket(teacher, mask)[0], full_mask
    else:
        student = student - student.logsumexp(dim=-1, keepdim=True)
        teacher = teacher - teacher.logsumexp(dim=-1, keepdim=True)
    theirs = _jsd_divergence(student, teacher, beta, mask).sum(dim=-1)
    same(ours.sum(), theirs.sum(), given.leaves)


@pytest.mark.parametrize(("beta", "add_tail"), [(0.25, True), (0.25, False), (0.5, True), (0.5, False), (1.0, True)])
def test_the_realised_token_beside_the_teachers_first_is_what_trl_asks_a_server_for(
    beta: float, add_tail: bool
) -> None:
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer

    given = case(seed=3)
    first, own = given.scores(given.teacher, top_k=1), given.scores(given.teacher).logprobs
    assert first.top_ids is not None and first.top_logprobs is not None
    is_same = first.top_ids.squeeze(1) == given.targets
    assert bool(is_same.any()) and not bool(is_same.all())
    ours = given.scores(given.student, torch.cat((first.top_ids, given.targets[:, None]), dim=1)).support_logprobs
    assert ours is not None
    union = unique_support(
        torch.cat((first.top_ids, given.targets[:, None]), dim=1),
        ours,
        torch.cat((first.top_logprobs, own[:, None]), dim=1),
    )
    loss = distilled(
        given,
        TeacherSignal(logprobs=own, support=union),
        beta=beta,
        loss_support=Support.REALISED,
        loss_add_tail=add_tail,
        loss_top_k=1,
    )
    logs = [(given.logits(side) / TEMPERATURE).log_softmax(-1) for side in (given.student, given.teacher)]
    trainer = SimpleNamespace(
        beta=beta, loss_add_tail=add_tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )
    theirs = ServerDistillationTrainer._compute_sparse_top_1_divergence_loss(
        trainer,
        student_log_probs=logs[0],
        teacher_top1_token_ids=logs[1].argmax(-1),
        teacher_top1_logprobs=logs[1].amax(-1),
        reverse_token_ids=given.ids,
        reverse_teacher_logprobs=logs[1].gather(-1, given.ids[..., None]).squeeze(-1),
        labels=given.labels,
    )
    same(loss, theirs, given.leaves)


def test_a_servers_shorter_lists_give_trls_forward_kl() -> None:
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer

    given = case()
    teacher = given.scores(given.teacher, top_k=TOP_K)
    assert teacher.top_ids is not None and teacher.top_logprobs is not None
    known = teacher.top_logprobs.detach().clone()
    known[::2, -1] = -torch.inf
    ours = given.scores(given.student, teacher.top_ids.masked_fill(torch.isneginf(known), -1)).support_logprobs
    assert ours is not None
    logs = (given.logits(given.student) / TEMPERATURE).log_softmax(-1)
    padded = torch.zeros(ROWS * LENGTH, TOP_K, dtype=torch.float64)
    ids = torch.zeros(ROWS * LENGTH, TOP_K, dtype=torch.int64)
    padded[given.places], ids[given.places] = known, teacher.top_ids
    result = {
        "topk_logprobs": padded.view(ROWS, LENGTH, TOP_K),
        "topk_token_ids": ids.view(ROWS, LENGTH, TOP_K),
    }
    for add_tail in (True, False):
        signal = TeacherSignal(support=SupportLogprobs(student=ours, teacher=known))
        loss = distilled(given, signal, beta=0.0, loss_add_tail=add_tail, loss_top_k=TOP_K)
        trainer = SimpleNamespace(
            loss_add_tail=add_tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
        )
        theirs = ServerDistillationTrainer._compute_server_forward_kl_loss(trainer, result, logs, given.labels)
        torch.testing.assert_close(loss, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_rollout", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_importance_weighted_distillation_is_trls_with_its_metrics(with_rollout: bool, gamma: float) -> None:
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    given = case()
    own = given.scores(given.teacher).logprobs
    options = DistillationLossConfig(distillation_objective=DistillationObjective.IW_OPD, iw_opd_gamma=gamma)
    found = distillation_loss(
        given.tokens,
        given.scores(given.student),
        TeacherSignal(logprobs=own),
        options,
        num_valid_tokens=11,
        sampler_logprobs=given.old.reshape(-1)[given.places] if with_rollout else None,
    )
    trainer = SimpleNamespace(
        temperature=TEMPERATURE,
        iw_opd_epsilon=options.iw_opd_epsilon,
        iw_opd_gamma=gamma,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    teacher = (given.logits(given.teacher) / TEMPERATURE).log_softmax(-1)
    theirs = IWOPDTrainer._compute_iw_opd_loss(
        trainer,
        given.logits(given.student),
        given.ids,
        given.labels,
        teacher.gather(-1, given.ids[..., None]).squeeze(-1),
        rollout_logprobs=given.old if with_rollout else None,
        num_items_in_batch=11,
    )
    for name, values in trainer._metrics["train"].items():
        assert found.metrics[name].value == pytest.approx(values[0], rel=1e-6), name
    assert {name for name in found.metrics if name.startswith("iw_opd/")} == set(trainer._metrics["train"])
    same(found.loss, theirs, given.leaves)


class SDPOStandIn:
    """What TRL's SDPO trainer asks of itself in the losses."""

    def __init__(self, options: SDPOLossConfig) -> None:
        self.args = SimpleNamespace(
            distillation_mode=options.distillation_mode.value,
            distillation_topk=options.distillation_topk,
            distillation_alpha=options.distillation_alpha,
            distillation_add_tail=options.distillation_add_tail,
            distillation_is_clip=options.distillation_is_clip,
        )
        self.accelerator = SimpleNamespace(gather=lambda value: value)
        self.logged: list[float] = []
        self._metrics: Any = {"train": defaultdict(list)}
        self.state = SimpleNamespace(global_step=0)
        self._last_loaded_step = 0
        self.temperature = TEMPERATURE
        self.answers: dict[str, Tensor] = {}
        self.logits: Tensor | None = None

    def _log_self_distillation_metric(self, mode: str, value: float) -> None:
        self.logged.append(value)

    def _get_teacher_token_logprobs_from_server(self, inputs: Any, logits_to_keep: int) -> dict[str, Tensor]:
        return self.answers

    def _forward_logits(self, **_: Any) -> Tensor | None:
        return self.logits


DISTILLED = [True, True, False, True]
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
        for alpha in BETAS
        for add_tail in (True, False)
    ),
]


def sdpo_signal(given: Case, options: SDPOLossConfig, support: Support) -> TeacherSignal:
    own = given.scores(given.teacher).logprobs
    if options.distillation_mode is DistillationMode.FULL_LOGITS:
        found = vocabulary_divergence(
            given.trained(given.student),
            given.trained(given.teacher),
            beta=options.distillation_alpha,
            temperature=TEMPERATURE,
            chunk_size=4,
        )
        return TeacherSignal(logprobs=own, divergence=found)
    if options.distillation_mode is DistillationMode.TOPK_LOGITS:
        return TeacherSignal(logprobs=own, support=local_support(given, support))
    return TeacherSignal(logprobs=own)


def self_distilled(given: Case, signal: TeacherSignal, options: SDPOLossConfig, is_distilled: Tensor) -> LossOutput:
    return sdpo_loss(
        given.tokens,
        given.scores(given.student).logprobs,
        signal,
        options,
        is_distilled=is_distilled,
        old_logprobs=given.old.reshape(-1)[given.places],
        num_samples=ROWS,
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
@pytest.mark.parametrize("clip", [None, 1.3])
def test_self_distillation_is_trls_in_every_mode(mode: dict[str, Any], clip: float | None) -> None:
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    given, options = case(), SDPOLossConfig(**mode, distillation_is_clip=clip)
    signal = sdpo_signal(given, options, Support.STUDENT)
    is_distilled = torch.tensor(DISTILLED)
    found = self_distilled(given, signal, options, is_distilled)
    trainer = SDPOStandIn(options)
    logits = SimpleNamespace(
        completion_ids=given.ids,
        completion_mask=given.mask.double(),
        loss_mask=given.mask.double() * is_distilled[:, None],
        student_logits=given.logits(given.student) / TEMPERATURE,
        teacher_logits=given.logits(given.teacher) / TEMPERATURE,
    )
    theirs = SDPOTrainer._compute_self_distillation_loss(
        trainer, SimpleNamespace(training=True), {"old_per_token_logps": given.old}, logits
    )
    assert found.metrics["self_distillation/distillation_loss"].value == pytest.approx(trainer.logged[0], rel=1e-10)
    same(found.loss, theirs, given.leaves)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "full" not in mode["distillation_mode"].value])
def test_self_distillation_from_a_server_is_trls_on_the_teachers_support(mode: dict[str, Any]) -> None:
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    given, options = case(), SDPOLossConfig(**mode)
    signal = sdpo_signal(given, options, Support.TEACHER)
    is_distilled = torch.tensor(DISTILLED)
    found = self_distilled(given, signal, options, is_distilled)
    trainer = SDPOStandIn(options)
    trainer.logits = given.logits(given.student) / TEMPERATURE
    teacher = (given.logits(given.teacher) / TEMPERATURE).log_softmax(-1)
    top = teacher.topk(TOP_K, dim=-1)
    absent = ~given.mask[..., None]
    trainer.answers = {
        "actual_logprobs": teacher.gather(-1, given.ids[..., None]).squeeze(-1).masked_fill(~given.mask, -torch.inf),
        "topk_logprobs": top.values.masked_fill(absent, -torch.inf),
        "topk_token_ids": top.indices.masked_fill(absent, 0),
    }
    theirs = SDPOTrainer._compute_server_distillation_loss(
        trainer,
        SimpleNamespace(training=True),
        {
            "prompt_ids": given.ids[:, :1],
            "prompt_mask": given.mask[:, :1],
            "completion_ids": given.ids,
            "completion_mask": given.mask.double(),
            "self_distillation_mask": is_distilled.double(),
            "old_per_token_logps": given.old,
        },
    )
    gap = trainer._metrics["train"]["self_distillation/server_logprob_abs_diff"][0]
    assert found.metrics["self_distillation/logprob_abs_diff"].value == pytest.approx(gap, rel=1e-10)
    same(found.loss, theirs, given.leaves)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_blend_with_the_policy_loss_is_trls(weight: float) -> None:
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    given, options = case(), SDPOLossConfig(distillation_weight=weight)
    signal = sdpo_signal(given, options, Support.STUDENT)
    is_distilled, advantages = torch.tensor(DISTILLED), torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    logprobs = given.scores(given.student).logprobs
    surrogate = -(logprobs - logprobs.detach()).exp() * advantages[given.tokens.sample_index]
    policy = given.tokens.means(surrogate).sum() / ROWS
    found = sdpo_loss(
        given.tokens,
        logprobs,
        signal,
        options,
        is_distilled=is_distilled,
        policy_loss=policy,
        num_samples=ROWS,
    )
    trainer: Any = SDPOStandIn(options)
    trainer.args.distillation_weight = weight
    trainer.use_teacher_server, trainer.teacher_model = False, None
    trainer.model, trainer.current_gradient_accumulation_steps = SimpleNamespace(training=True), 1
    trainer.importance_sampling_level, trainer.loss_type = "token", "grpo"
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    trainer.logits = given.logits(given.student) / TEMPERATURE
    trainer._compute_policy_loss = lambda *args: SDPOTrainer._compute_policy_loss(trainer, *args)
    trainer._compute_self_distillation_loss = lambda *args: SDPOTrainer._compute_self_distillation_loss(trainer, *args)
    trainer._compute_teacher_student_logits = lambda *_: SimpleNamespace(
        completion_ids=given.ids,
        loss_mask=given.mask.double() * is_distilled[:, None],
        student_logits=trainer.logits,
        teacher_logits=given.logits(given.teacher) / TEMPERATURE,
    )
    batch = {
        "prompt_ids": given.ids[:, :1],
        "prompt_mask": given.mask[:, :1],
        "completion_ids": given.ids,
        "completion_mask": given.mask.double(),
        "advantages": advantages,
    }
    theirs = SDPOTrainer.compute_loss(trainer, SimpleNamespace(training=True), batch)
    same(found.loss, theirs, given.leaves)
