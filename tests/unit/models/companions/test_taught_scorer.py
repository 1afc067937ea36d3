"""Both sides of samples, from a teacher at hand or from what one has said, against whole logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from taught_batches import TEMPERATURE, distilled, log_softmax_at, own_ids, said, taught_samples
from tiny_models import random_model
from trl_ray.algorithms.distillation.teacher_signal import TeacherNeeds
from trl_ray.config.sections import SharePrompt
from trl_ray.models.companions.companion import Companion
from trl_ray.models.companions.taught_scorer import TaughtScorer, TaughtScores
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.types import TrainingSample

CPU = torch.device("cpu")
BETAS = [0.0, 0.25, 0.5, 1.0]


class CountingTeacher(Companion):
    """Remembers how many trained tokens it was asked about."""

    asked = -1

    def states(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        self.asked = sum(int(sample.loss_mask.sum()) for sample in samples)
        return super().states(samples)


class Sides:
    """A student and a teacher of random weights."""

    def __init__(self, student: Any = None, teacher: Any = None, *, chunk_size: int | None = 100) -> None:
        self.student = random_model(seed=0).train() if student is None else student
        self.teacher = random_model(seed=1) if teacher is None else teacher
        module = ScoringModule(self.student, chunk_size=chunk_size)
        self.scorer = SampleScorer(module, share_prompt=SharePrompt.AUTO, temperature=TEMPERATURE)
        size = int(self.student.get_output_embeddings().out_features)
        own = ScoringModule(self.teacher, chunk_size=chunk_size, vocab_size=size)
        scorer = SampleScorer(own, share_prompt=SharePrompt.AUTO, temperature=TEMPERATURE)
        self.resident = CountingTeacher(self.teacher, scorer, module=own)

    def score(
        self, samples: Sequence[TrainingSample], needs: TeacherNeeds, *, resident: bool = True, in_step: bool = False
    ) -> TaughtScores:
        teacher = self.resident if resident else None
        found = TaughtScorer(self.scorer, needs=needs, teacher=teacher, in_step=in_step, device=CPU).score(samples)
        assert found is not None
        return found


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[N] of two log-softmaxes [N, V]."""
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixture = ((1 - beta) * student.exp() + beta * teacher.exp()).log()
    forward, reverse = teacher.exp() * (teacher - mixture), student.exp() * (student - mixture)
    return (beta * forward + (1 - beta) * reverse).sum(-1)


