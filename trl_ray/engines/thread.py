"""The thread that steps a backend, and everything about waiting: futures, pausing, deadlines, failures.

    caller threads -- commands (add, abort, load) --> engine thread: command, command, step, step, ... --> futures
                                                      watchdog thread: no step for hang_deadline_s -------> futures fail

Engine thread
    consumes:      commands, in order, paused or not; steps while work is queued and nobody has paused
    produces:      results of futures
    waits for:     a command, or work while not paused
    unblocked by:  submit, score, score_completions, abort, load_weights, resume, close
Watchdog thread
    waits for:     the deadline of the step or command at hand
    unblocked by:  the end of a step, close
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from trl_ray.engines.backend import CHECKPOINT_VERSION, EngineBackend, Finished, Limits
from trl_ray.engines.completion_scoring import check_question, finish_answers
from trl_ray.engines.sampling import check_sampling
from trl_ray.engines.start.start_errors import start_error
from trl_ray.errors import DataError, DeadlineError, EngineError, TrlRayError
from trl_ray.models.weight_payload import verify_payload
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
    steady_time,
)
from trl_ray.wire.teacher_answers import TeacherAnswer

_LOG = logging.getLogger(__name__)
_JOIN_S = 30.0
"""How long `close` waits for the step at hand."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pending:
    """Work whose future is not settled."""

    request_id: str | None
    """None for a score or a question."""
    size: int
    """Completions; 0 for a score or a question."""
    future: Future[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Command:
    """Something to run in the engine thread between two steps."""

    run: Callable[[], None]
    done: Future[None]


class EngineThread:
    """An `Engine` made of a backend and one thread of its own.

    Protocol in use::

        engine = EngineThread(backend, name="vllm", max_num_seqs=32, hang_deadline_s=300)   # returns when it can run
        [future] = engine.submit([request])
        completions = future.result()
        engine.close()

    NOTE: the model is built, stepped and updated in the engine thread alone (CUDA devices and autograd modes belong
    to a thread), so callers may be on any thread. Once `broken` is set, nothing is stepped again.
    """

    def __init__(self, backend: EngineBackend, *, name: str, max_num_seqs: int, hang_deadline_s: float) -> None:
        self._backend = backend
        self._name = name
        self._max_num_seqs = max_num_seqs
        self._hang_deadline_s = hang_deadline_s
        self._condition = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._running: _Command | None = None
        self._pending: dict[str, _Pending] = {}
        self._counter = itertools.count()
        self._version = CHECKPOINT_VERSION
        self._active = False
        self._paused = False
        self._closed = False
        self._broken: str | None = None
        self._progress_at = steady_time()
        self._watched_since = time.monotonic()
        ready: Future[Limits] = Future()
        self._thread = threading.Thread(target=self._main, args=(ready,), name=f"{name}-engine", daemon=True)
        self._thread.start()
        self._limits = ready.result()
        # A thread inside torch while the interpreter goes down aborts the process.
        atexit.register(self.close)
        threading.Thread(target=self._watch, name=f"{name}-watchdog", daemon=True).start()

    # What callers see -------------------------------------------------------------------------------------------

    @property
    def version(self) -> WeightVersion:
        """The weights the engine really runs; `CHECKPOINT_VERSION` before the first update."""
        return self._version

    @property
    def starts_from_files(self) -> bool:
        """Whether it runs the model's own weights before the first update, and no random ones."""
        return self._limits.starts_from_files

    @property
    def max_num_seqs(self) -> int:
        """How many completions it generates at once; more are queued inside."""
        return self._max_num_seqs

    @property
    def max_model_len(self) -> int:
        """Prompt and completion tokens of the longest sequence it can hold."""
        return self._limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head."""
        return self._limits.vocab_size

    @property
    def broken(self) -> str | None:
        """Why the engine must be replaced; None while it works."""
        return self._broken

    @property
    def in_flight(self) -> int:
        """Completions submitted and not yet finished (a request counts in full until all its completions are)."""
        with self._condition:
            return sum(pending.size for pending in self._pending.values())

    @property
    def last_progress(self) -> float:
        """Seconds since the epoch of the last finished model step, or now while there is nothing to do."""
        with self._condition:
            return self._progress_at if self._busy() or self._broken else steady_time()

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Future[tuple[Completion, ...]]]:
        """Queue requests; all of one call enter the scheduler together.

        Returns:
            One future per request, holding its n completions. It fails with EngineError when the engine fails or makes
            no progress for its deadline.

        Raises:
            DataError: a request cannot be run (empty or too long a prompt, unknown ids, sampling out of range).
            EngineError: the engine is broken or closed.
        """
        for request in requests:
            self._check(request)
        # A name may come again, as those of evaluations do; a key never does.
        keyed = {f"{next(self._counter)}:{request.request_id}": request for request in requests}
        entries = {
            key: _Pending(request_id=request.request_id, size=request.n, future=Future())
            for key, request in keyed.items()
        }

        # One command for all, so that the batch is the same in every run.
        def add_all() -> None:
            for key, request in keyed.items():
                self._add(key, partial(self._backend.add, key, request))

        self._enqueue(add_all, entries)
        return [entry.future for entry in entries.values()]

    def score(self, sequences: Sequence[IntArray], *, deadline_s: float) -> list[FloatArray]:
        """Log-prob of every token but the first, given those before it, at temperature 1. Waits while paused.

        Args:
            sequences: token ids, each [T], 1 <= T <= max_model_len.
            deadline_s: seconds to wait for all of them.

        Returns:
            One [T-1] array of natural log-probs per sequence.

        Raises:
            DataError: a sequence is empty, too long, or has unknown ids.
            DeadlineError: no answer within the deadline.
            EngineError: the engine failed.
        """
        for sequence in sequences:
            self._check_ids(sequence, what="a sequence to score", longest=self._limits.max_model_len)
        keyed = {f"{next(self._counter)}:score": sequence for sequence in sequences}
        entries = {key: _Pending(request_id=None, size=0, future=Future()) for key in keyed}

        def add_all() -> None:
            for key, sequence in keyed.items():
                # Nothing predicts the first token, so that there is nothing to ask about a lone one.
                if len(sequence) > 1:
                    self._add(key, partial(self._backend.add_score, key, sequence))
                else:
                    self._settle([Finished(key=key, result=np.zeros(0, dtype=np.float32))])

        self._enqueue(add_all, entries)
        return self._results(entries, until=time.monotonic() + deadline_s, patience_s=deadline_s)

    def score_completions(
        self,
        requests: Sequence[TeacherRequest],
        question: TeacherQuestion,
        *,
        deadline_s: float,
        teacher: str | None = None,
    ) -> list[TeacherScores]:
        """What the engine's weights say about completions, beside what is generated. Waits while paused.

        Args:
            requests: [B] prompts and completions, at least one token each, at most max_model_len together.
            question: what is asked about each token.
            deadline_s: seconds to wait for all of them.
            teacher: the name that the scores bear; None takes the engine's.

        Returns:
            [B] in the order of the requests, checked, all of one weight version: completions that an update has
            overtaken are scored again.

        Raises:
            ConfigError: this engine cannot answer such a question.
            DataError: a request is empty, too long, or has unknown ids.
            DeadlineError: no answer within the deadline.
            EngineError: the engine failed.
            TeacherError: what it says cannot be true.
        """
        self._check_questions(requests, question)
        until = time.monotonic() + deadline_s
        answers: dict[int, TeacherAnswer] = {}
        missing = list(range(len(requests)))
        while missing:
            asked = [requests[index] for index in missing]
            found = self._results(self._ask(asked, question), until=until, patience_s=deadline_s)
            answers.update(zip(missing, found, strict=True))
            # Only answers of one version can be joined, and the youngest is the one that stays.
            youngest = max(answer.version or 0 for answer in answers.values())
            missing = [index for index, answer in answers.items() if answer.version != youngest]
        ordered = [answers[index] for index in range(len(requests))]
        return finish_answers(ordered, requests=requests, question=question, teacher=teacher or self._name)

    def pause(self) -> None:
        """Stop stepping after the current step; requests in flight are kept. Returns when nothing is stepped.

        Raises:
            EngineError: the current step hangs, or the engine is broken or closed.
        """
        with self._condition:
            self._paused = True
            # Bounded: the watchdog breaks the engine when the current step does not end.
            self._condition.wait_for(lambda: not self._active or self._broken is not None or self._closed)
            self._require_working()

    def resume(self) -> None:
        """Go on stepping.

        Raises:
            EngineError: the engine is broken or closed.
        """
        with self._condition:
            self._require_working()
            # A pause is no hang: the watchdog counts from here.
            self._paused = False
            self._watched_since = time.monotonic()
            self._condition.notify_all()

    def load_weights(self, payload: WeightPayload) -> None:
        """Replace all weights between two steps, paused or not; requests in flight go on under the new weights.

        Raises:
            WeightError: names, shapes, layout or checksum are wrong; the engine is untouched and works on.
            EngineError: loading failed half-way; the engine is broken.
        """
        # In the caller's thread and before anything is touched: a payload that does not fit costs nobody a step.
        verify_payload(self._limits.manifest, payload)

        def load() -> None:
            # Both in the engine's thread, between two steps: no token is sampled under the wrong version.
            self._backend.load(payload)
            self._version = payload.identity

        self._enqueue(load, {}).result()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; their futures are cancelled. Unknown ids are ignored."""
        wanted = set(request_ids)
        with self._condition:
            keys = [key for key, pending in self._pending.items() if pending.request_id in wanted]
        self._abort_keys(keys)

    def close(self) -> None:
        """Stop the thread and free the model; what is in flight fails with EngineError. May be called twice."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        self._fail_all(f"{self._name} was closed")
        atexit.unregister(self.close)
        # What hangs in the model software cannot be stopped; its thread is a daemon and ends with the process.
        hangs = self._broken is not None and self._active
        self._thread.join(timeout=0.0 if hangs else _JOIN_S)

    # Queueing ---------------------------------------------------------------------------------------------------

    def _check(self, request: GenerationRequest) -> None:
        if request.n < 1:
            raise DataError(f"n must be >= 1, but request {request.request_id} has n={request.n}.")
        self._check_ids(
            request.prompt_ids,
            what=f"the prompt of request {request.request_id}",
            longest=self._limits.max_model_len - 1,
        )
        check_sampling(request.sampling)

    def _check_questions(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        with self._condition:
            self._require_working()
        check_question(question, vocab_size=self._limits.vocab_size, engine=self._name)
        self._backend.check_question(requests, question)
        for number, request in enumerate(requests):
            longest = self._limits.max_model_len
            self._check_ids(request.prompt_ids, what=f"the prompt of completion {number}", longest=longest - 1)
            self._check_ids(
                request.completion_ids, what=f"completion {number}", longest=longest - len(request.prompt_ids)
            )

    def _check_ids(self, ids: IntArray, *, what: str, longest: int) -> None:
        if not 1 <= len(ids) <= longest:
            raise DataError(
                f"{what} must have 1 to {longest} tokens, but has {len(ids)}. Shorten it or raise max_model_len."
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self._limits.vocab_size:
            raise DataError(
                f"{what} must hold ids in [0, {self._limits.vocab_size}), but holds {ids.min()} to {ids.max()}. "
                "Tokenise with the engine's own tokenizer."
            )

    def _ask(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> dict[str, _Pending]:
        keyed = {f"{next(self._counter)}:question": request for request in requests}
        entries = {key: _Pending(request_id=None, size=0, future=Future()) for key in keyed}

        def add_all() -> None:
            for key, request in keyed.items():
                self._add(key, partial(self._backend.add_question, key, request, question))

        self._enqueue(add_all, entries)
        return entries

    def _results(self, entries: dict[str, _Pending], *, until: float, patience_s: float) -> list[Any]:
        """Wait for all of them; when time is up, or one has failed, the others are forgotten."""
        try:
            return [entry.future.result(timeout=max(0.0, until - time.monotonic())) for entry in entries.values()]
        except FutureTimeoutError:
            raise DeadlineError(
                f"{self._name} must score {len(entries)} sequences within {patience_s} s, but did not"
                f"{' (it is paused: resume it)' if self._paused else ''}."
            ) from None
        finally:
            left = [key for key, entry in entries.items() if not entry.future.done()]
            if left:
                self._abort_keys(left)

    def _enqueue(self, run: Callable[[], None], entries: dict[str, _Pending]) -> Future[None]:
        """Hand a command to the engine thread; `entries` are pending from now on."""
        command = _Command(run=run, done=Future())
        with self._condition:
            self._require_working()
            # Time without work is no hang either.
            if not self._busy():
                self._watched_since = time.monotonic()
            self._pending.update(entries)
            self._commands.append(command)
            self._condition.notify_all()
        return command.done

    def _add(self, key: str, add: Callable[[], None]) -> None:
        """Give one item to the backend; one that it refuses fails alone."""
        if key not in self._pending:  # Aborted before it got here.
            return
        try:
            add()
        except ValueError as error:
            with self._condition:
                pending = self._pending.pop(key)
            with suppress(InvalidStateError):
                pending.future.set_exception(EngineError(f"{self._name} refused {key}: {error}"))

    def _abort_keys(self, keys: Sequence[str]) -> None:
        with self._condition:
            gone = [self._pending.pop(key) for key in keys if key in self._pending]
            working = self._broken is None and not self._closed
        for pending in gone:
            pending.future.cancel()
        if working and keys:
            self._enqueue(lambda: self._backend.abort(keys), {})

    def _require_working(self) -> None:
        if self._broken is not None:
            raise EngineError(f"{self._name} must be replaced: {self._broken}")
        if self._closed:
            raise EngineError(f"{self._name} was closed; make a new engine")

    # Settling ---------------------------------------------------------------------------------------------------

    def _settle(self, results: Sequence[Finished]) -> None:
        with self._condition:
            settled = [(self._pending.pop(item.key), item) for item in results if item.key in self._pending]
        # Outside the lock: a future runs its callbacks here, and they may call the engine.
        for pending, item in settled:
            with suppress(InvalidStateError):  # The caller has cancelled it.
                pending.future.set_result(item.result)

    def _break(self, reason: str) -> None:
        with self._condition:
            # The first reason is the cause.
            if self._broken is None:
                self._broken = reason
            self._condition.notify_all()
        self._fail_all(f"{self._name} failed and must be replaced: {reason}")

    def _fail_all(self, message: str) -> None:
        """Fail every future with our own exception: those of vLLM do not survive pickling."""
        with self._condition:
            futures: list[Future[Any]] = [pending.future for pending in self._pending.values()]
            futures += [command.done for command in self._commands]
            if self._running is not None:
                futures.append(self._running.done)
            self._pending.clear()
            self._commands.clear()
            self._condition.notify_all()
        for future in futures:
            with suppress(InvalidStateError):
                future.set_exception(EngineError(message))

    # The two threads --------------------------------------------------------------------------------------------

    def _busy(self) -> bool:
        """Whether a step or command runs or should run; called with the lock held."""
        return self._active or bool(self._commands) or (bool(self._pending) and not self._paused)

    def _main(self, ready: Future[Limits]) -> None:
        try:
            limits = self._backend.build()
        except TrlRayError as error:
            ready.set_exception(error)
            return
        except Exception as error:  # The model software may raise anything; its own exceptions may not unpickle.
            _LOG.exception("%s cannot start", self._name)
            ready.set_exception(start_error(self._name, error))
            return
        ready.set_result(limits)
        while self._turn():
            pass
        self._backend.close()

    def _turn(self) -> bool:
        """One command or one step; False when the thread should end."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._broken is not None or self._busy())
            if self._closed or self._broken is not None:
                return False
            # Commands first, so that weights and aborts do not wait for what is generated.
            self._running = self._commands.popleft() if self._commands else None
            self._active = True
        try:
            if self._running is not None:
                self._running.run()
            else:
                self._settle(self._backend.step())
        except Exception as error:  # Any failure of the model software means one thing: replace the engine.
            _LOG.exception("%s failed", self._name)
            self._active = False
            self._break(f"{type(error).__name__}: {error}")
            return False
        with self._condition:
            done, self._running, self._active = self._running, None, False
            self._progress_at, self._watched_since = steady_time(), time.monotonic()
            self._condition.notify_all()
        if done is not None:
            with suppress(InvalidStateError):
                done.done.set_result(None)
        return True

    def _watch(self) -> None:
        with self._condition:
            while not self._closed and self._broken is None:
                left = self._watched_since + self._hang_deadline_s - time.monotonic()
                if self._busy() and left <= 0:
                    break
                self._condition.wait(timeout=max(left, 0.01) if self._busy() else self._hang_deadline_s)
            if self._closed or self._broken is not None:
                return
        self._break(f"no step finished for {self._hang_deadline_s} s while work was in flight")
