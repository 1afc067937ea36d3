"""What the engine thread asks of the software that runs the model.

    EngineThread -- add, add_score, add_question, abort --> EngineBackend -- step() --> Finished(key, result) ...
    EngineThread -- load(payload) ------------------------> EngineBackend     (between two steps, requests are kept)

All methods are called from one thread, `build` first and `close` last, so a backend needs no locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from trl_ray.types import (
    Completion,
    FloatArray,
    GenerationRequest,
    IntArray,
    TeacherQuestion,
    TeacherRequest,
    TensorEntry,
    WeightPayload,
    WeightVersion,
)
from trl_ray.wire.teacher_answers import TeacherAnswer

CHECKPOINT_VERSION = WeightVersion(version=0, checksum="checkpoint")
"""What an engine runs before its first update: the weights the run starts from."""

Result: TypeAlias = "tuple[Completion, ...] | FloatArray | TeacherAnswer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a backend reports once it is built."""

    max_model_len: int
    """Prompt and completion tokens of one sequence."""
    vocab_size: int
    manifest: tuple[TensorEntry, ...]
    """The parameters an update must bring."""
    starts_from_files: bool = True
    """Whether it runs the model's own weights before the first update, and no random ones."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """A request, a score or a question that is done."""

    key: str
    result: Result
    """n completions, [T-1] log-probs, or what is said of one completion, without the tail."""


class EngineBackend(Protocol):
    """The model and its scheduler, without threads, futures or deadlines."""

    def build(self) -> Limits:
        """Load the model; called once, in the engine's thread."""
        ...

    def add(self, key: str, request: GenerationRequest) -> None:
        """Queue one request.

        Raises:
            ValueError: this request cannot be run; nothing of it was queued.
        """
        ...

    def add_score(self, key: str, token_ids: IntArray) -> None:
        """Queue the scoring of one sequence [T], T >= 2.

        Raises:
            ValueError: this sequence cannot be scored.
        """
        ...

    def check_question(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """Refuse what this software cannot answer; called in the thread of whoever asks.

        Raises:
            ConfigError: it cannot.
        """
        ...

    def add_question(self, key: str, request: TeacherRequest, question: TeacherQuestion) -> None:
        """Queue a question about one completion.

        Raises:
            ValueError: this one cannot be answered.
        """
        ...

    def abort(self, keys: Sequence[str]) -> None:
        """Forget what was queued under these keys; unknown keys are ignored."""
        ...

    def step(self) -> list[Finished]:
        """Run the model once; called only while something is queued."""
        ...

    def load(self, payload: WeightPayload) -> None:
        """Replace all weights by a payload that fits; later tokens are sampled from these weights alone."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
