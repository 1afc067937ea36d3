"""The options of teachers: whose weights they hold, where they stand, how they are asked.

TeacherWeights        flat, TRL's names: how a teacher of the policy's own weights follows them
TeacherConfig         nested, ours: actors, payload, patience
TeacherOptions        nested, ours: the same, and another model or a server
TeacherServerConfig   nested, ours: one that is asked over HTTP
TeacherServeConfig    flat: one that `trl-ray teacher-serve` answers for
TeacherSource         all of it for one teacher, as whoever holds it is told
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trl_ray.config.base import FROM_STRING, Positive, Seconds, Section, rule
from trl_ray.config.object_paths import real_path
from trl_ray.config.sections import Dtype, ModelConfig, StatedDtype


class TeacherKind(enum.StrEnum):
    """Whose weights a teacher holds."""

    EMA = "ema"
    """A moving average of the policy's."""
    LIVE = "live"
    """The policy's, as they were last published."""
    BASE = "base"
    """Those that training started from."""
    EXTERNAL = "external"
    """Another model's."""


def _known_kind(value: Any) -> Any:
    """A kind by its name; anything with a colon is a dotted path, found when the run is prepared."""
    if isinstance(value, str) and value in set(TeacherKind):
        return TeacherKind(value)
    if not isinstance(value, str) or ":" not in value:
        known = ", ".join(repr(kind.value) for kind in TeacherKind)
        raise ValueError(f"must be {known}, package.module:Class or file.py:Class, got {value!r}. Choose one.")
    return real_path(value)


class AdapterAverage(enum.StrEnum):
    """What of a low-rank adapter is averaged."""

    FACTORS = "factors"
    """A and B each, from zero: TRL's convention, whose product is no average of the products."""
    PRODUCT = "product"
    """The weights they amount to."""


class TeacherWeights(Section):
    """How a teacher of the policy's own weights follows them; the names are those of TRL's SDPOConfig."""

    teacher_model_kind: Annotated[TeacherKind | str, BeforeValidator(_known_kind)] = TeacherKind.EMA
    """ema, live or base; or ``package.module:Class``, a rule from outside by which a copy follows the policy."""
    teacher_kind_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of a rule from outside."""
    teacher_update_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """teacher <- (1 - rate) teacher + rate policy."""
    teacher_sync_steps: Positive = 1
    """Optimizer steps between two updates."""
    teacher_adapter_average: Annotated[AdapterAverage, FROM_STRING] = AdapterAverage.FACTORS

    @property
    def has_outside_kind(self) -> bool:
        """Whether a class from outside says how the teacher follows."""
        return not isinstance(self.teacher_model_kind, TeacherKind)

    @property
    def kind_name(self) -> str:
        """The kind in one word, for names of actors and scores: of a class from outside its own name."""
        return self.teacher_model_kind.rpartition(":")[2].rpartition(".")[2]  # a kind's own name has neither


class PayloadDtype(enum.StrEnum):
    """Number format of log-probs on their way."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class PayloadIds(enum.StrEnum):
    """Number format of token ids on their way."""

    INT32 = "int32"
    """Read where they lie."""
    COMPACT = "compact"
    """The low 16 bits and, in vocabularies beyond 65536, 8 more: fewer bytes on a network, unpacked on arrival."""


class TeacherPlacement(enum.StrEnum):
    """Who holds a teacher."""

    AUTO = "auto"
    """The learner where the objective asks for what only it knows (the student's own most probable tokens, or the whole
    vocabulary), else actors."""
    ACTOR = "actor"
    """Actors of its own, which score completions before they reach the queue: beside generation and training."""
    LEARNER = "learner"
    """The learner, which asks it in every pass."""


