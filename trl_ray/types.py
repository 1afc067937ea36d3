"""The nouns that travel between layers: frozen, keyword-only dataclasses with shapes at the field.

    Prompt -> GroupTicket -> Completion x G -> Reward x G -> RolloutGroup -> TrainingSample -> TrainBatch
    WeightManifest + buffer = WeightPayload (learner -> engines), named by its WeightVersion

Axes: P prompt tokens, L completion tokens, T = P + L, G completions of a group.
Arrays are NumPy so that Ray hands them over without copying; nothing here imports torch.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int32]
FloatArray: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]
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


class RewardErrorKind(enum.StrEnum):
    """How a reward function failed; each kind is told apart because each asks for another remedy."""

    NONE = "none"
    """It returned None for every completion of the group (nothing to score)."""
    NAN = "nan"
    """It returned NaN or infinity."""
    WRONG_LENGTH = "wrong_length"
    """It returned another number of rewards than completions."""
    WRONG_TYPE = "wrong_type"
    """It returned something that is not a list of numbers."""
    EXCEPTION = "exception"
    """It raised."""
    TIMEOUT = "timeout"
    """It did not return within its deadline and was killed."""
    CRASH = "crash"
    """Its process died."""


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
    """[L] natural-log probability of each id under the sampling distribution (temperature applied)."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The score of one completion."""

    total: float | None
    """Weighted sum over the functions that answered; None when none did."""
    parts: Mapping[str, float | None]
    """Raw value by function name."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns the functions logged with `log_extra`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """A reward function failed for a whole group: infrastructure or user code, never a reward of 0."""

    function: str
    kind: RewardErrorKind
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """What a reward worker answers: G rewards, or the failure that explains why there are none."""

    rewards: tuple[Reward, ...] = ()
    """[G] in the order of the completions; empty when `failure` is set."""
    failure: RewardFailure | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values the functions logged with `log_metric`, averaged over the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """An interval of an actor's timeline, in seconds since the epoch."""

    actor: str
    name: str
    start: float
    end: float


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


class Reduce(enum.StrEnum):
    """How values of one metric from several micro-batches, ranks or groups become one."""

    MEAN = "mean"
    """Weighted by `weight`."""
    SUM = "sum"
    MAX = "max"
    MIN = "min"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number and the rule that joins it with its like."""

    value: float
    reduce: Reduce = Reduce.MEAN
    weight: float = 1.0
    """Only for MEAN: how much this value counts (tokens, samples)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the learner answers after one optimizer step."""

    version: int
    """Weight version after the step: the step number. A skipped step has a version too, with the same weights."""
    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False
    """True when gradients were not finite and the weights were left as they were."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the learner answers about held-out examples; the weights stay as they are."""

    loss: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one parameter lies in a weight buffer."""

    name: str
    """The Hugging Face parameter name."""
    shape: tuple[int, ...]
    dtype: str
    """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    offset: int
    """Bytes from the start of the buffer."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """The identity of one published set of weights."""

    version: int
    checksum: str
    """Hex digest over names, shapes, dtypes and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightPayload:
    """One published set of weights: a flat buffer and where each parameter lies in it."""

    identity: WeightVersion
    manifest: tuple[TensorEntry, ...]
    buffer: NDArray[np.uint8]
    """[bytes] read-only once published."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightCheck:
    """A fixed token sequence and the learner's log-probs of it under one version."""

    token_ids: IntArray
    """[T]"""
    logprobs: FloatArray
    """[T-1] natural log-prob of token t+1 given tokens ..t, temperature 1."""
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a worker really runs after a weight pull."""

    version: int
    checksum: str
    seconds: float
    weight_check_mean: float | None = None
    """Mean |learner - engine| log-prob over the weight-check tokens, in nats; None when no weight check came along."""
    weight_check_max: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an engine samples; TRL's names."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationRequest:
    """n samples of one prompt."""

    request_id: str
    prompt_ids: IntArray
    """[P]"""
    n: int
    sampling: SamplingParams
    seed: int
    """Sample i draws from a generator seeded by (seed, i) alone, whatever else is in the batch."""


class EventKind(enum.StrEnum):
    """What `events.jsonl` can say."""

    RUN_STARTED = "run_started"
    RUN_RESUMED = "run_resumed"
    RUN_FINISHED = "run_finished"
    RUN_FAILED = "run_failed"
    INTERRUPTED = "interrupted"
    ACTOR_STARTED = "actor_started"
    ACTOR_LOST = "actor_lost"
    ACTOR_RESTARTED = "actor_restarted"
    WEIGHTS_PUBLISHED = "weights_published"
    WEIGHTS_PULLED = "weights_pulled"
    WEIGHT_CHECK = "canary"
    LEASE_EXPIRED = "lease_expired"
    GROUP_REISSUED = "group_reissued"
    GROUP_DROPPED = "group_dropped"
    REWARD_FAILED = "reward_failed"
    TEACHER_FAILED = "teacher_failed"
    CHECKPOINT = "checkpoint"
    EVALUATED = "evaluated"
    SLOTS = "slots"
    WAITING = "waiting"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of `events.jsonl`."""

    kind: EventKind
    actor: str
    time: float
    """Seconds since the epoch."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""

    @classmethod
    def now(cls, kind: EventKind, actor: str, /, **detail: Any) -> Event:
        """Something that happens at this moment."""
        return cls(kind=kind, actor=actor, time=time.time(), detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What an actor answers to a probe, from a thread of its own so that busy work cannot delay it."""

    pid: int
    progress: int
    """Counts up whenever the actor gets something done."""
    busy_since: float | None
    """When the work at hand began (seconds since the epoch); None while idle."""
    version: int | None = None
    """Weight version, for actors that hold weights."""
    checksum: str | None = None
    problem: str | None = None
    """Set when the actor itself knows that it must be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorReport:
    """Events and spans an actor has gathered since it was last asked."""

    events: Sequence[Event] = ()
    spans: Sequence[Span] = ()


@runtime_checkable
class Handle(Protocol):
    """One face for an actor in this process and for an actor across the cluster: await a method."""

    @property
    def name(self) -> str:
        """The actor's name, as events and errors give it."""
        ...

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a method and wait for its answer.

        Raises:
            DeadlineError: no answer within `deadline_s` seconds; names actor and method.
            ActorLostError: the actor died; whether the call took effect is unknown.
        """
        ...