def same_gradients(ours: Tensor, theirs: Tensor, model: Any) -> None:
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got = torch.autograd.grad(ours, leaves)
    want = torch.autograd.grad(theirs, leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("in_step", [False, True])
def test_the_whole_vocabulary_is_compared_in_the_teachers_context_and_only_where_something_is_distilled(
    beta: float, in_step: bool
) -> None:
    sides, samples = Sides(), taught_samples(0)
    found = sides.score(samples, TeacherNeeds(beta=beta, resident=True), in_step=in_step)
    student = log_softmax_at(sides.student, samples)
    with torch.no_grad():
        teacher = log_softmax_at(sides.teacher, samples, in_context=True)
    where = distilled(samples)
    expected = divergence(student, teacher, beta)
    expected = expected if in_step else expected.masked_fill(~where, 0.0)
    torch.testing.assert_close(found.teacher.over_vocabulary, expected, rtol=1e-4, atol=1e-4)
    assert sides.resident.asked == (len(where) if in_step else int(where.sum()))
    assert 0 < int(where.sum()) < len(where) and found.teacher.logprobs is None
    same_gradients(found.teacher.over_vocabulary.sum(), expected.sum(), sides.student)


@pytest.mark.parametrize("name", ["teacher", "student", "union", "realised"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("add_tail", [True, False])
def test_a_support_has_both_sides_log_probs_of_each_of_its_tokens_once(name: str, beta: float, add_tail: bool) -> None:
    needs = {
        "teacher": TeacherNeeds(teacher_top_k=3),
        "student": TeacherNeeds(student_top_k=3, resident=True),
        "union": TeacherNeeds(teacher_top_k=3, student_top_k=3, resident=True),
        "realised": TeacherNeeds(teacher_top_k=3, own_token=True),
    }[name]
    # Teacher and student are near each other, so that their lists share tokens.
    near = random_model(seed=0)
    with torch.no_grad():
        noise = torch.randn(260, 128, generator=torch.Generator().manual_seed(0))
        near.get_output_embeddings().weight.add_(noise, alpha=0.02)
    sides, samples = Sides(teacher=near), taught_samples(1)
    found = sides.score(samples, needs)
    student = log_softmax_at(sides.student, samples)
    teacher = log_softmax_at(near, samples, in_context=True).detach()
    keep = torch.zeros(student.shape, dtype=torch.bool)
    if needs.teacher_top_k:
        keep.scatter_(1, teacher.topk(3).indices, True)
    if needs.student_top_k:
        keep.scatter_(1, student.topk(3).indices, True)
    if needs.own_token:
        keep.scatter_(1, own_ids(samples)[:, None], True)
    width = keep.sum(1)
    assert name in {"teacher", "student"} or bool((width > 3).any())
    parts = []
    for row in range(len(keep)):
        pair = torch.stack((student[row][keep[row]], teacher[row][keep[row]]))
        rest = torch.log1p(-pair.exp().sum(-1, keepdim=True))
        pair = torch.cat((pair, rest), -1) if add_tail else pair.log_softmax(-1)
        parts.append(divergence(pair[:1], pair[1:], beta)[0])
    where = distilled(samples)
    expected = torch.stack(parts).masked_fill(~where, 0.0)
    ours = found.teacher.over_support(beta=beta, add_tail=add_tail).masked_fill(~where, 0.0)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    theirs = teacher.gather(1, own_ids(samples)[:, None])[:, 0].masked_fill(~where, 0.0)
    torch.testing.assert_close(found.teacher.of_tokens, theirs, rtol=1e-4, atol=1e-4)
    same_gradients(ours.sum(), expected.sum(), sides.student)


def test_own_tokens_alone_are_scored_behind_the_teachers_prompt() -> None:
    sides, samples = Sides(), taught_samples(2)
    found = sides.score(samples, TeacherNeeds())
    teacher = log_softmax_at(sides.teacher, samples, in_context=True).gather(1, own_ids(samples)[:, None])[:, 0]
    torch.testing.assert_close(
        found.teacher.of_tokens, teacher.masked_fill(~distilled(samples), 0.0), rtol=1e-4, atol=1e-4
    )
    assert found.teacher.support is None and not found.teacher.of_tokens.requires_grad


@pytest.mark.parametrize(
    "needs",
    [
        TeacherNeeds(),
        TeacherNeeds(teacher_top_k=4),
        TeacherNeeds(teacher_top_k=4, own_token=True),
    ],
)
def test_a_teacher_at_hand_and_one_that_was_asked_before_say_the_same(needs: TeacherNeeds) -> None:
    sides, samples = Sides(), taught_samples(3)
    at_hand = sides.score(samples, needs).teacher
    before = sides.score(said(sides.teacher, samples, top_k=needs.teacher_top_k, tail=True), needs, resident=False)
    torch.testing.assert_close(before.teacher.of_tokens, at_hand.of_tokens, rtol=1e-4, atol=1e-4)
    if needs.has_support:
        for beta in (0.0, 0.5, 1.0):
            ours, theirs = (each.over_support(beta=beta, add_tail=True) for each in (at_hand, before.teacher))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_self_distillation_reads_the_teachers_list_where_an_actor_has_scored() -> None:
    sides, samples = Sides(), taught_samples(4)
    found = sides.score(said(sides.teacher, samples, top_k=3), TeacherNeeds(student_top_k=3), resident=False)
    support, where = found.teacher.support, distilled(samples)
    assert support is not None
    top = log_softmax_at(sides.teacher, samples, in_context=True).topk(3)
    torch.testing.assert_close(support.teacher[where], top.values[where], rtol=1e-4, atol=1e-4)
    ours = log_softmax_at(sides.student, samples).gather(1, top.indices)
    torch.testing.assert_close(support.student[where], ours[where], rtol=1e-4, atol=1e-4)
    assert bool(torch.isneginf(support.teacher[~where]).all())


def test_where_nothing_is_distilled_no_teacher_is_asked() -> None:
    sides = Sides()
    samples = [replace(sample, is_distilled=False) for sample in taught_samples(5)]
    for needs in (TeacherNeeds(), TeacherNeeds(beta=0.5, resident=True), TeacherNeeds(student_top_k=2)):
        for resident in (True, False) if not needs.resident else (True,):
            found = sides.score(samples, needs, resident=resident)
            assert not found.teacher.of_tokens.any()
            if needs.student_top_k:
                assert not found.teacher.over_support(beta=0.5, add_tail=True).any()
    assert sides.resident.asked == 0


def test_samples_without_a_trained_token_give_nothing_and_a_silent_teacher_is_an_error() -> None:
    sides = Sides()
    empty = [replace(each, loss_mask=np.zeros_like(each.loss_mask)) for each in taught_samples(6)]
    for teacher in (None, sides.resident):
        scorer = TaughtScorer(sides.scorer, needs=TeacherNeeds(), teacher=teacher, in_step=False, device=CPU)
        assert scorer.score(empty) is None
    with pytest.raises(AssertionError, match="must have scored"):
        sides.score(taught_samples(6), TeacherNeeds(), resident=False)
    with pytest.raises(AssertionError, match="hold the teacher"):
        sides.score(taught_samples(6), TeacherNeeds(beta=1.0, resident=True), resident=False)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def sized(vocab: int, *, cap: float | None = None, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if cap is not None:
            return Gemma2ForCausalLM(Gemma2Config(**SIZES, vocab_size=vocab, final_logit_softcapping=cap)).eval()
        return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab, pad_token_id=0)).eval()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("own", "other"), [(61, 70), (70, 61)])
def test_heads_padded_to_different_lengths_are_cut_to_what_both_have_whatever_caps_their_logits(
    own: int, other: int, beta: float
) -> None:
    sides = Sides(sized(own, cap=3.0), sized(other, cap=5.0, seed=1), chunk_size=16)
    samples = taught_samples(7, hinted=False, vocab=60)
    found = sides.score(samples, TeacherNeeds(beta=beta, resident=True))

    def cut(model: Any) -> Tensor:
        # Raw logits differ from log-probs by what a softmax over the entries that are left takes out.
        return log_softmax_at(model, samples)[:, :61].log_softmax(-1)

    expected = divergence(cut(sides.student), cut(sides.teacher).detach(), beta)
    torch.testing.assert_close(found.teacher.over_vocabulary, expected, rtol=1e-3, atol=1e-5)
    same_gradients(found.teacher.over_vocabulary.sum(), expected.sum(), sides.student)


@pytest.mark.parametrize(("own", "other"), [(61, 70), (70, 61)])
def test_supports_hold_no_token_that_one_side_lacks(own: int, other: int) -> None:
    sides = Sides(sized(own), sized(other, seed=1), chunk_size=16)
    samples = taught_samples(8, hinted=False, vocab=60)
    union = TeacherNeeds(teacher_top_k=50, student_top_k=min(own, 65), resident=True)
    support = sides.score(samples, union).teacher.support
    assert support is not None and not torch.isnan(support.teacher).any()
    taken = ~torch.isneginf(support.teacher)
    assert bool(torch.isfinite(support.student[taken]).all()) and int(taken.sum(1).max()) <= 61


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operation gave, but for the models' own weights."""

    def __init__(self, *ignored: Tensor) -> None:
        super().__init__()
        self.size, self._ignored = 0, {tensor.shape for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor) and tensor.shape not in self._ignored:
                self.size = max(self.size, tensor.numel())
        return found


def test_no_logits_of_all_tokens_are_ever_made() -> None:
    """2048 entries for 40 tokens and more, projected 64 at a time."""
    student, teacher = sized(2048), sized(2048, seed=1)
    sides = Sides(student, teacher, chunk_size=64)
    samples = taught_samples(9)
    count = sum(int(sample.loss_mask.sum()) for sample in samples)
    # Gradients of a whole head are as large as the head itself.
    with Largest(student.get_output_embeddings().weight, student.get_output_embeddings().weight.T) as largest:
        for needs in (
            TeacherNeeds(beta=0.5, resident=True),
            TeacherNeeds(teacher_top_k=4, student_top_k=4, resident=True),
        ):
            found = sides.score(samples, needs).teacher
            total = found.over_vocabulary if needs.beta else found.over_support(beta=0.5, add_tail=True)
            total.sum().backward()
    assert count > 25 and count * 64 <= largest.size < count * 2048 / 4


def test_the_policys_mode_and_its_gradients_are_left_alone() -> None:
    """The live teacher is the policy itself."""
    model = random_model(seed=0).train()
    scorer = SampleScorer(ScoringModule(model, chunk_size=100), share_prompt=SharePrompt.AUTO, temperature=TEMPERATURE)
    live = Companion(model, scorer)
    samples = taught_samples(10)
    found = TaughtScorer(
        scorer, needs=TeacherNeeds(beta=1.0, resident=True), teacher=live, in_step=False, device=CPU
    ).score(samples)
    assert found is not None and model.training
    student = log_softmax_at(model, samples)
    teacher = log_softmax_at(model, samples, in_context=True).detach()
    expected = divergence(student, teacher, 1.0).masked_fill(~distilled(samples), 0.0)
    torch.testing.assert_close(found.teacher.over_vocabulary, expected, rtol=1e-4, atol=1e-4)
    assert math.isfinite(float(expected.detach().sum())) and float(expected.detach().sum()) > 1
    same_gradients(found.teacher.over_vocabulary.sum(), expected.sum(), model)
