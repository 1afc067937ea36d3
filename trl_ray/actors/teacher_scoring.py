"""Who computes what a teacher actor says: a model on one thread in joined passes, or an engine or server that is asked.

JoinedScoring   score --> waiting calls --equal questions together--> passes on the one thread --> answers
                              ^ join while a pass runs                 '-- `alone`: weights change between two batches
AskedScoring    score --> a thread per call --> engine (batches by itself) or server (HTTP) --> answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch

from trl_ray.errors import EngineError, InputError, RunError, TeacherError
from trl_ray.types import Span, TeacherQuestion, TeacherRequest, TeacherScores, steady_time

ResultT = TypeVar("ResultT")
Ask: TypeAlias = Callable[[Sequence[TeacherRequest], TeacherQuestion], list[TeacherScores]]


class Scoring(Protocol):
    """Computes scores and says how it is."""

    @property
    def busy_since(self) -> float | None:
        """When the oldest work under way began, in seconds since the epoch; None while idle."""
        ...

    @property
    def progress(self) -> int:
        """Calls answered, and other work done."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the actor must be replaced; None while it works."""
        ...

    async def score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """Scores in the order of the requests, all of one version of the weights.

        Raises:
            ConfigError: such a question cannot be answered.
            DataError: a request cannot be read.
            TeacherError: the computation failed or hung.
        """
        ...

    def spans(self) -> list[Span]:
        """When it was at work since the last call."""
        ...

    def close(self) -> None:
        """Stop; calls under way are not answered. May be called twice."""
        ...


