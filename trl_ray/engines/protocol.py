"""The one face of an inference engine, whatever runs behind it.

    RolloutWorker -- submit(requests) --> Engine thread -- futures --> tuple[Completion, ...] per request
    RolloutWorker -- pause, load_weights, resume --> Engine      (requests in flight go on under new weights)
    Teacher -- score_completions(requests, question) --> TeacherScores per request     (beside what is generated)

An engine owns one thread that steps the model; every method may be called from another thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from trl_ray.types import (
    Completion,
    FloatArray,
    GenerationRequest,
    IntArray,
    TeacherQuestion,
    TeacherRequest,
    TeacherScores,
    WeightPayload,
    WeightVersion,
)


class Engine(Protocol):
    """Generates groups with per-token log-probs and the weight version of every token.

    Protocol in use::

        futures = engine.submit([request])          # one future per request, n completions each
        completions = futures[0].result(timeout=60)
        engine.pause(); engine.load_weights(payload); engine.resume()
        assert engine.version == payload.identity

    NOTE: after `load_weights` has raised, the engine must not be resumed: replace it.
    """

    @property
    def version(self) -> WeightVersion:
        """The weights the engine really runs."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """How many completions it generates at once; more are queued inside."""
        ...

    @property
    def in_flight(self) -> int:
        """Completions submitted and not yet finished."""
        ...

    @property
    def last_progress(self) -> float:
        """Seconds since the epoch of the last finished model step, or of the last moment without work."""
        ...

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Future[tuple[Completion, ...]]]:
        """Queue requests; all of one call enter the scheduler together.

        Returns:
            One future per request, holding its n completions. A future fails with EngineError when the
            engine fails or makes no progress for its deadline.
        """
        ...

    def score(self, sequences: Sequence[IntArray], *, deadline_s: float) -> list[FloatArray]:
        """Log-prob of every token but the first, given those before it, at temperature 1.

        Args:
            sequences: token ids, each [T].
            deadline_s: seconds to wait.

        Returns:
            One [T-1] array of natural log-probs per sequence.
        """
        ...

    def score_completions(
        self,
        requests: Sequence[TeacherRequest],
        question: TeacherQuestion,
        *,
        deadline_s: float,
        teacher: str | None = None,
    ) -> list[TeacherScores]:
        """What the engine's weights say about completions; may be called while it generates.

        Args:
            requests: [B] prompts and completions.
            question: what is asked about each token.
            deadline_s: seconds to wait for all of them.
            teacher: the name that the scores bear; None takes the engine's.

        Returns:
            [B] in the order of the requests, all of one weight version.

        Raises:
            ConfigError: this engine cannot answer such a question.
            DataError: a request is empty, too long, or has unknown ids.
            DeadlineError: no answer within the deadline.
            EngineError: the engine failed.
            TeacherError: what it says cannot be true.
        """
        ...

    def pause(self) -> None:
        """Stop stepping after the current step; requests in flight are kept."""
        ...

    def load_weights(self, payload: WeightPayload) -> None:
        """Replace all weights. Names, shapes and dtypes are validated before anything is touched.

        The KV cache of requests in flight is recomputed under the new weights; tokens sampled before keep
        the version that sampled them.

        Raises:
            WeightError: the manifest does not fit the model, or the checksum does not match (engine untouched).
            EngineError: loading failed half-way; the engine must be replaced.
        """
        ...

    def resume(self) -> None:
        """Go on stepping."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; their futures are cancelled."""
        ...

    def close(self) -> None:
        """Stop the thread and free the model. May be called twice."""
        ...
