"""Scores groups in a sandbox, has reward models score them too, and answers probes meanwhile.

    score(prompt, completions) -┬-> Sandbox of the user's functions: one process ----------┬-> joined --> ScoredGroup
                                |   isolation=inline: in the caller's own event loop       |
                                ├-> Sandbox of what evaluates answers: a process per group |
                                └-> the copy of each reward model with least to do --------┘

What evaluates answers never shares a process with the user's functions, nor with this worker. It never retries: a
failed group is the ledger's business.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trl_ray.actors.actor_log import ActorLog
from trl_ray.actors.calling import Patience
from trl_ray.actors.pending_scores import PendingScores, ask_for_scores
from trl_ray.config.sections import Isolation
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.rewards.lone_answers import is_plain
from trl_ray.rewards.reward_registry import READ, RewardSpec, Scorer, load_function
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.sandbox_messages import Lifetime
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
    steady_time,
)


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


def homes_of(functions: Sequence[RewardSpec], isolation: Isolation) -> dict[Lifetime | None, tuple[RewardSpec, ...]]:
    """Where each function runs; None is the worker's own process."""
    users = {Isolation.INLINE: None, Isolation.PROCESS: Lifetime.RUN, Isolation.SANDBOX: Lifetime.GROUP}[isolation]
    kinds = {spec.scorer for spec in functions}
    homes: dict[Scorer, Lifetime | None] = {Scorer.EVALUATOR: Lifetime.GROUP, Scorer.USERS: users}
    # Rules cost nothing where others run already.
    alone = None if isolation is Isolation.INLINE else Lifetime.RUN_WALLED
    company = [homes[kind] for kind in (Scorer.EVALUATOR, Scorer.USERS) if kind in kinds]
    homes[Scorer.RULE] = company[0] if company else alone
    found: dict[Lifetime | None, tuple[RewardSpec, ...]] = {}
    for spec in functions:
        home = homes[spec.scorer]
        found[home] = (*found.get(home, ()), spec)
    return found


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
        homes = homes_of(self._functions, isolation)
        self._may_abstain = bool(self._models) or len(homes) > 1
        inline = homes.pop(None, ())
        self._loaded = weighted(
            [spec.name for spec in inline],
            [load_function(spec) for spec in inline],
            [self._weights[spec.name] for spec in inline],
        )
        self._told: set[Lifetime] = set()
        self._timeout_s = timeout_s
        self._scorers = [
            _FunctionCalls(specs, lifetime, self._make_sandbox) for lifetime, specs in homes.items() if lifetime
        ]

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
        scores: list[ScoredGroup] = []
        if self._functions:
            group = GroupInput.of(group_prompt, completions, raw=raw, course=self._course)
            chosen = [scorer.sandbox_for(completions) for scorer in self._scorers]
            turns = [self._score_in(sandbox, group, len(completions)) for sandbox in chosen]
            turns += [self._score_inline(group)] if self._loaded else []
            began = await asyncio.gather(*turns)
            start = min(time for time, _ in began)
            scores = [by_functions for _, by_functions in began]
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
        """Kill all sandboxes; groups under way or queued are answered with CRASH. May be called twice."""
        for scorer in self._scorers:
            scorer.close()

    def _make_sandbox(self, specs: Sequence[RewardSpec], lifetime: Lifetime) -> Sandbox:
        return Sandbox(
            functions=specs,
            weights=[self._weights[spec.name] for spec in specs],
            timeout_s=self._timeout_s,
            may_abstain=self._may_abstain,
            lifetime=lifetime,
            on_ready=functools.partial(self._tell_walls, lifetime, [spec.name for spec in specs]),
        )

    def _tell_walls(self, lifetime: Lifetime, names: Sequence[str], missing: Mapping[str, str]) -> None:
        """Say once what should stand around the functions of a sandbox, and this machine does not allow."""
        if missing and lifetime not in self._told:
            self._told.add(lifetime)
            what = "; ".join(f"{wall}: {reason}" for wall, reason in missing.items())
            detail = f"{', '.join(names)} must run out of reach of this machine, which does not allow it ({what})."
            self._log.event(EventKind.WARNING, detail=f"{detail} See SECURITY.md.")

    async def _score_in(self, sandbox: Sandbox, group: GroupInput, size: int) -> tuple[float, ScoredGroup]:
        """When the group's turn came, and what the functions say."""
        call = next(self._calls)

        def on_start() -> None:
            self._busy[call] = steady_time()

        future = sandbox.submit(group, size=size, on_start=on_start)
        try:
            scored = await asyncio.wrap_future(future)
        finally:
            began = self._busy.pop(call, steady_time())
        return began, scored

    async def _score_inline(self, group: GroupInput) -> tuple[float, ScoredGroup]:
        call = next(self._calls)
        began = self._busy[call] = steady_time()
        try:
            return began, await score_group(self._loaded, group, may_abstain=self._may_abstain)
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


class _FunctionCalls:
    """The sandbox of functions that run together.

    Where they evaluate answers, and all answers of a group are such that nothing could be called, changed or grow
    (`is_plain`), one process behind walls serves all such groups: most answers are numbers, and a process for each
    group costs some milliseconds.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        lifetime: Lifetime,
        make: Callable[[Sequence[RewardSpec], Lifetime], Sandbox],
    ) -> None:
        evaluators = [spec for spec in specs if spec.scorer is Scorer.EVALUATOR]
        self._reads = tuple(READ[name] for spec in evaluators if (name := spec.reference or "") in READ)
        has_plain = len(self._reads) == len(evaluators) and all(spec.scorer is not Scorer.USERS for spec in specs)
        self._sandbox = make(specs, lifetime)
        self._plain = make(specs, Lifetime.RUN_WALLED) if has_plain and lifetime is Lifetime.GROUP else None
        # The first group finds the child up; should it fail, that group says why.
        (self._plain or self._sandbox).begin()

    def sandbox_for(self, completions: Sequence[Completion]) -> Sandbox:
        """The one in which a group is scored."""
        if self._plain is None:
            return self._sandbox
        is_harmless = all(is_plain(read(completion.text)) for read in self._reads for completion in completions)
        return self._plain if is_harmless else self._sandbox

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Of the processes that call functions, or fork those that do."""
        return tuple(sandbox.pid for sandbox in (self._sandbox, self._plain) if sandbox is not None)

    def close(self) -> None:
        """Kill them."""
        for sandbox in (self._sandbox, self._plain):
            if sandbox is not None:
                sandbox.close()


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
