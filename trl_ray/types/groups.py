"""From a prompt to a finished group of completions, and why some groups are never trained.

Prompt -> GroupTicket -> Completion x G -> RolloutGroup (with its rewards and what teachers say)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from trl_ray.types.arrays import BoolArray, FloatArray, IntArray
from trl_ray.types.events import Span
from trl_ray.types.reward_results import Reward
from trl_ray.types.teacher_scores import TeacherContext, TeacherScores

Message: TypeAlias = Mapping[str, Any]
"""One chat message: ``{"role": ..., "content": ..., ...}``."""


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end-of-sequence token or a stop string; the token is part of the completion."""
    LENGTH = "length"
    """`max_completion_length` was reached."""
    ABORT = "abort"
    """The engine was told to stop; such a completion is never trained on."""


class DropReason(enum.StrEnum):
    """Why a group left the ledger without being trained."""

    ZERO_VARIANCE = "zero_variance"
    """All rewards of the group are equal and the run drops such groups."""
    REWARD_FAILED = "reward_failed"
    """A reward function failed as often as it may."""
    TEACHER_FAILED = "teacher_failed"
    """A teacher failed, or answered what cannot be true, as often as it may."""
    RETRIES_EXHAUSTED = "retries_exhausted"
    """Workers were lost with this group as often as they may."""
    TRUNCATED = "truncated"
    """Every completion was cut off and truncated completions are masked: nothing to train on."""
    STALE = "stale"
    """Older than the bound; cannot happen while slots are charged correctly, and is an alarm."""
    END_OF_RUN = "end_of_run"
    """The run reached its last step while the group was still on its way."""
    NUMERICS = "numerics"
    """The learner met NaN or infinity in the step that held the group and skipped the step."""
    REFUSED = "refused"
    """The engine refused its request, or the ledger the group: another attempt would meet the same."""
    BAD_ROW = "bad_row"
    """No prompt could be made of the row, and the run drops such rows; it was never a group."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One prompt, tokenised, with the dataset columns that reward functions receive."""

    prompt_id: str
    """Stable name from the dataset ordinal and the epoch, e.g. ``"0:17"``."""
    token_ids: IntArray
    """[P] chat template applied, ready to generate from."""
    messages: tuple[Message, ...] | None = None
    """The conversation, for conversational datasets."""
    text: str | None = None
    """The text, for standard datasets."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Extra dataset columns (JSON values), passed to reward functions by name."""
    given_ids: IntArray | None = None
    """[L] the dataset's own completion, to be trained on in place of sampled ones; None: completions are sampled."""
    num_cut: int = 0
    """Tokens that `max_prompt_length` cut off its beginning; messages and text are whole."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupTicket:
    """The right to generate one group once: the key (group_id, attempt) makes every commit idempotent."""

    group_id: int
    """Counts up from 0 over the whole run, resumes included."""
    attempt: int
    """0 for the first issue; one more each time the group is issued again."""
    prompt: Prompt
    admitted_at_version: int
    """The weight version when this attempt's slot was charged."""
    draw: int = 0
    """How often its completions were sampled and could not be scored: another one is drawn each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled by one weight version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: IntArray
    """[L] sampled ids, the end-of-sequence token included when there is one."""
    logprobs: FloatArray
    """[L] natural-log probability of each id under the sampling distribution (temperature applied), or before it was
    reshaped (`SamplingParams.policy_logprobs`)."""
    versions: tuple[VersionSpan, ...]
    """Which weight version sampled which tokens; covers [0, L) without gaps."""
    finish_reason: FinishReason
    text: str
    """Decoded without special tokens."""
    loss_mask: BoolArray | None = None
    """[L] False where a token was not sampled by the policy (tool output); None means all True."""
    is_sampled: bool = True
    """False where it comes from the dataset: `logprobs` are 0 then and stand for nothing."""

    @property
    def min_version(self) -> int:
        """The oldest weight version that sampled a token of this completion."""
        return min(span.version for span in self.versions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutGroup:
    """A finished group: what the ledger calls ready."""

    ticket: GroupTicket
    completions: tuple[Completion, ...]
    """[G]"""
    rewards: tuple[Reward, ...]
    """[G] in the order of the completions."""
    worker: str
    spans: tuple[Span, ...] = ()
    """When it was generated and scored."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values the reward functions logged with `log_metric`."""
    contexts: tuple[TeacherContext, ...] = ()
    """[G] what teachers are shown before the completions; empty without teachers."""
    teachings: tuple[TeacherScores | None, ...] = ()
    """[G] what teachers say of them; None where nothing is distilled. Empty without teachers, and where the learner
    holds the teacher."""

    @property
    def min_version(self) -> int:
        """The oldest weight version that sampled a token of this group."""
        return min(completion.min_version for completion in self.completions)

    @property
    def max_version(self) -> int:
        """The youngest weight version that sampled a token of this group."""
        return max(span.version for completion in self.completions for span in completion.versions)
