"""Scores groups in a sandbox, has reward models score them too, and answers probes meanwhile.

    score(prompt, completions) -┬-> Sandbox: its turn, then a child process ---------┬-> joined --> ScoredGroup
                                |   isolation=inline: in the caller's own event loop |
                                └-> the copy of each reward model with least to do --┘

It never retries: a failed group is the ledger's business.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from trl_ray.actors.actor_log import ActorLog
from trl_ray.actors.calling import Patience
from trl_ray.actors.pending_scores import PendingScores, ask_for_scores
from trl_ray.config.sections import Isolation
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.rewards.reward_registry import RewardSpec, load_function
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.scoring import GroupInput, RawTexts, TrainingCourse, join_scores, score_group, weighted
from trl_ray.types import (
    ActorReport,
    Completion,
    EventKind,
    Handle,
    Health,
    Prompt,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
)
from trl_ray.types.clock import steady_time


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringModel:
    """A reward model as reward workers know it."""

    name: str
    """Of its part of the reward."""
    weight: float
    handles: tuple[Handle, ...]
    """Its copies."""
    deadline_s: float
    """For a copy that answers nothing, as one that is being restarted; not for waiting behind other groups."""


class RewardWorker:
    """Rewards of whole groups by the functions and reward models of a run.

    Calls to `score` may overlap: each has its own `timeout_s` from when its turn comes, and while the async functions
    of some groups are awaited, others begin.
    """

    def __init__(
        self,
        *,
        functions: Sequence[RewardSpec],
        weights: Sequence[float] | None,
        timeout_s: float,
        isolation: Isolation,
        name: str,
        models: Sequence[ScoringModel] = (),
        course: TrainingCourse | None = None,
    ) -> None:
        self.name, self._course = name, course
        self._functions = tuple(functions)
        names = [spec.name for spec in self._functions]
        self._weights = dict(zip(names, [1.0] * len(names) if weights is None else weights, strict=True))
        self._weights |= {model.name: model.weight for model in models}
        self._models = tuple(_ModelCalls(model) for model in models)
        self._progress = 0
        self._busy: dict[int, float] = {}
        self._calls = itertools.count()
        self._pending = PendingScores()
        self._log = ActorLog(name)
        self._inline = isolation is Isolation.INLINE
        self._sandbox = Sandbox(
            functions=functions, weights=weights, timeout_s=timeout_s, may_abstain=bool(self._models)
        )
        if self._inline:
            loaded = [load_function(spec) for spec in self._functions]
            self._loaded = weighted(names, loaded, weights)
        elif self._functions:
            # The first group finds the child up; should it fail, that group says why.
            self._sandbox.begin()

    async def score(
        self,
        group_prompt: Prompt,
        completions: Sequence[Completion],
        *,
        raw: RawTexts | None = None,
        key: str | None = None,
        wait_s: float = 0.0,
    ) -> ScoredGroup | None:
        """Rewards of the G completions of one prompt, or the failure that explains why there are none.

        `raw` is for functions that ask for special tokens. With a `key` it answers None after `wait_s`, to be asked
        again; without, it answers when the group is scored.

        consumes: one group; produces: one ScoredGroup; waits for: the groups before it, the functions and the reward
        models; unblocked by: their return, or their deadline.
        """
        if key is None:
            return await self._score(group_prompt, completions, raw)
        return await self._pending.get(key, lambda: self._score(group_prompt, completions, raw), wait_s=wait_s)

    async def _score(
        self, group_prompt: Prompt, completions: Sequence[Completion], raw: RawTexts | None
    ) -> ScoredGroup:
        start = steady_time()
        rated = asyncio.gather(*(model.score(group_prompt, completions) for model in self._models))
        scores = []
        if self._functions:
            group = GroupInput.of(group_prompt, completions, raw=raw, course=self._course)
            start, by_functions = await self._score_by_functions(group, len(completions))
            scores.append(by_functions)
        scored = join_scores([*scores, *await rated], weights=self._weights)
        self._log.span("score", start)
        self._progress += 1
        if scored.failure is not None:
            self._record(scored.failure, group_prompt)
        return scored

    def health(self) -> Health:
        """Answered from the caller's thread, whatever the functions do."""
        return Health(pid=os.getpid(), progress=self._progress, busy_since=min(self._busy.values(), default=None))

    def drain(self) -> ActorReport:
        """Spans and failures since the last call."""
        return self._log.drain()

    def close(self) -> None:
        """Kill the sandbox; groups under way or queued are answered with CRASH. May be called twice."""
        self._sandbox.close()

    async def _score_by_functions(self, group: GroupInput, size: int) -> tuple[float, ScoredGroup]:
        """When the group's turn came, and what the functions say."""
        if self._inline:
            return steady_time(), await self._score_inline(group)
        call = next(self._calls)

        def on_start() -> None:
            self._busy[call] = steady_time()

        future = self._sandbox.submit(group, size=size, on_start=on_start)
        try:
            scored = await asyncio.wrap_future(future)
        finally:
            began = self._busy.pop(call, steady_time())
        return began, scored

    async def _score_inline(self, group: GroupInput) -> ScoredGroup:
        call = next(self._calls)
        self._busy[call] = steady_time()
        try:
            return await score_group(self._loaded, group, may_abstain=bool(self._models))
        finally:
            del self._busy[call]

    def _record(self, failure: RewardFailure, prompt: Prompt) -> None:
        detail = {
            "function": failure.function,
            "kind": failure.kind.value,
            "detail": failure.detail,
            "prompt_id": prompt.prompt_id,
            **({"is_final": True} if failure.is_final else {}),
        }
        self._log.event(EventKind.REWARD_FAILED, **detail)


class _ModelCalls:
    """The copies of one reward model, and how many groups each has at hand."""

    def __init__(self, model: ScoringModel) -> None:
        self._model = model
        self._scoring = [0] * len(model.handles)

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        """Rewards by the copy with the least to do, waiting out its restart if need be.

        consumes: one group; produces: its rewards or a failure; waits for: the copy; unblocked by: its answer, or the
        deadline of a copy that answers nothing.
        """
        model = self._model
        index = min(range(len(model.handles)), key=self._scoring.__getitem__)
        handle = model.handles[index]
        self._scoring[index] += 1
        patience = Patience(deadline_s=model.deadline_s, total_s=model.deadline_s)
        try:
            scored = await ask_for_scores(handle, prompt, completions, key=uuid.uuid4().hex, patience=patience)
        except DeadlineError:
            detail = f"{model.name} must answer within {model.deadline_s:g} s, {handle.name} did not."
            scored = self._failed(RewardErrorKind.TIMEOUT, detail)
        except ActorLostError as error:
            detail = f"{model.name} must come back within {model.deadline_s:g} s, it did not: {error}"
            scored = self._failed(RewardErrorKind.CRASH, detail)
        finally:
            self._scoring[index] -= 1
        return scored

    def _failed(self, kind: RewardErrorKind, detail: str) -> ScoredGroup:
        return ScoredGroup(failure=RewardFailure(function=self._model.name, kind=kind, detail=detail))
