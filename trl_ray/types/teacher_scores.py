"""What teachers are asked about completions, and what they answer.

TeacherContext -> TeacherRequest, TeacherQuestion -> TeacherScores
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_ray.types.arrays import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherScores:
    """What a teacher says about the L tokens of one completion, at the temperature it was asked for."""

    teacher: str
    version: int | None
    """Of its weights; None where they never change."""
    logprobs: FloatArray
    """[L] of the completion's own tokens, natural log."""
    top_ids: IntArray | None = None
    """[L, K] the tokens it was asked about: its own most probable ones, or those that were given."""
    top_logprobs: FloatArray | None = None
    """[L, K] theirs; -inf in places that stand for no token."""
    tail: FloatArray | None = None
    """[L] log of the mass that those K leave out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherContext:
    """What a teacher is shown before one completion: the student's prompt, or that and hints."""

    prompt_ids: IntArray
    """[P]"""
    is_distilled: bool = True
    """Whether there is anything to learn: a self-teacher without a hint knows no more than the student."""
    demonstration: int | None = None
    """Which completion of the group is shown as a success, counted from 0."""
    has_feedback: bool = False
    uses_feedback: bool = False
    num_cut: int = 0
    """Tokens cut off the prompt's head."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherRequest:
    """One completion that a teacher is asked about, behind the context in which the teacher sees it."""

    prompt_ids: IntArray
    """[P] at least one token; not the student's prompt where the teacher is told more."""
    completion_ids: IntArray
    """[L] at least one token."""
    support_ids: IntArray | None = None
    """[L, S] further tokens to score at each place, the same S in all requests of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherQuestion:
    """What a teacher is asked about each token of a batch: the K of its answer is `top_k` + S."""

    vocab_size: int
    temperature: float = 1.0
    """Logits are divided by it."""
    top_k: int = 0
    """Its own most probable tokens; they stand before those of `support_ids`, which are -inf where they repeat one."""
    tail: bool = False
    """Also the log of the mass that the K tokens leave out."""