class TeacherConfig(Section):
    """Teachers as actors."""

    placement: Annotated[TeacherPlacement, FROM_STRING] = TeacherPlacement.AUTO
    num_workers: Positive = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    payload_dtype: Annotated[PayloadDtype, FROM_STRING] = PayloadDtype.FLOAT32
    payload_ids: Annotated[PayloadIds, FROM_STRING] = PayloadIds.INT32
    max_tokens_per_batch: Positive = 4096
    """Tokens of one forward pass; requests that wait together share it."""
    timeout_s: Seconds = 120.0
    """For one request, at the teacher and on the way."""
    max_attempts: Positive = 3
    """Times a request is sent before its group is dropped."""
    max_failures_in_a_row: Positive = 20
    """Groups in a row that no teacher could score, after which the run stops; 1 stops at the first."""

    @property
    def num_threads(self) -> int:
        """Compute threads of one actor."""
        return max(1, int(self.num_cpus))


class TeacherProtocol(enum.StrEnum):
    """What a teacher's server speaks."""

    TRL_RAY = "trl_ray"
    """``trl-ray teacher-serve``."""
    VLLM = "vllm"
    """vLLM's OpenAI server: ``/v1/completions`` with ``prompt_logprobs``."""
    TRL = "trl"
    """TRL v1.1's ``/get_sequence_logprobs/``."""


class TeacherServerConfig(Section):
    """A teacher behind HTTP; `TeacherConfig` says how long and how often it is asked."""

    url: str
    """Scheme, host, port and, where there is one, a path in front: ``http://10.0.0.5:8000``."""
    protocol: Annotated[TeacherProtocol, FROM_STRING] = TeacherProtocol.TRL_RAY
    model: str | None = None
    """The name under which a vLLM server serves it."""
    token_variable: str | None = None
    """Environment variable with the server's token; the token itself stands in no file."""
    chunk_size: Positive = 8
    """Completions of one HTTP request."""
    max_tokens_per_request: Positive = 32768
    """Prompts and completions of one HTTP request, unless one alone has more."""
    max_concurrent_requests: Positive = 4
    retry_delay_s: Seconds = 0.5
    """Before the second attempt; doubled before each further one, up to 10 s."""

    @rule
    def _check_model(self) -> None:
        if (self.protocol is TeacherProtocol.VLLM) != (self.model is not None):
            raise ValueError(
                f"model must be set with protocol=vllm and left out otherwise, got {self.model} and "
                f"{self.protocol.value}. Change one of the two."
            )


