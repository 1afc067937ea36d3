"""How a group gets what teachers say of it, on its way from the rewards to the queue.

    prompt, completions [G], rewards [G] --reprompts, or the student's own prompt--> contexts [G]
    contexts that are distilled --question--> the row's teacher: its copy with the least to do, or the engine here
    frame --decode, check--> teachings [G], None where nothing is distilled;  or TeacherFailure, and nothing is trained

Where the learner holds the teacher nobody is asked: the contexts travel alone.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt

from trl_ray.actors.calling import Patience, call_patiently
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.messages import nearest
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds, TeacherKind
from trl_ray.data.chat.chat_rendering import ChatFormat, own_template
from trl_ray.data.prompts.reprompts import Attempt, DecodingTokenizer, gather_feedback, reprompt_group
from trl_ray.engines.retry_delays import doubling_delays, last_result
from trl_ray.errors import ActorLostError, DeadlineError, TeacherError, TrlRayError
from trl_ray.types import (
    Completion,
    Handle,
    Prompt,
    Reward,
    TeacherContext,
    TeacherQuestion,
    TeacherRequest,
    TeacherScores,
)
from trl_ray.wire.teacher_answers import check_answer, join_scores
from trl_ray.wire.teacher_payload import decode_scores


class TeacherSeat(enum.StrEnum):
    """Who says what the teacher says."""

    ACTORS = "actors"
    """Actors of its own."""
    OWN_ENGINE = "own_engine"
    """The rollout worker's engine, which holds the weights of a live teacher (use_teacher_server)."""
    LEARNER = "learner"
    """The learner, when it trains; groups bring the contexts only."""


class TeacherErrorKind(enum.StrEnum):
    """How a teacher failed; each kind is told apart because each asks for another remedy."""

    LOST = "lost"
    """Its actor died and did not come back in time."""
    TIMEOUT = "timeout"
    """It did not answer in time."""
    INVALID = "invalid"
    """It answered what cannot be true: no frame, NaN, another length, another vocabulary, ..."""
    ERROR = "error"
    """It said that it could not answer, or there is no teacher of that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFailure:
    """A teacher failed for a whole group."""

    teacher: str
    kind: TeacherErrorKind
    detail: str

    def __str__(self) -> str:
        return f"teacher {self.teacher} ({self.kind}): {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachingPlan:
    """What a rollout worker does about teachers."""

    question: TeacherQuestion
    """Of every token; nobody is asked where the learner holds the teacher."""
    asks: TeacherSeat = TeacherSeat.ACTORS
    reprompt: RepromptConfig | None = None
    """How hints are put into prompts; None shows teachers the student's own."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is told, as for the student's prompts."""
    column: str | None = None
    """The column that names a row's teacher; None gives all rows to the first."""
    payload_dtype: PayloadDtype | None = None
    """Of log-probs on their way; None lets the teacher choose."""
    payload_ids: PayloadIds | None = None
    """Of token ids on their way; None lets the teacher choose."""
    timeout_s: float = 120.0
    """For one attempt; a teacher that comes back in the middle of it has as long again."""
    max_attempts: int = 3
    """Times a group is sent to its teacher before it fails."""
    retry_delay_s: float = 0.0
    """Before the second attempt; doubled before each further one, up to 10 s."""

    def __post_init__(self) -> None:
        assert self.max_attempts >= 1 and self.timeout_s > 0, f"a teacher is asked at least once, for a while: {self}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taught:
    """One group's teaching, or the failure that explains why there is none."""

    contexts: tuple[TeacherContext, ...] = ()
    """[G]; empty with a failure."""
    teachings: tuple[TeacherScores | None, ...] = ()
    """[G] None where nothing is distilled; empty where the learner holds the teacher, and with a failure."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """``teacher/attempts``, ``time/teacher_s`` (seconds) and, where it follows the policy, ``teacher/version_lag``:
    its weights' version behind the youngest that sampled the group."""
    failure: TeacherFailure | None = None


class ScoringEngine(Protocol):
    """The part of an engine that stands in for a teacher."""

    @property
    def broken(self) -> str | None:
        """Why it must be replaced."""
        ...

    def score_completions(
        self, requests: Sequence[TeacherRequest], question: TeacherQuestion, *, teacher: str, deadline_s: float
    ) -> list[TeacherScores]:
        """What its weights say of some completions; may be called from any thread."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """Whom one attempt goes to."""

    copy: int | None
    """Which of the teacher's actors; None is the engine here."""
    waits: bool = True
    """Whether a lost one is waited for."""


