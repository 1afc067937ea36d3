"""Scores groups in a sandbox, one after the other, and answers probes meanwhile.

    score(prompt, completions) --> queue of one thread --> Sandbox (child process) --> ScoredGroup
                                   isolation=inline: in the caller's own event loop, for a debugger

It never retries: a failed group is the ledger's business.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from trl_ray.config.sections import Isolation
from trl_ray.rewards.registry import RewardSpec, load_function
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.scoring import GroupInput, score_group, weighted
from trl_ray.types import ActorReport, Completion, Event, EventKind, Health, Prompt, RewardFailure, ScoredGroup, Span


class RewardWorker:
    """Rewards of whole groups by the functions of a run.

    Calls to `score` may overlap: they queue, and each has its own `timeout_s` from when its turn comes.
    """

    def __init__(
        self,
        *,
        functions: Sequence[RewardSpec],
        weights: Sequence[float] | None,
        timeout_s: float,
        isolation: Isolation,
        name: str,
    ) -> None:
        self.name = name
        self._functions = tuple(functions)
        self._weights = weights
        self._progress = 0
        self._busy: dict[int, float] = {}
        self._calls = itertools.count()
        self._events: list[Event] = []
        self._spans: list[Span] = []
        self._inline = isolation is Isolation.INLINE
        self._sandbox = Sandbox(functions=functions, weights=weights, timeout_s=timeout_s)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        if self._inline:
            loaded = [load_function(spec) for spec in self._functions]
            self._loaded = weighted([spec.name for spec in self._functions], loaded, weights)
        else:
            # The first group finds the child up; should it fail, that group says why.
            self._thread.submit(self._sandbox.start)

    async def score(self, group_prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        """Rewards of the G completions of one prompt, or the failure that explains why there are none.

        consumes: one group; produces: one ScoredGroup; waits for: the groups before it and the functions;
        unblocked by: their return, or their deadline.
        """
        group = GroupInput.of(group_prompt, completions)
        if self._inline:
            start, scored = time.time(), await self._score_inline(group)
        else:
            start, scored = await asyncio.wrap_future(
                self._thread.submit(self._score_in_sandbox, group, len(completions))
            )
        self._spans.append(Span(actor=self.name, name="score", start=start, end=time.time()))
        self._progress += 1
        if scored.failure is not None:
            self._record(scored.failure, group_prompt)
        return scored

    def health(self) -> Health:
        """Answered from the caller's thread, whatever the functions do."""
        return Health(pid=os.getpid(), progress=self._progress, busy_since=min(self._busy.values(), default=None))

    def drain(self) -> ActorReport:
        """Spans and failures since the last call."""
        events, self._events = self._events, []
        spans, self._spans = self._spans, []
        return ActorReport(events=events, spans=spans)

    def close(self) -> None:
        """Kill the sandbox; groups under way or queued are answered with CRASH. May be called twice."""
        self._sandbox.close()
        self._thread.shutdown(wait=False)

    def _score_in_sandbox(self, group: GroupInput, size: int) -> tuple[float, ScoredGroup]:
        call, start = next(self._calls), time.time()
        self._busy[call] = start
        try:
            return start, self._sandbox.score(group, size=size)
        finally:
            del self._busy[call]

    async def _score_inline(self, group: GroupInput) -> ScoredGroup:
        call = next(self._calls)
        self._busy[call] = time.time()
        try:
            return await score_group(self._loaded, group)
        finally:
            del self._busy[call]

    def _record(self, failure: RewardFailure, prompt: Prompt) -> None:
        detail = {
            "function": failure.function,
            "kind": failure.kind.value,
            "detail": failure.detail,
            "prompt_id": prompt.prompt_id,
        }
        self._events.append(Event(kind=EventKind.REWARD_FAILED, actor=self.name, time=time.time(), detail=detail))
