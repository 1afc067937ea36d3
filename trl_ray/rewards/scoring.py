"""Scores one group: calls every function, tells apart how each can fail, and adds up the weighted parts.

    GroupInput -- fresh arguments per function --> sync ones in order, async ones together
               -- check_values --> parts [G] by function -- combine --> ScoredGroup

Any failure of any function fails the group: a reward of 0 never stands for one that could not be computed.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_ray.algorithms.metric_merging import mean_metric
from trl_ray.rewards.functions import RewardFunction
from trl_ray.types import Completion, Prompt, Reward, RewardErrorKind, RewardFailure, ScoredGroup

RAW = frozenset({"raw_prompts", "raw_completions"})
"""Arguments with special tokens, which functions are given where one of them names one."""
# Columns that would overwrite what TRL's signature gives.
_RESERVED = RAW | {
    *("prompt", "prompts", "completion", "completions", "completion_ids", "log_extra", "log_metric", "trainer_state")
}
Parts = list[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFunction:
    """A loaded reward function and the weight of its part."""

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What functions are told of the run, under transformers' names: for rewards that follow a schedule."""

    global_step: int = 0
    """Finished steps of the weights that sampled the completions."""
    max_steps: int = 0
    """Of the whole run; 0 where nobody says."""
    epoch: float = 0.0
    num_train_epochs: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCourse:
    """How long a run is."""

    max_steps: int = 0
    steps_per_epoch: float = math.inf

    def at(self, completions: Sequence[Completion]) -> RunState:
        """The state of the run when the newest of the weights sampled."""
        step = max((span.version for each in completions for span in each.versions), default=0)
        return RunState(
            global_step=max(0, step),
            max_steps=self.max_steps,
            epoch=max(0, step) / self.steps_per_epoch,
            num_train_epochs=self.max_steps / self.steps_per_epoch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTexts:
    """A group as the model reads and writes it, special tokens and all."""

    prompt: str
    completions: tuple[str, ...]
    """[G]"""


class GroupInput:
    """What the functions see of one group, as JSON text so that each of them gets a copy of its own."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        completions: Sequence[Completion],
        *,
        raw: RawTexts | None = None,
        course: TrainingCourse | None = None,
    ) -> GroupInput:
        """Standard prompts give strings; conversational ones give conversations, as in TRL."""
        messages = None if prompt.messages is None else [dict(message) for message in prompt.messages]
        texts = [completion.text for completion in completions]
        state = (course or TrainingCourse()).at(completions)
        return cls(
            json.dumps(
                {
                    "prompt": prompt.text if messages is None else messages,
                    "completions": texts
                    if messages is None
                    else [[{"role": "assistant", "content": t}] for t in texts],
                    "completion_ids": [completion.token_ids.tolist() for completion in completions],
                    "columns": {key: value for key, value in prompt.columns.items() if key not in _RESERVED},
                    "raw": None if raw is None else asdict(raw),
                    "state": asdict(state),
                }
            )
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for one call: lists of G, shared with no other call, and the state of the run."""
        group = json.loads(self.text)
        size = len(group["completions"])
        prompts = [json.loads(json.dumps(group["prompt"])) for _ in range(size)]
        columns = {key: [json.loads(json.dumps(value)) for _ in range(size)] for key, value in group["columns"].items()}
        raw = group.get("raw")
        texts = {} if raw is None else {"raw_prompts": [raw["prompt"]] * size, "raw_completions": raw["completions"]}
        return {
            "prompts": prompts,
            "completions": group["completions"],
            "completion_ids": group["completion_ids"],
            "trainer_state": RunState(**group.get("state", {})),
            **texts,
            **columns,
        }


@dataclass(slots=True)
class Log:
    """What the functions of one group have logged."""

    size: int
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column with one value per completion."""
        if len(values) != self.size:
            raise ValueError(f"log_extra({column!r}) takes {self.size} values, one per completion, got {len(values)}")
        self.extra[str(column)] = json.loads(json.dumps(list(values), default=str))

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}) takes a finite number, got {number}")
        self.metrics.setdefault(str(name), []).append(number)


class CallFailed(Exception):
    """A function failed; carries the failure that the group gets."""

    def __init__(self, failure: RewardFailure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def _fail(function: str, kind: RewardErrorKind, detail: str) -> CallFailed:
    return CallFailed(RewardFailure(function=function, kind=kind, detail=detail))


async def score_group(
    functions: Sequence[NamedFunction],
    group: GroupInput,
    *,
    on_call: Callable[[str], None] = lambda name: None,
    on_wait: Callable[[], None] = lambda: None,
    may_abstain: bool = False,
) -> ScoredGroup:
    """Rewards of one group, or the first failure.

    Args:
        functions: called in this order; those that return an awaitable are awaited together afterwards.
        group: prompts, completions and columns.
        on_call: told the name of each function just before it is called.
        on_wait: told that all were called and some are awaited, so that other groups may begin.
        may_abstain: let all of them abstain on all completions, because others score them too (`join_scores`).
    """
    size = len(json.loads(group.text)["completions"])
    log = Log(size=size)
    try:
        returned = [_call(named, group, log, on_call) for named in functions]
        if any(inspect.isawaitable(value) for value in returned):
            on_wait()
        # A task of its own each: the first failure cancels none of the others half-way through a request.
        settled = await asyncio.gather(
            *(_settle(named, value) for named, value in zip(functions, returned, strict=True)), return_exceptions=True
        )
        for outcome in settled:
            if isinstance(outcome, BaseException):
                raise outcome
        parts = {
            named.name: check_values(named.name, value, size) for named, value in zip(functions, settled, strict=True)
        }
    except CallFailed as failed:
        return ScoredGroup(failure=failed.failure)
    return combine(functions, parts, log, may_abstain=may_abstain)


def _call(named: NamedFunction, group: GroupInput, log: Log, on_call: Callable[[str], None]) -> Any:
    on_call(named.name)
    arguments = accepted(
        named.function, {**group.arguments(), "log_extra": log.log_extra, "log_metric": log.log_metric}
    )
    try:
        return named.function(**arguments)
    except SystemExit as error:
        raise _exited(named.name, error) from error
    except Exception as error:  # user code may raise anything
        raise _raised(named.name, error) from error


async def _settle(named: NamedFunction, value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value
    awaitable: Awaitable[Any] = value
    try:
        return await awaitable
    except SystemExit as error:
        raise _exited(named.name, error) from error
    except Exception as error:  # user code may raise anything
        raise _raised(named.name, error) from error


def _exited(name: str, error: SystemExit) -> CallFailed:
    return _fail(name, RewardErrorKind.CRASH, f"{name} must return rewards, it called sys.exit with {error.code!r}.")


def _raised(name: str, error: Exception) -> CallFailed:
    frames = traceback.extract_tb(error.__traceback__)
    # Frame 0 is the call in this file, unless the call itself did not fit the function's parameters.
    place = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if len(frames) > 1 else ""
    detail = f"{name} must return rewards, it raised {type(error).__name__}: {str(error)[:500]}{place}."
    return _fail(name, RewardErrorKind.EXCEPTION, detail)


def accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function without ``**kwargs`` can take."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return arguments
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def check_values(name: str, returned: Any, size: int) -> Parts:
    """The [G] values of one function: finite numbers or None.

    Lists, tuples, arrays and tensors are taken; booleans count as 0 and 1.

    Raises:
        CallFailed: WRONG_TYPE, WRONG_LENGTH or NAN, with what was returned.
    """
    rule = f"{name} must return a list of {size} numbers or None, one per completion"
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)):
        hint = " (is a return missing?)" if returned is None else ""
        raise _fail(name, RewardErrorKind.WRONG_TYPE, f"{rule}, it returned {_show(returned)}{hint}.")
    if len(values) != size:
        raise _fail(name, RewardErrorKind.WRONG_LENGTH, f"{rule}, it returned {len(values)}: {_show(values)}.")
    parts = []
    for index, value in enumerate(values):
        number = _number(value)
        if number is not None and not isinstance(number, float):
            detail = f"{rule}, value {index} is {_show(value)}."
            raise _fail(name, RewardErrorKind.WRONG_TYPE, detail)
        if number is not None and not math.isfinite(number):
            detail = f"{rule}, value {index} is {value!r}. Return None where there is nothing to score."
            raise _fail(name, RewardErrorKind.NAN, detail)
        parts.append(number)
    return parts


def _number(value: Any) -> object:
    """`value` as a float where it is one number or boolean of any library, else unchanged."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, (bool, int, float)):
        try:
            return float(plain)
        except OverflowError:  # an int beyond any float
            return math.inf
    return plain if plain is None else (plain,)


def _show(value: object) -> str:
    return f"{type(value).__name__} {repr(value)[:200]}"


def combine(
    functions: Sequence[NamedFunction], parts: Mapping[str, Parts], log: Log, *, may_abstain: bool = False
) -> ScoredGroup:
    """Totals by completion: the weighted sum over the functions that did not abstain, None when all did.

    The group fails with NONE when every function abstained on every completion, unless they may.
    """
    weights = {named.name: named.weight for named in functions}
    rewards = []
    for index in range(log.size):
        values = {named.name: parts[named.name][index] for named in functions}
        extra = {column: column_values[index] for column, column_values in log.extra.items()}
        rewards.append(Reward(total=_total(values, weights), parts=values, extra=extra))
    metrics = {name: mean_metric(values).value for name, values in log.metrics.items()}
    scored = ScoredGroup(rewards=tuple(rewards), metrics=metrics)
    return scored if may_abstain else _unless_all_abstained(scored, names=list(weights))


def join_scores(scores: Sequence[ScoredGroup], *, weights: Mapping[str, float]) -> ScoredGroup:
    """The rewards of one group that functions and models have scored, each for itself.

    Args:
        scores: of the same completions, at least one; the first that failed is the answer.
        weights: by name of the part, all parts of all `scores`; totals are summed in this order.

    Returns:
        Rewards with the parts of all, totals as in `combine`, or NONE when nothing scored any completion.
    """
    for scored in scores:
        if scored.failure is not None:
            return scored
    rewards = []
    for of_completion in zip(*(scored.rewards for scored in scores), strict=True):
        found = {name: value for reward in of_completion for name, value in reward.parts.items()}
        parts = {name: found[name] for name in weights}
        extra = {name: value for reward in of_completion for name, value in reward.extra.items()}
        rewards.append(Reward(total=_total(parts, weights), parts=parts, extra=extra))
    metrics = {name: value for scored in scores for name, value in scored.metrics.items()}
    return _unless_all_abstained(ScoredGroup(rewards=tuple(rewards), metrics=metrics), names=list(weights))


def _total(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    scored = [weights[name] * value for name, value in parts.items() if value is not None]
    return sum(scored) if scored else None


def _unless_all_abstained(scored: ScoredGroup, *, names: Sequence[str]) -> ScoredGroup:
    if any(reward.total is not None for reward in scored.rewards):
        return scored
    who = ", ".join(names)
    detail = f"{who} must score at least one completion of a group, got None for all {len(scored.rewards)}."
    return ScoredGroup(failure=RewardFailure(function=who, kind=RewardErrorKind.NONE, detail=detail))


def weighted(
    names: Sequence[str], functions: Sequence[RewardFunction], weights: Sequence[float] | None
) -> tuple[NamedFunction, ...]:
    """Functions with their names and weights; None weighs all 1."""
    chosen = [1.0] * len(names) if weights is None else list(weights)
    return tuple(
        NamedFunction(name=name, function=function, weight=weight)
        for name, function, weight in zip(names, functions, chosen, strict=True)
    )
