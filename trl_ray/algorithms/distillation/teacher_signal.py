"""What a loss asks for of a teacher, and what it is given, whoever has computed it.

TeacherNeeds   of a loss: log-probs of the completions' own tokens, several tokens, or the whole vocabulary
TeacherTokens + the student's log-probs at the teacher's ids --signal_from_scores--> TeacherSignal [N], [N,K]
both sides' hidden states, in the learner (models.taught_scorer) -----------> TeacherSignal

TrainingSample.teacher: logprobs [L], top_ids [L,K] ... --loss_mask, joined--> TeacherTokens [N], [N,K]

Samples without a teacher, and lists of tokens shorter than the longest, are filled with entries for no token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trl_ray.algorithms.head.divergence import LARGEST_LOG_MASS, SupportLogprobs, support_divergence, unique_support
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.types import BoolArray, FloatArray, TeacherScores, TrainingSample

NO_TOKEN = -1
"""An id that no vocabulary has."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTokens:
    """What teachers say of the N trained tokens of B samples; without gradient."""

    has_teacher: Tensor
    """[B] bool: a teacher has scored this sample."""
    logprobs: Tensor
    """[N] float32 of the samples' own tokens; 0 without a teacher."""
    top_ids: Tensor | None
    """[N, K] int64; `NO_TOKEN` where an entry stands for none. None: no teacher was asked about other tokens."""
    top_logprobs: Tensor | None
    """[N, K] float32; -inf where an entry stands for no token."""
    tail: Tensor | None
    """[N] float32 log of the mass that those K leave out; None where some teacher did not say."""