class Teaching:
    """Teaches groups, many at a time.

        teaching = Teaching(plan, teachers={"math": (handle, handle)}, tokenizer=tokenizer)
        taught = await teaching.teach(prompt, completions, rewards)

    Args:
        plan: what to do.
        teachers: the copies of each teacher, the default one first; empty unless actors are asked.
        tokenizer: of the policy; only for reprompts.
        engine: that of this worker; only where it stands in for the teacher.
    """

    def __init__(
        self,
        plan: TeachingPlan,
        *,
        teachers: Mapping[str, Sequence[Handle]],
        tokenizer: DecodingTokenizer | None = None,
        engine: ScoringEngine | None = None,
    ) -> None:
        assert plan.asks is not TeacherSeat.ACTORS or all(teachers.values()), "every teacher has an actor"
        assert plan.asks is not TeacherSeat.ACTORS or teachers, "there are actors to be asked"
        assert plan.asks is not TeacherSeat.OWN_ENGINE or engine is not None, "there is an engine to be asked"
        assert plan.reprompt is None or tokenizer is not None, "reprompts need a tokenizer"
        self._plan, self._tokenizer, self._engine = plan, tokenizer, engine
        self._copies = {name: tuple(handles) for name, handles in teachers.items()}
        self._asked = {name: [0] * len(handles) for name, handles in self._copies.items()}
        template = own_template(tokenizer) if tokenizer is not None and tokenizer.chat_template else ""
        self._chat = ChatFormat(template=template, template_kwargs=plan.chat_template_kwargs)

    @property
    def reprompts(self) -> bool:
        """Whether teachers are shown more than the student's prompt."""
        return self._plan.reprompt is not None

    async def teach(self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[Reward]) -> Taught:
        """Ask about one group: only of what is distilled, again after a failure, and at another copy if there is one.

        consumes: one group. produces: its teaching or a failure. waits for: its teacher, at most `max_attempts` times
        twice `timeout_s`, and the delays between. unblocked by: an answer, the deadline.

        Args:
            prompt: of the group; its column may name the teacher.
            completions: [G]
            rewards: [G] without totals where there are no rewards.

        Raises:
            EngineError: this worker's engine stands in for the teacher and must be replaced.
            DataError: hints cannot be written into the prompt, which preparation must have checked.
        """
        contexts = self._contexts(prompt, completions, rewards)
        if self._plan.asks is TeacherSeat.LEARNER:
            return Taught(contexts=contexts)
        places = [index for index, context in enumerate(contexts) if context.is_distilled]
        requests = [
            TeacherRequest(prompt_ids=contexts[place].prompt_ids, completion_ids=completions[place].token_ids)
            for place in places
        ]
        teacher = self._teacher_of(prompt)
        if isinstance(teacher, TeacherFailure):
            return Taught(failure=teacher)
        if not places:
            return Taught(contexts=contexts, teachings=(None,) * len(contexts))
        began = time.monotonic()
        answer, attempts = await self._ask_until(teacher, requests)
        metrics = {"teacher/attempts": float(attempts), "time/teacher_s": time.monotonic() - began}
        if isinstance(answer, TeacherFailure):
            return Taught(metrics=metrics, failure=answer)
        teachings: list[TeacherScores | None] = [None] * len(contexts)
        for place, scores in zip(places, answer, strict=True):
            teachings[place] = scores
        metrics |= _version_lag(answer, completions)
        return Taught(contexts=contexts, teachings=tuple(teachings), metrics=metrics)

    def _contexts(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[Reward]
    ) -> tuple[TeacherContext, ...]:
        """[G]; of an empty completion nothing can be distilled."""
        config = self._plan.reprompt
        if config is None:
            contexts: Sequence[TeacherContext] = [TeacherContext(prompt_ids=prompt.token_ids)] * len(completions)
        else:
            assert self._tokenizer is not None
            attempts = [
                Attempt(token_ids=one.token_ids, reward=reward.total, feedback=gather_feedback(prompt, reward))
                for one, reward in zip(completions, rewards, strict=True)
            ]
            contexts = reprompt_group(prompt, attempts, config=config, tokenizer=self._tokenizer, chat=self._chat)
        return tuple(
            context if len(one.token_ids) else replace(context, is_distilled=False)
            for context, one in zip(contexts, completions, strict=True)
        )

    def _teacher_of(self, prompt: Prompt) -> str | TeacherFailure:
        """Whom a row is for; one that nobody knows is a failure, and asking again would change nothing."""
        if self._plan.asks is TeacherSeat.OWN_ENGINE:
            return TeacherKind.LIVE.value
        if self._plan.column is None:
            return next(iter(self._copies))
        name = prompt.columns.get(self._plan.column)
        if isinstance(name, str) and name in self._copies:
            return name
        guess = nearest(name, list(self._copies)) if isinstance(name, str) else None
        detail = (
            f"column {self._plan.column!r} of prompt {prompt.prompt_id} must name one of {', '.join(self._copies)}, "
            f"got {name!r}. {f'Did you mean {guess!r}?' if guess else 'Mend the row.'}"
        )
        return TeacherFailure(teacher=str(name), kind=TeacherErrorKind.ERROR, detail=detail)

    async def _ask_until(
        self, teacher: str, requests: Sequence[TeacherRequest]
    ) -> tuple[list[TeacherScores] | TeacherFailure, int]:
        """What the teacher says and how often it was asked, or its last failure."""
        again = AsyncRetrying(
            retry=retry_if_result(lambda answer: isinstance(answer, TeacherFailure)),
            stop=stop_after_attempt(self._plan.max_attempts),
            wait=doubling_delays(self._plan.retry_delay_s),
            sleep=asyncio.sleep,
            retry_error_callback=last_result,
        )
        answer: list[TeacherScores] | TeacherFailure = await again(
            self._ask_once, teacher, self._turns(teacher), requests
        )
        asked: int = again.statistics["attempt_number"]
        if isinstance(answer, TeacherFailure):
            answer = replace(answer, detail=f"asked {asked} times; the last time: {answer.detail}")
        return answer, asked

    def _turns(self, teacher: str) -> Iterator[_Turn]:
        """Whom to ask, attempt by attempt: the copy with the least to do of those that were not asked yet."""
        copies = range(len(self._copies.get(teacher, ())))
        untried = set(copies)
        while True:
            if not copies:
                yield _Turn(copy=None)
                continue
            untried = untried or set(copies)
            copy = min(sorted(untried), key=self._asked[teacher].__getitem__)
            untried.remove(copy)
            # With another copy at hand there is no need to wait until this one is back.
            yield _Turn(copy=copy, waits=not untried)

    async def _ask_once(
        self, teacher: str, turns: Iterator[_Turn], requests: Sequence[TeacherRequest]
    ) -> list[TeacherScores] | TeacherFailure:
        """One attempt; whatever a teacher does wrong comes back as one of the kinds of failure."""
        turn, kind = next(turns), TeacherErrorKind.ERROR
        try:
            if turn.copy is None:
                answer = await self._ask_engine(teacher, requests)
            else:
                answer = await self._ask_copy(teacher, turn.copy, requests, waits=turn.waits)
            # From here on a TeacherError is about the answer.
            kind = TeacherErrorKind.INVALID
            return self._checked(answer, teacher, requests)
        except ActorLostError as error:
            return TeacherFailure(teacher=teacher, kind=TeacherErrorKind.LOST, detail=str(error))
        except DeadlineError as error:
            return TeacherFailure(teacher=teacher, kind=TeacherErrorKind.TIMEOUT, detail=str(error))
        except TrlRayError as error:
            if turn.copy is None and self._engine is not None and self._engine.broken is not None:
                raise
            return TeacherFailure(teacher=teacher, kind=kind, detail=str(error))

    async def _ask_copy(self, teacher: str, copy: int, requests: Sequence[TeacherRequest], *, waits: bool) -> Any:
        plan = self._plan
        # One that does not answer in time has had its attempt.
        total_s = plan.timeout_s if waits else 0.0
        patience = Patience(deadline_s=plan.timeout_s, total_s=total_s, outlasts=(ActorLostError,))
        self._asked[teacher][copy] += 1
        try:
            return await call_patiently(
                self._copies[teacher][copy],
                "score",
                patience,
                requests=tuple(requests),
                question=plan.question,
                dtype=plan.payload_dtype,
                ids=plan.payload_ids,
            )
        finally:
            self._asked[teacher][copy] -= 1

    async def _ask_engine(self, teacher: str, requests: Sequence[TeacherRequest]) -> list[TeacherScores]:
        assert self._engine is not None
        ask = self._engine.score_completions
        deadline_s = self._plan.timeout_s
        return await asyncio.to_thread(ask, requests, self._plan.question, teacher=teacher, deadline_s=deadline_s)

    def _checked(self, answer: Any, teacher: str, requests: Sequence[TeacherRequest]) -> list[TeacherScores]:
        """An answer, of an actor a frame, that may be trained on.

        Raises:
            TeacherError: it may not.
        """
        question = self._plan.question
        if isinstance(answer, np.ndarray) and answer.dtype == np.uint8 and answer.ndim == 1:
            return decode_scores(answer, teacher=teacher, requests=requests, question=question)
        if self._plan.asks is not TeacherSeat.OWN_ENGINE:
            raise TeacherError(f"teacher {teacher} must answer with a frame of bytes, got {type(answer).__name__}.")
        if len(answer) != len(requests):
            raise TeacherError(f"the engine must score {len(requests)} completions, got {len(answer)}.")
        # One by one: weights may have been pulled in the middle.
        for scores, request in zip(answer, requests, strict=True):
            check_answer(join_scores([scores]), teacher=teacher, requests=[request], question=question)
        return list(answer)


def _version_lag(scores: Sequence[TeacherScores], completions: Sequence[Completion]) -> dict[str, float]:
    versions = [each.version for each in scores if each.version is not None]
    if not versions:
        return {}
    youngest = max(span.version for one in completions for span in one.versions)
    return {"teacher/version_lag": float(youngest - min(versions))}