class PassScorer(Protocol):
    """A model as `JoinedScoring` sees it (`models.teacher_model.TeacherModel`)."""

    def check(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """Refuse, by InputError, what cannot be computed."""
        ...

    def passes(self, requests: Sequence[TeacherRequest]) -> list[list[int]]:
        """Places of the requests, forward pass by forward pass."""
        ...

    def forward(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """One forward pass."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One call on its way."""

    requests: tuple[TeacherRequest, ...]
    question: TeacherQuestion
    answer: asyncio.Future[list[TeacherScores]]

    @property
    def kind(self) -> tuple[TeacherQuestion, int]:
        """What calls in one pass have in common: question, and number of given tokens."""
        support = self.requests[0].support_ids
        return self.question, 0 if support is None else support.shape[1]

    @property
    def num_tokens(self) -> int:
        return sum(len(request.prompt_ids) + len(request.completion_ids) for request in self.requests)


class JoinedScoring:
    """One model on one thread.

    Calls that come while a pass runs wait, and are joined into the next one where their questions are equal. A batch is
    a call, or as many as fit into one pass together; the weights stay as they are until it is answered.

    Args:
        scorer: the model.
        actor: name of the actor, for spans and threads.
        teacher: its own, for messages.
        max_tokens: of the calls that are joined.
        timeout_s: for one forward pass, after which the actor has a problem.
    """

    def __init__(self, scorer: PassScorer, *, actor: str, teacher: str, max_tokens: int, timeout_s: float) -> None:
        self._scorer, self._actor, self._teacher = scorer, actor, teacher
        self._max_tokens, self._timeout_s = max_tokens, timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=actor)
        self._waiting: list[_Call] = []
        self._work_task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._problem: str | None = None
        self._spans: list[Span] = []
        self.busy_since: float | None = None
        self.progress = 0

    @property
    def problem(self) -> str | None:
        return self._problem

    async def score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """See `Scoring`.

        consumes: one call; produces: its scores; waits for: batches and changes of weights under way; unblocked by:
        their end, or the deadline of a pass. Once a pass has hung, calls that wait are not answered: the actor is about
        to be replaced.
        """
        self._scorer.check(requests, question)
        loop = asyncio.get_running_loop()
        call = _Call(requests=tuple(requests), question=question, answer=loop.create_future())
        self._waiting.append(call)
        if self._work_task is None or self._work_task.done():
            self._work_task = loop.create_task(self._work(), name=f"{self._actor} work")
        return await call.answer

    async def alone(self, work: Callable[[], ResultT], *, name: str) -> ResultT:
        """Do something on the thread while no batch is under way.

        consumes: `work`; produces: its result; waits for: the batch at hand; unblocked by: its end, or the deadline of
        a pass.

        Raises:
            EngineError: a pass has hung.
        """
        async with self._turn:
            if self._problem is not None:
                raise EngineError(f"{self._actor} must be replaced before it can {name}: {self._problem}")
            self.busy_since = begin = steady_time()
            try:
                result = await asyncio.wrap_future(self._thread.submit(work))
            finally:
                self._rest(name, begin)
        self.progress += 1
        return result

    def give_up(self, problem: str) -> None:
        """Answer nobody any more."""
        self._problem = self._problem or problem

    def spans(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans

    def close(self) -> None:
        if self._work_task is not None:
            self._work_task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Answer whoever waits.

        consumes: waiting calls; produces: their answers; waits for: forward passes, and changes of weights; unblocked
        by: their end, or `timeout_s`.
        """
        while self._waiting and self._problem is None:
            async with self._turn:
                calls = self._next() if self._problem is None else []
                if not calls:
                    continue
                self.busy_since = begin = steady_time()
                try:
                    await self._answer(calls)
                finally:
                    self._rest("score", begin)

    def _rest(self, name: str, begin: float) -> None:
        self.busy_since = None
        self._spans.append(Span(actor=self._actor, name=name, start=begin, end=steady_time()))

    def _next(self) -> list[_Call]:
        """The oldest call, and those with an equal question that fit beside it; whoever has given up is forgotten."""
        alive = [call for call in self._waiting if not call.answer.done()]
        calls: list[_Call] = []
        tokens = 0
        for call in alive:
            if not calls or (call.kind == calls[0].kind and tokens + call.num_tokens <= self._max_tokens):
                calls.append(call)
                tokens += call.num_tokens
        self._waiting = [call for call in alive if call not in calls]
        return calls

    async def _answer(self, calls: Sequence[_Call]) -> None:
        requests = [request for call in calls for request in call.requests]
        try:
            scores = await self._score(requests, calls[0].question)
        except (RunError, InputError) as error:
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error)
            return
        for call in calls:
            own, scores = scores[: len(call.requests)], scores[len(call.requests) :]
            if not call.answer.done():
                call.answer.set_result(own)
            self.progress += 1

    async def _score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        found: dict[int, TeacherScores] = {}
        for places in self._scorer.passes(requests):
            asked = [requests[place] for place in places]
            scores = await self._forward(asked, question)
            found |= dict(zip(places, scores, strict=True))
        return [found[place] for place in range(len(requests))]

    async def _forward(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        running = asyncio.wrap_future(self._thread.submit(self._pass, requests, question))
        done, _ = await asyncio.wait([running], timeout=self._timeout_s)
        if not done:
            self._problem = (
                f"teacher {self._teacher} must finish a forward pass within {self._timeout_s:g} s (timeout_s), it did "
                "not."
            )
            raise TeacherError(self._problem)
        return running.result()

    def _pass(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        try:
            return self._scorer.forward(requests, question)
        except Exception as error:  # a model's own code may raise anything
            # A CUDA context that met an error answers nothing but errors.
            if isinstance(error, torch.AcceleratorError):
                self.give_up(self._explain(error, requests))
            raise TeacherError(self._explain(error, requests)) from error

    def _explain(self, error: Exception, requests: Sequence[TeacherRequest]) -> str:
        longest = max(len(request.prompt_ids) + len(request.completion_ids) for request in requests)
        detail = (
            f"teacher {self._teacher} must score {len(requests)} completions of up to {longest} tokens with their "
            f"contexts, it raised {type(error).__name__}: {str(error)[:500]}."
        )
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            detail += " Lower max_tokens_per_batch of the teacher, or max_completion_length."
        return detail


class AskedScoring:
    """An engine or a server, which batches by itself and bounds its own waiting.

    Args:
        ask: gives scores; called from several threads at once.
        actor: name of the actor, for spans and threads.
        threads: calls under way at once; further ones wait.
        broken: why `ask` will never answer again, or None.
        stop: ends what answers.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        actor: str,
        threads: int,
        broken: Callable[[], str | None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._ask, self._actor, self._broken, self._stop = ask, actor, broken, stop
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=actor)
        self._begun: dict[int, float] = {}
        self._count = 0
        self._spans: list[Span] = []
        self.progress = 0

    @property
    def busy_since(self) -> float | None:
        return min(self._begun.values(), default=None)

    @property
    def problem(self) -> str | None:
        return self._broken()

    async def score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """See `Scoring`.

        consumes: one call; produces: its scores; waits for: a thread, then whoever is asked; unblocked by: the answer,
        or the deadlines of engine and client.
        """
        key, begin = self._count, steady_time()
        self._count += 1
        self._begun[key] = begin
        try:
            scores = await asyncio.wrap_future(self._threads.submit(self._ask, tuple(requests), question))
        except TeacherError:
            raise
        except RunError as error:
            raise TeacherError(str(error)) from error
        finally:
            del self._begun[key]
            self._spans.append(Span(actor=self._actor, name="score", start=begin, end=steady_time()))
        self.progress += 1
        return scores

    def spans(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._stop()
