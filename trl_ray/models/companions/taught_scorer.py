"""What the policy says of samples, and what its teacher does: whoever has scored them, or the teacher at hand.

said       TrainingSample.teacher --top ids--> policy's pass --> TeacherSignal
resident   teacher's states [N',H] --its top ids--> policy's pass --its top ids--> teacher's head --> TeacherSignal
                    '------------- the whole vocabulary -----^
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.distillation.teacher_signal import (
    NO_TOKEN,
    TeacherNeeds,
    TeacherSignal,
    blank_signal,
    signal_from_scores,
    teacher_tokens,
    with_own_token,
)
from trl_ray.algorithms.head.divergence import SupportLogprobs, unique_support
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.models.companions.companion import Companion
from trl_ray.models.scoring.sample_scorer import ClassScores, SampleScorer
from trl_ray.models.scoring.scoring_module import HeadQuestion
from trl_ray.types import TrainingSample

Samples = Sequence[TrainingSample]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaughtScores:
    """Both sides of the N trained tokens of some samples."""

    student: TokenLogprobs
    """With gradient."""
    teacher: TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """The N' of the N trained tokens that the teacher is asked about."""

    places: Tensor
    """[N'] int64, ascending."""
    own_ids: Tensor
    """[N] the completions' own tokens."""

    @property
    def targets(self) -> Tensor:
        """[N']"""
        return self.own_ids[self.places]

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """Values [N', ...] at all tokens [N, ...], with `fill` where the teacher was not asked."""
        whole = values.new_full((len(self.own_ids), *values.shape[1:]), fill)
        return whole.index_copy(0, self.places, values)


class TaughtScorer:
    """Scores samples with a policy and asks for its teacher's view of them.

    Args:
        scorer: of the policy.
        needs: of the loss.
        teacher: the one that the learner holds; None: samples come with what teachers said.
        in_step: other ranks wait for each pass, so that the teacher is asked about samples that are not distilled, too.
        device: of the tensors.
    """

    def __init__(
        self,
        scorer: SampleScorer,
        *,
        needs: TeacherNeeds,
        teacher: Companion | None,
        in_step: bool,
        device: torch.device,
    ) -> None:
        assert teacher is not None or not needs.resident, "the learner must hold the teacher for this objective"
        self._scorer, self._needs, self._teacher = scorer, needs, teacher
        self._in_step, self._device = in_step, device

    def score(self, samples: Samples) -> TaughtScores | None:
        """Both sides; None when none of the samples' tokens is trained on."""
        if not any(bool(sample.loss_mask.any()) for sample in samples):
            return None
        return self._from_said(samples) if self._teacher is None else self._from_resident(samples, self._teacher)

    def _student(self, samples: Samples, question: HeadQuestion | None = None) -> TokenLogprobs:
        scores = self._scorer.score(samples, question=question)
        assert scores is not None and not isinstance(scores, ClassScores), "language heads have trained tokens"
        return scores

    def _from_said(self, samples: Samples) -> TaughtScores:
        asked = [sample for sample in samples if sample.is_distilled and sample.loss_mask.any()]
        silent = [sample.group_id for sample in asked if sample.teacher is None]
        assert not silent, f"teachers must have scored all samples that are distilled, but not those of groups {silent}"
        said = teacher_tokens(samples, device=self._device)
        question = HeadQuestion(support=said.top_ids) if self._needs.has_support else None
        student = self._student(samples, question)
        signal = signal_from_scores(said, student, self._own_ids(samples), self._needs)
        return TaughtScores(student=student, teacher=signal)

    def _from_resident(self, samples: Samples, teacher: Companion) -> TaughtScores:
        needs = self._needs
        # First, so that whatever stands in for the policy's weights is gone before gradients are recorded.
        states = teacher.states([self._to_ask(sample) for sample in samples])
        if states is None:
            student = self._student(samples)
            return TaughtScores(student=student, teacher=blank_signal(student))
        asked = self._asked(samples)
        if needs.beta is not None:
            divergence_target = teacher.divergence_target(states, asked.places, beta=needs.beta)
            student = self._student(samples, HeadQuestion(divergence_target=divergence_target))
            assert student.divergence is not None, "it was asked for"
            signal = TeacherSignal(divergence=asked.spread(student.divergence, 0.0))
            return TaughtScores(student=student, teacher=signal)
        first = None
        if needs.teacher_top_k:
            first = _spread_scores(
                asked, teacher.judge(states, asked.targets, question=HeadQuestion(top_k=needs.teacher_top_k))
            )
        student = self._student(
            samples, HeadQuestion(support=None if first is None else first.top_ids, top_k=needs.student_top_k)
        )
        second = first
        if second is None or needs.student_top_k:
            support = None if student.top_ids is None else student.top_ids[asked.places]
            second = _spread_scores(asked, teacher.judge(states, asked.targets, question=HeadQuestion(support=support)))
        signal = TeacherSignal(
            logprobs=second.logprobs,
            support=self._support(student, first, second, asked) if needs.has_support else None,
        )
        return TaughtScores(student=student, teacher=signal)

    def _support(
        self, student: TokenLogprobs, first: TokenLogprobs | None, second: TokenLogprobs, asked: _Asked
    ) -> SupportLogprobs:
        """The lists that are asked for, the teacher's before the student's, each token once."""
        ids, ours, theirs = [], [], []
        if first is not None:
            ids.append(first.top_ids)
            ours.append(student.support_logprobs)
            theirs.append(first.top_logprobs)
        if self._needs.student_top_k:
            ids.append(student.top_ids)
            ours.append(student.top_logprobs)
            theirs.append(second.support_logprobs)
        lists = [[part for part in parts if part is not None] for parts in (ids, ours, theirs)]
        joined_ids, joined, teacher = (torch.cat(parts, dim=1) for parts in lists)
        support = SupportLogprobs(student=joined, teacher=teacher)
        if len(ids) > 1:
            support = unique_support(joined_ids, joined, teacher)
        if self._needs.own_token:
            support = with_own_token(support, joined_ids, student.logprobs, second.logprobs, asked.own_ids)
        return support

    def _to_ask(self, sample: TrainingSample) -> TrainingSample:
        """The sample as the teacher is to see it, without a token where it is not asked."""
        if self._in_step or sample.is_distilled:
            return sample
        return replace(sample, loss_mask=np.zeros_like(sample.loss_mask))

    def _asked(self, samples: Samples) -> _Asked:
        counts = [int(sample.loss_mask.sum()) for sample in samples]
        wanted = np.repeat([self._in_step or sample.is_distilled for sample in samples], counts)
        return _Asked(places=torch.from_numpy(np.flatnonzero(wanted)).to(self._device), own_ids=self._own_ids(samples))

    def _own_ids(self, samples: Samples) -> Tensor:
        """[N] the trained tokens."""
        ids = np.concatenate([sample.completion_ids[sample.loss_mask] for sample in samples])
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)


def _spread_scores(asked: _Asked, scores: TokenLogprobs) -> TokenLogprobs:
    """A teacher's scores [N'] at all tokens [N]: where it was not asked, no list has a token."""

    def spread(values: Tensor | None, fill: float) -> Tensor | None:
        return None if values is None else asked.spread(values, fill)

    return replace(
        scores,
        logprobs=asked.spread(scores.logprobs, 0.0),
        entropy=asked.spread(scores.entropy, 0.0),
        top_ids=spread(scores.top_ids, NO_TOKEN),
        top_logprobs=spread(scores.top_logprobs, -math.inf),
        support_logprobs=spread(scores.support_logprobs, -math.inf),
    )
