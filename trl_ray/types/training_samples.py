"""What the learner trains on.

TrainingSample -> Example (datasets only) -> micro-batches -> TrainBatch
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trl_ray.types.arrays import BoolArray, FloatArray, IntArray
from trl_ray.types.teacher_scores import TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleLabel:
    """What a dataset says of one completion, for objectives that compare, rate or classify."""

    desirable: bool | None = None
    """Whether it was found good (unpaired preference)."""
    margin: float | None = None
    """By how much the chosen completion of its pair should win (reward models)."""
    steps: BoolArray | None = None
    """[S] whether each step is right, in the order of the trained positions (process reward)."""
    reference: float | None = None
    """Log-prob of the completion under the reference, as the objective sums it, in nats; None: not precomputed."""
    length: int | None = None
    """Completion tokens, also one that nothing predicts because the prompt is empty; None: as many as are trained."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One completion as the learner sees it."""

    group_id: int
    """Completions of one group share their prompt; for datasets the number of the example."""
    prompt_ids: IntArray
    """[P]"""
    completion_ids: IntArray
    """[L]"""
    loss_mask: BoolArray
    """[L] True where a token is trained on."""
    sampler_logprobs: FloatArray | None = None
    """[L] natural log, of the sampling distribution; None for what was not sampled but comes from a dataset."""
    advantage: float = 0.0
    min_version: int = 0
    token_versions: IntArray | None = None
    """[L] the weight version that sampled each token; None for what was not sampled."""
    old_logprobs: FloatArray | None = None
    """[L] of the learner's weights before the first update on this sample; None: those of the forward pass at hand."""
    reference_logprobs: FloatArray | None = None
    """[L] of the reference policy; None: the learner computes them when its loss asks for them."""
    surrogate_mask: BoolArray | None = None
    """[L] False where a trained token counts in denominators and in the KL only; None means all True."""
    label: SampleLabel | None = None
    """What the dataset says of it; None for what was sampled."""
    teacher: TeacherScores | None = None
    """What a teacher says of it; None without one."""
    teacher_prompt_ids: IntArray | None = None
    """[P] the context in which a teacher that the learner holds sees the completion; None: `prompt_ids`."""
    is_distilled: bool = True
    """Whether a teacher knows more of it than the student did."""
    is_label: bool = False
    """Whether the dataset gave it as an example to follow, so that `sampler_logprobs` are 0 and stand for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """What a dataset gives to an update as a whole: it is never torn, and it counts once in batch sizes.

    One sample for a text, a rated completion or a solution in steps; chosen and rejected, in this order, for a pair;
    the pieces of a packed row, which do not see each other.
    """

    row: int
    """Number in the dataset, of the first piece of a packed row."""
    samples: tuple[TrainingSample, ...]
    num_rows: int = 1
    """Rows of the dataset in it: pieces of a packed row."""
    mismatched: TrainingSample | None = None
    """Its prompt with another row's completion, for KTO's estimate of the KL; None where that is not asked for."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, the prompts of each one included."""
        return sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in self.samples)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleScores:
    """What the learner's weights say about one sample before the first update on it."""

    logprobs: FloatArray
    """[L] 0 where nothing is trained."""
    entropy: FloatArray
    """[L] nats; 0 where nothing is trained."""
    reference_logprobs: FloatArray | None
    """[L] None without a reference."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """Everything one optimizer update consumes, or the part of it that one rank works on."""

    step: int
    """1-based step this batch is for."""
    micro_batches: tuple[tuple[TrainingSample, ...], ...]
    """Samples of one group stay together in one micro-batch wherever they fit."""
    num_valid_tokens: int
    """Tokens with loss_mask True over the whole optimizer batch and all ranks."""
    num_samples: int
    """Completions over the whole optimizer batch and all ranks."""
    num_micro_batches: int
    """Micro-batches over the whole optimizer batch and all ranks, of which these may be a part."""
    num_surrogate_tokens: int | None = None
    """Valid tokens that no `surrogate_mask` leaves out, over all ranks; None where samples have no such masks."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Further denominators and estimates over the whole update that its loss asks for, by the names the loss gives."""
    is_last_update: bool = True
    """False when further updates on the same generation batch follow; the version moves on with the last."""

    @property
    def samples(self) -> tuple[TrainingSample, ...]:
        """All samples at hand, micro-batch by micro-batch."""
        return tuple(sample for micro_batch in self.micro_batches for sample in micro_batch)
