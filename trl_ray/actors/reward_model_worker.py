"""Rates groups with a reward model: texts are encoded, sorted by length and read in forward passes on a thread.

    score(prompt, completions) --> waiting groups --> encode --> passes of similar lengths --> ScoredGroup
                                        ^ join while a pass runs (join_groups)

It never retries: a failed group is the ledger's business. The weights are read by the constructor, so that an actor
that was restarted is as it was.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trl_ray.actors.actor_log import ActorLog
from trl_ray.actors.pending_scores import PendingScores
from trl_ray.config.reward_model_options import RewardModelKind, RewardModelOptions
from trl_ray.data.prompts.reward_inputs import RatedText, ReadingRules, RewardReader
from trl_ray.errors import ModelError
from trl_ray.models.scoring.reward_model import RewardModel, RewardModelFacts, find_reward_model, load_reward_model
from trl_ray.types import (
    ActorReport,
    Completion,
    EventKind,
    Health,
    Prompt,
    Reward,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
    steady_time,
)


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """One group on its way."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    answer: asyncio.Future[ScoredGroup]
    texts: tuple[RatedText, ...] = ()
    values: dict[int, float | None] = field(default_factory=dict)
    """By number of the completion."""
    failure: RewardFailure | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One completion in a forward pass."""

    group: _Group
    index: int

    @property
    def text(self) -> RatedText:
        return self.group.texts[self.index]


def open_reader(
    options: RewardModelOptions, facts: RewardModelFacts, *, template_kwargs: Mapping[str, Any]
) -> RewardReader:
    """What turns completions into what the model reads.

    Raises:
        ConfigError: its tokenizer makes no token of the step separator.
    """
    rules = ReadingRules(
        kind=facts.kind,
        append_eos=options.append_eos,
        step_format=options.step_format,
        step_separator=options.step_separator,
        max_length=facts.max_length,
        template_kwargs=template_kwargs,
    )
    return RewardReader(facts.tokenizer, rules)


class RewardModelWorker:
    """One copy of a reward model.

    Calls to `score` may overlap. With `join_groups`, groups that wait while a pass runs are rated together afterwards;
    else one after the other, which makes a group's rewards independent of who else was there.
    """

    def __init__(
        self, *, name: str, options: RewardModelOptions, template_kwargs: Mapping[str, Any], join_groups: bool
    ) -> None:
        """Load the model; takes as long as reading its weights does.

        Raises:
            ModelError: it cannot be loaded.
        """
        self.name = name
        self._label, self._options, self._join_groups = options.label, options, join_groups
        facts = find_reward_model(options)
        self._reader = open_reader(options, facts, template_kwargs=template_kwargs)
        self._in_steps = facts.kind is RewardModelKind.STEPS
        self._max_length = facts.max_length
        self._model = self._load(facts)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._waiting: list[_Group] = []
        self._work_task: asyncio.Task[None] | None = None
        self._progress = 0
        self._busy_since: float | None = None
        self._problem: str | None = None
        self._told_of_cuts = False
        self._pending = PendingScores()
        self._log = ActorLog(name)

    def _load(self, facts: RewardModelFacts) -> RewardModel:
        on_gpu = self._options.num_gpus > 0
        if on_gpu and not torch.cuda.is_available():
            raise ModelError(
                f"reward model {self._label}: num_gpus={self._options.num_gpus:g} needs a GPU, and there is none here. "
                "Set num_gpus=0."
            )
        return load_reward_model(self._options, facts, device="cuda" if on_gpu else "cpu")

    async def score(
        self, group_prompt: Prompt, completions: Sequence[Completion], *, key: str | None = None, wait_s: float = 0.0
    ) -> ScoredGroup | None:
        """Rewards of the G completions of one prompt, or the failure that explains why there are none.

        The one part of each reward is named as the model; it is None for a solution without steps. With a `key` it
        answers None after `wait_s`, to be asked again.

        consumes: one group; produces: one ScoredGroup; waits for: passes under way; unblocked by: their end, or their
        deadline.
        """
        if key is None:
            return await self._score(group_prompt, completions)
        return await self._pending.get(key, lambda: self._score(group_prompt, completions), wait_s=wait_s)

    async def _score(self, group_prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        loop = asyncio.get_running_loop()
        group = _Group(prompt=group_prompt, completions=tuple(completions), answer=loop.create_future())
        self._waiting.append(group)
        if self._work_task is None or self._work_task.done():
            self._work_task = loop.create_task(self._work(), name=f"{self.name} work")
        return await group.answer

    def health(self) -> Health:
        """Answered while a pass runs; a pass that hangs is a problem."""
        return Health(pid=os.getpid(), progress=self._progress, busy_since=self._busy_since, problem=self._problem)

    def drain(self) -> ActorReport:
        """Spans and warnings since the last call."""
        return self._log.drain()

    def close(self) -> None:
        """Stop; groups under way are not answered. May be called twice."""
        if self._work_task is not None:
            self._work_task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Rate whoever waits.

        consumes: waiting groups; produces: their answers; waits for: forward passes; unblocked by: their end or
        `timeout_s`. After a pass that hung it answers nobody: the actor is about to be replaced.
        """
        while self._waiting and not self._is_broken():
            many = len(self._waiting) if self._join_groups else 1
            groups, self._waiting = self._waiting[:many], self._waiting[many:]
            self._busy_since = begin = steady_time()
            await self._rate(groups)
            self._busy_since = None
            self._log.span("score", begin)
            for group in groups:
                if not group.answer.done() and (group.failure is not None or not self._is_broken()):
                    group.answer.set_result(self._scored(group))
                    self._progress += 1

    def _is_broken(self) -> bool:
        return self._problem is not None

    async def _rate(self, groups: Sequence[_Group]) -> None:
        await self._on_thread(self._encode, groups)
        rows = [
            _Row(group=group, index=index)
            for group in groups
            if group.failure is None
            for index in range(len(group.completions))
        ]
        for rows_of_pass in self._passes(rows):
            alive = [row for row in rows_of_pass if row.group.failure is None]
            if not alive:
                continue
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    await self._on_thread(self._forward, alive)
            except TimeoutError:
                detail = f"{self._label} must finish a forward pass within {self._options.timeout_s:g} s, it did not."
                self._problem = detail
                for row in alive:
                    row.group.failure = self._failure(RewardErrorKind.TIMEOUT, detail)
                return

    async def _on_thread(self, work: Any, argument: Any) -> None:
        await asyncio.wrap_future(self._thread.submit(work, argument))

    def _encode(self, groups: Sequence[_Group]) -> None:
        for group in groups:
            try:
                group.texts = tuple(self._reader.read(group.prompt, completion) for completion in group.completions)
            except Exception as error:  # a tokenizer's or a template's own code may raise anything
                detail = f"{self._label} must read its texts, but: {type(error).__name__}: {str(error)[:500]}"
                group.failure = self._failure(RewardErrorKind.EXCEPTION, detail)

    def _passes(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        """Rows of similar lengths together, the longest first: what does not fit into memory fails at once."""
        passes: list[list[_Row]] = []
        for row in sorted(rows, key=lambda row: -len(row.text.token_ids)):
            if not passes or self._is_full(passes[-1]):
                passes.append([])
            passes[-1].append(row)
        return passes

    def _is_full(self, rows: Sequence[_Row]) -> bool:
        """Whether one more row is too much; the first is the longest."""
        limit, tokens = self._options.max_tokens_per_forward, len(rows[0].text.token_ids) * (len(rows) + 1)
        return len(rows) == self._options.batch_size or (limit is not None and tokens > limit)

    def _forward(self, rows: Sequence[_Row]) -> None:
        try:
            values = self._model.rate([row.text.token_ids for row in rows], [row.text.positions for row in rows])
        except Exception as error:  # a model's own code may raise anything
            failure = self._failure(RewardErrorKind.EXCEPTION, self._explain(error, rows))
            for row in rows:
                row.group.failure = failure
            # A CUDA context that met an error answers nothing but errors.
            if isinstance(error, torch.AcceleratorError):
                self._problem = failure.detail
            return
        for row, value in zip(rows, values, strict=True):
            row.group.values[row.index] = value

    def _explain(self, error: Exception, rows: Sequence[_Row]) -> str:
        shape = f"{len(rows)} completions of up to {max(len(row.text.token_ids) for row in rows)} tokens"
        detail = f"{self._label} must rate {shape}, it raised {type(error).__name__}: {str(error)[:500]}."
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            detail += " Lower batch_size, max_tokens_per_forward or max_length of the reward model."
        return detail

    def _scored(self, group: _Group) -> ScoredGroup:
        if group.failure is not None:
            return ScoredGroup(failure=group.failure)
        values = [group.values[index] for index in range(len(group.completions))]
        for index, value in enumerate(values):
            if value is not None and not np.isfinite(value):
                detail = f"{self._label} must give finite rewards, completion {index} got {value}."
                return ScoredGroup(failure=self._failure(RewardErrorKind.NAN, detail))
        self._tell_of_cuts(group)
        rewards = tuple(Reward(total=value, parts={self._label: value}) for value in values)
        return ScoredGroup(rewards=rewards, metrics=self._metrics(group))

    def _metrics(self, group: _Group) -> dict[str, float]:
        size = max(1, len(group.texts))
        metrics = {f"reward/{self._label}/truncated_fraction": sum(text.num_cut > 0 for text in group.texts) / size}
        if self._in_steps:
            metrics[f"reward/{self._label}/steps"] = sum(len(text.positions) for text in group.texts) / size
        return metrics

    def _tell_of_cuts(self, group: _Group) -> None:
        cut = max((text.num_cut for text in group.texts), default=0)
        if not cut or self._told_of_cuts:
            return
        self._told_of_cuts = True
        detail = (
            f"{self._label} reads the last {self._max_length} tokens, and a completion with its prompt has "
            f"{self._max_length or 0} + {cut}: the beginning is cut off. reward/{self._label}/truncated_fraction tells "
            "how often. Shorten prompts or completions, or raise max_length."
        )
        self._log.event(EventKind.WARNING, detail=detail)

    def _failure(self, kind: RewardErrorKind, detail: str) -> RewardFailure:
        return RewardFailure(function=self._label, kind=kind, detail=detail)