class TeacherEngine(enum.StrEnum):
    """What computes what an external teacher says."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class TeacherOptions(TeacherConfig):
    """A teacher that is another model, on actors of ours or behind a server."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "teacher"
    """As scores, events and the dataset's `teacher_column` call it."""
    model_name_or_path: str | None = None
    """Hub name or local folder; left out with `server`."""
    model_revision: str = "main"
    trust_remote_code: bool = False
    dtype: StatedDtype = Dtype.FLOAT32
    attn_implementation: str | None = None
    engine: Annotated[TeacherEngine, FROM_STRING] = TeacherEngine.TRANSFORMERS
    max_model_len: Positive | None = None
    """Tokens of context and completion together; None takes what the model allows."""
    kv_cache_memory_gib: Annotated[float, Field(gt=0)] = 1.0
    """Only with engine=vllm on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    tensor_parallel_size: Positive = 1
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM as they are."""
    server: TeacherServerConfig | None = None

    @property
    def model(self) -> ModelConfig:
        """The options under which its model is loaded."""
        return ModelConfig(
            model_name_or_path=self.model_name_or_path,
            model_revision=self.model_revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=False,
            bf16=False,
        )

    @rule
    def _check_source(self) -> None:
        if (self.server is None) == (self.model_name_or_path is None):
            raise ValueError(
                f"teacher {self.name} must have either model_name_or_path or server, got {self.model_name_or_path!r} "
                f"and {'a server' if self.server else 'no server'}. Set one of the two."
            )
        if self.placement is TeacherPlacement.LEARNER and (self.server or self.engine is TeacherEngine.VLLM):
            raise ValueError(
                f"placement must not be learner for teacher {self.name}, got learner with "
                f"{'server' if self.server else 'engine=vllm'}: the learner computes with transformers. Remove one of "
                "the two."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSource:
    """One teacher, as the actor, the server or the learner that holds it is told."""

    name: str
    kind: TeacherKind | str
    """Whose weights it holds; asked through the properties below, by everybody but configuration."""
    model: ModelConfig
    """The policy's, or the external teacher's; without a name where a server has it."""
    options: TeacherConfig
    """`TeacherOptions` where it is external."""
    weights: TeacherWeights | None = None
    """How it follows the policy; None where it is external."""

    def __post_init__(self) -> None:
        # Whoever loads it asks for its options: without them it would be a copy of the student, and teach nothing.
        assert (self.kind is TeacherKind.EXTERNAL) == (self.external is not None), (
            f"an external teacher, and no other, has TeacherOptions, got {self.kind} with {type(self.options).__name__}"
        )

    @property
    def external(self) -> TeacherOptions | None:
        """Its own options, where it is another model."""
        return self.options if isinstance(self.options, TeacherOptions) else None

    @property
    def server(self) -> TeacherServerConfig | None:
        """The server that answers for it, where there is one."""
        return None if self.external is None else self.external.server

    @property
    def follows_policy(self) -> bool:
        """Whether it is fed with published weights."""
        return self.is_policy or self.keeps_average

    @property
    def is_policy(self) -> bool:
        """Whether its weights are the policy's."""
        return self.kind is TeacherKind.LIVE

    @property
    def is_initial(self) -> bool:
        """Whether its weights are those that training started from."""
        return self.kind is TeacherKind.BASE

    @property
    def keeps_average(self) -> bool:
        """Whether its weights are state of the run, of which checkpoints must hold a copy."""
        return self.kind is TeacherKind.EMA or self.rule is not None

    @property
    def rule(self) -> str | None:
        """The dotted path of the class from outside by which it follows the policy."""
        return None if isinstance(self.kind, TeacherKind) else self.kind


_ASKERS_OPTIONS = (
    "placement",
    "num_workers",
    "payload_dtype",
    "payload_ids",
    "max_attempts",
    "max_failures_in_a_row",
    "server",
)
"""Of a teacher, and nothing to the server that answers for it."""


class TeacherServeConfig(TeacherOptions):
    """``trl-ray teacher-serve``: a teacher on this machine, answering over HTTP for runs elsewhere.

    It computes with as many threads as OMP_NUM_THREADS says, or as there are cores.
    """

    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own asks for a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8100
    """0 takes a free one, which is printed."""
    token_variable: str | None = None
    """Environment variable with the token that clients must send; the token itself stands in no file."""
    max_requests_in_flight: Positive = 16
    """HTTP requests that are read or computed at once; further ones are told to come back."""
    max_body_mib: Annotated[float, Field(gt=0)] = 64.0
    """Of one HTTP request."""
    max_tokens_per_request: Positive = 65536
    """Contexts and completions of one HTTP request; `max_model_len` bounds each."""
    max_top_k: Positive = 256
    """Tokens that one place of an answer may hold."""
    shutdown_s: Seconds = 30.0
    """For requests under way when the server is told to stop."""

    @property
    def is_local(self) -> bool:
        """Whether nobody else's machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def source(self) -> TeacherSource:
        """The teacher, as the one who holds it is told."""
        return TeacherSource(name=self.name, kind=TeacherKind.EXTERNAL, model=self.model, options=self)

    @rule
    def _check_askers_options(self) -> None:
        fields = type(self).model_fields
        changed = [name for name in (*_ASKERS_OPTIONS, "num_cpus") if getattr(self, name) != fields[name].default]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} must be left out, because a server does not use them: payload and patience are "
                "options of the run that asks, and threads are set by OMP_NUM_THREADS. Remove them."
            )

    @rule
    def _check_token(self) -> None:
        if self.token_variable is None and not self.is_local:
            raise ValueError(
                f"token_variable must be set where others can reach the server, got none with host {self.host}. Name "
                "an environment variable that holds a token, or set host=127.0.0.1."
            )