def teacher_tokens(samples: Sequence[TrainingSample], *, device: torch.device | str = "cpu") -> TeacherTokens:
    """Join what teachers say of the trained tokens of samples, in order."""
    said = [_Said(sample.teacher, sample.loss_mask) for sample in samples]
    width = max((part.width for part in said if part.width is not None), default=None)
    ids = logprobs = tail = None
    if width is not None:
        logprobs = np.concatenate([part.top_logprobs(width) for part in said])
        ids = np.where(np.isneginf(logprobs), NO_TOKEN, np.concatenate([part.top_ids(width) for part in said]))
        if all(part.has_tail for part in said):
            tail = np.concatenate([part.tail() for part in said])

    def moved(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(device)

    own = np.concatenate([part.logprobs() for part in said]) if said else np.zeros(0, np.float32)
    return TeacherTokens(
        has_teacher=torch.tensor([sample.teacher is not None for sample in samples], dtype=torch.bool, device=device),
        logprobs=torch.from_numpy(own).to(device),
        top_ids=moved(ids),
        top_logprobs=moved(logprobs),
        tail=moved(tail),
    )


class _Said:
    """What a teacher, or none, says of the trained tokens of one sample."""

    def __init__(self, scores: TeacherScores | None, mask: BoolArray) -> None:
        self._scores, self._mask = scores, mask
        self._top = None if scores is None else scores.top_logprobs
        self.width = None if self._top is None else self._top.shape[1]
        self.has_tail = scores is None or scores.tail is not None

    def logprobs(self) -> NDArray[np.float32]:
        return self._filled(None if self._scores is None else self._scores.logprobs, 0.0)

    def tail(self) -> NDArray[np.float32]:
        return self._filled(None if self._scores is None else self._scores.tail, 0.0)

    def top_logprobs(self, width: int) -> NDArray[np.float32]:
        found = np.full((int(self._mask.sum()), width), -np.inf, np.float32)
        if self._top is not None:
            found[:, : self.width] = self._top[self._mask]
        return found

    def top_ids(self, width: int) -> NDArray[np.int64]:
        found = np.full((int(self._mask.sum()), width), NO_TOKEN, np.int64)
        if self._scores is not None and self._scores.top_ids is not None:
            found[:, : self.width] = self._scores.top_ids[self._mask]
        return found

    def _filled(self, values: FloatArray | None, default: float) -> NDArray[np.float32]:
        if values is None:
            return np.full(int(self._mask.sum()), default, np.float32)
        return values[self._mask].astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherNeeds:
    """What a loss asks for of a teacher, so that nothing else is computed or held.

    Unless the whole vocabulary is asked about, the log-probs of the completions' own tokens always are.
    """

    teacher_top_k: int = 0
    """The teacher's own most probable tokens in the support."""
    student_top_k: int = 0
    """The student's, where the learner holds the teacher; the support is the teacher's list where an actor has scored
    the samples."""
    own_token: bool = False
    """The completion's own token is in the support, too."""
    beta: float | None = None
    """Of a divergence over the whole vocabulary, which is asked for instead of all else; None: it is not."""
    resident: bool = False
    """Only a learner that holds the teacher can tell."""

    @property
    def has_support(self) -> bool:
        """Whether several tokens are asked about at each place."""
        return self.teacher_top_k > 0 or self.student_top_k > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherSignal:
    """What is known of the teacher at N tokens; which of it is read, the objective says."""

    logprobs: Tensor | None = None
    """[N] of the completions' own tokens."""
    support: SupportLogprobs | None = None
    """[N, K] of both sides, with the student's gradient."""
    divergence: Tensor | None = None
    """[N] over the whole vocabulary, with the student's gradient (`vocabulary_divergence`)."""

    @property
    def of_tokens(self) -> Tensor:
        """[N] log-probs of the completions' own tokens."""
        assert self.logprobs is not None, "this objective needs the teacher's log-probs of the completions' tokens"
        return self.logprobs

    @property
    def over_vocabulary(self) -> Tensor:
        """[N] divergences over the whole vocabulary."""
        assert self.divergence is not None, "this objective needs the divergence over the whole vocabulary"
        return self.divergence

    def over_support(self, *, beta: float, add_tail: bool) -> Tensor:
        """[N] divergences over some tokens."""
        assert self.support is not None, "this objective needs both sides' log-probs of several tokens"
        return support_divergence(self.support, beta=beta, add_tail=add_tail)

    def bad_tokens(self) -> Tensor:
        """[N] bool: where it cannot be true, because of NaN or infinity.

        A teacher's log-prob of minus infinity stands for no token in a support, and nowhere else.
        """
        found = [~torch.isfinite(part.detach()) for part in (self.logprobs, self.divergence) if part is not None]
        if self.support is not None:
            student, teacher, tail = self.support.student.detach(), self.support.teacher, self.support.teacher_tail
            is_bad = _is_no_logprob(teacher) | ~(torch.isfinite(student) | torch.isneginf(teacher))
            found.append(is_bad.any(dim=-1))
            found += [] if tail is None else [_is_no_logprob(tail)]
        return torch.stack(found).any(dim=0)


def _is_no_logprob(values: Tensor) -> Tensor:
    """NaN and plus infinity."""
    return torch.isnan(values) | torch.isposinf(values)


def signal_from_scores(
    said: TeacherTokens, scores: TokenLogprobs, own_ids: Tensor, needs: TeacherNeeds
) -> TeacherSignal:
    """What teachers in actors said, beside what the student says of the same tokens.

    Args:
        said: of N tokens.
        scores: of the student; `support_logprobs` at the teachers' `top_ids` where these are asked for.
        own_ids: [N] the completions' own tokens.
        needs: of the loss.
    """
    assert not needs.resident, "the learner must hold the teacher for this objective"
    if not needs.has_support:
        return TeacherSignal(logprobs=said.logprobs)
    if said.top_ids is None:
        return TeacherSignal(logprobs=said.logprobs, support=blank_signal(scores).support)
    assert said.top_logprobs is not None and scores.support_logprobs is not None, "both sides are asked about the list"
    support = SupportLogprobs(student=scores.support_logprobs, teacher=said.top_logprobs, teacher_tail=said.tail)
    if needs.own_token:
        support = with_own_token(support, said.top_ids, scores.logprobs, said.logprobs, own_ids)
    return TeacherSignal(logprobs=said.logprobs, support=support)


def with_own_token(
    support: SupportLogprobs, ids: Tensor, student: Tensor, teacher: Tensor, own_ids: Tensor
) -> SupportLogprobs:
    """A support with the completions' own tokens in it; where they stand there already, nothing is added.

    Args:
        support: [N, K]
        ids: [N, K] of it, each once.
        student: [N] log-probs of the completions' tokens, with gradient.
        teacher: [N] the same.
        own_ids: [N]
    """
    joined = unique_support(
        torch.cat((ids, own_ids[:, None]), dim=1),
        torch.cat((support.student, student[:, None]), dim=1),
        torch.cat((support.teacher, teacher[:, None]), dim=1),
    )
    tail = support.teacher_tail
    if tail is not None:
        is_new = ~torch.isneginf(joined.teacher[:, -1])
        # The mass outside the list less that of the token: ln(e^tail - e^own).
        rest = tail + torch.log(-torch.expm1((teacher - tail).clamp(max=LARGEST_LOG_MASS)))
        tail = torch.where(is_new, rest, tail)
    return SupportLogprobs(student=joined.student, teacher=joined.teacher, teacher_tail=tail)


def blank_signal(scores: TokenLogprobs) -> TeacherSignal:
    """Of tokens that no teacher was asked about: every divergence is 0, with a gradient of 0."""
    own = scores.logprobs
    return TeacherSignal(
        logprobs=torch.zeros_like(own.detach()),
        support=SupportLogprobs(
            student=own[:, None], teacher=torch.full_like(own.detach(), -math.inf)[:, None], teacher_tail=None
        ),
        divergence=0.0 * own,
    )
