"""Small stand-ins for actors, and the nouns that tests hand around.

FakeHandle.call(method, ...) --> calls: what was asked;   answers[method](...) --> the answer, or the error it raises
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_ray.runtime.runtime import Role
from trl_ray.types import (
    Completion,
    FinishReason,
    GroupTicket,
    Health,
    Prompt,
    Reward,
    RolloutGroup,
    VersionSpan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call that a fake handle received."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True, kw_only=True, eq=False)
class FakeHandle:
    """An actor whose answers a test writes: a value, an exception, or a (coroutine) function of the arguments."""

    name: str = "actor-0"
    role: Role = Role.REWARD
    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Write the call down and answer it."""
        assert deadline_s > 0
        self.calls.append(Call(method=method, args=args, kwargs=kwargs))
        answer = self.answers.get(method)
        if callable(answer):
            answer = answer(*args, **kwargs)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """The answer itself stands for the answer."""
        return await self.call(method, *args, deadline_s=deadline_s, **kwargs)

    def asked(self, method: str) -> list[Call]:
        """The calls of one method."""
        return [call for call in self.calls if call.method == method]


def in_turn(*answers: Any) -> Callable[..., Any]:
    """Answers one after the other; the last one for ever."""
    left = list(answers)
    return lambda *args, **kwargs: left.pop(0) if len(left) > 1 else left[0]


async def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Wait for a state, generously."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def health(*, pid: int = 1, problem: str | None = None) -> Health:
    """What an idle actor answers."""
    return Health(pid=pid, progress=0, busy_since=None, problem=problem)


def prompt(number: int) -> Prompt:
    """A prompt of three tokens."""
    return Prompt(prompt_id=f"0:{number}", token_ids=np.array([1, 2, number], np.int32), text=f"prompt {number}")


def ticket(group_id: int, *, attempt: int = 0, version: int = 0) -> GroupTicket:
    """The right to generate a group."""
    return GroupTicket(group_id=group_id, attempt=attempt, prompt=prompt(group_id), admitted_at_version=version)


def completion(text: str = "ab", *, version: int = 0, finish: FinishReason = FinishReason.STOP) -> Completion:
    """A completion with one token per character."""
    length = len(text)
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -1.0, np.float32),
        versions=(VersionSpan(version=version, start=0, end=length),),
        finish_reason=finish,
        text=text,
    )


def reward(total: float | None) -> Reward:
    """The answer of one function named `score`."""
    return Reward(total=total, parts={"score": total})


def group(group_id: int, totals: tuple[float, ...] = (0.0, 1.0), *, version: int = 0) -> RolloutGroup:
    """A finished group with one completion of two tokens per reward."""
    return RolloutGroup(
        ticket=ticket(group_id, version=version),
        completions=tuple(completion(version=version) for _ in totals),
        rewards=tuple(reward(total) for total in totals),
        worker="rollout-0",
    )
