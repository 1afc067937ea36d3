"""Finds the function behind a name, so that a config can say it and a child process can load it.

"arithmetic" | "soft_overlong(...)" | "package.module:function" | "file.py:function" | a callable
    -- make_spec (driver: everything is tried once) --> RewardSpec -- load_function (child) --> callable
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib.util
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle

from trl_ray.config.messages import nearest
from trl_ray.config.object_paths import find_object
from trl_ray.config.trl_options.reward_names import read_reward_names
from trl_ray.errors import ConfigError
from trl_ray.rewards import functions, mathematics
from trl_ray.rewards.functions import RewardFunction
from trl_ray.rewards.scoring import RAW

REGISTERED: Mapping[str, RewardFunction] = {
    "accuracy_reward": mathematics.accuracy_reward,
    "arithmetic": functions.arithmetic,
    "exact_answer": functions.exact_answer,
    "last_number": functions.last_number,
    "reasoning_accuracy_reward": mathematics.reasoning_accuracy_reward,
    "reasoning_gym": functions.reasoning_gym,
    "think_format": functions.think_format,
}
FACTORIES: Mapping[str, Callable[..., RewardFunction]] = {
    "cosine_scaled_reward": mathematics.cosine_scaled_reward,
    "soft_overlong": functions.soft_overlong,
}

RowCheck = Callable[[Mapping[str, Any]], str | None]
"""Says what is wrong with the columns of a row; None where nothing is."""
_CHECKS: Mapping[str, RowCheck] = {
    "arithmetic": functions.answer_problem,
    "last_number": functions.answer_problem,
    "reasoning_gym": functions.task_problem,
}
"""Functions that cannot score every value of their columns."""

PREPARATIONS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {"reasoning_gym": functions.load_scorer}
"""What functions load for a row before they see a completion."""

READ: Mapping[str, Callable[[Any], str]] = {"reasoning_gym": functions.answer_of}
"""What functions that evaluate answers read of a completion, where that is not all of it."""

GIVEN_ALWAYS = RAW | {"prompts", "completions", "completion_ids", "log_extra", "log_metric", "trainer_state"}
_MATHEMATICS = frozenset({"trl.rewards.accuracy_rewards", mathematics.__name__})
_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


class Scorer(enum.StrEnum):
    """What a reward function does with completions, which says where it runs (sandbox_child.py)."""

    USERS = "users"
    """The user's own code: may keep models and caches, and talk to servers."""
    RULE = "rule"
    """Of this package or TRL: looks at text."""
    EVALUATOR = "evaluator"
    """Of this package or TRL: evaluates what a model wrote as an expression, each completion for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """A reward function in a form that travels: a reference to look up, or the pickled callable itself.

    `pickled` only ever holds a callable that the user's own program passed to this package. It is unpickled where
    rewards are computed; nothing that was read from a dataset, a model or the network may be put here.
    """

    name: str
    """Names its metrics and appears in errors."""
    reference: str | None = None
    pickled: bytes | None = None
    scorer: Scorer = Scorer.USERS


def make_spec(function: str | Callable[..., Any]) -> RewardSpec:
    """The travelling form of a reward function, after loading it once to see that it can be.

    Raises:
        ConfigError: no such name, module, file or function, not callable, or cannot be pickled.
    """
    if isinstance(function, str):
        [function] = [function] if ":" in function else read_reward_names([function])
        loaded = resolve(function)
        _require_package(loaded)
        name = function if function in REGISTERED else getattr(loaded, "__name__", function)
        return RewardSpec(name=name, reference=function, scorer=scorer_of(loaded))
    if inspect.isclass(function) or not callable(function):
        raise ConfigError(
            f"A reward function must be a function or a name, got {function!r}. Pass a function "
            "f(prompts, completions, completion_ids, **columns) -> list of numbers."
        )
    _require_package(function)
    name = function_name(function)
    try:
        pickled = cloudpickle.dumps(function)
    except (TypeError, AttributeError, ValueError, ImportError, RecursionError) as error:
        raise ConfigError(
            f"Reward function {name} must be picklable because it runs in a process of its own, but: {error}. "
            "Create locks, clients and models inside the function, not around it."
        ) from error
    return RewardSpec(name=name, pickled=pickled, scorer=scorer_of(function))


def scorer_of(function: Callable[..., Any]) -> Scorer:
    """What a function does, told from where it was written."""
    function = _innermost(function)
    # functools.wraps copies the name of the module, too.
    home = "" if hasattr(function, "__wrapped__") else str(getattr(function, "__module__", ""))
    if function is functions.reasoning_gym or home in _MATHEMATICS:
        return Scorer.EVALUATOR
    is_ours = home == functions.__name__ or home == "trl.rewards" or home.startswith("trl.rewards.")
    return Scorer.RULE if is_ours else Scorer.USERS


def _require_package(function: Callable[..., Any]) -> None:
    """Functions for mathematics, TRL's too, ask for another package only when they are called: at the first reward."""
    if not _is_mathematics(function) or importlib.util.find_spec("math_verify") is not None:
        return
    raise ConfigError(
        f"Reward function {function_name(function)} needs the package {mathematics.NEEDS}, which is not installed. pip "
        f"install {mathematics.NEEDS} (or trl-ray[math]), or take another reward function."
    )


def function_name(function: Callable[..., Any]) -> str:
    """What the part of a function is called: its own name, that of what a partial calls, or that of its class."""
    function = _innermost(function)
    return str(getattr(function, "__name__", type(function).__name__))


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a partial calls at last; another function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_mathematics(function: Callable[..., Any]) -> bool:
    return getattr(_innermost(function), "__module__", None) in _MATHEMATICS


def _told_apart(given: Sequence[str | Callable[..., Any]], specs: Sequence[RewardSpec]) -> tuple[RewardSpec, ...]:
    """Functions of one name get numbers, those that were given as objects: nobody chose the name of a lambda."""
    used, apart = {spec.name for spec in specs}, []
    seen: set[str] = set()
    for function, spec in zip(given, specs, strict=True):
        name = spec.name
        if name in seen and not isinstance(function, str):
            name = next(other for number in itertools.count(2) if (other := f"{name}_{number}") not in used | seen)
        seen.add(name)
        apart.append(replace(spec, name=name))
    return tuple(apart)


def make_specs(given: Sequence[str | Callable[..., Any]], *, columns: Collection[str]) -> tuple[RewardSpec, ...]:
    """The specs of all reward functions, with unique names, each checked against the dataset's columns.

    Raises:
        ConfigError: as `make_spec`, no function at all, two of one name, or one that asks for a column that is absent.
    """
    if not given:
        raise ConfigError(
            "reward_funcs must name at least one function, or reward_models a model, got none. Known functions: "
            f"{', '.join(known_names())}."
        )
    specs = _told_apart(given, [make_spec(function) for function in given])
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"Reward functions must have different names, {', '.join(twice)} appears twice. Rename one.")
    for spec in specs:
        _check_columns(spec, columns)
    return specs


def row_check(given: Sequence[str | Callable[..., Any]]) -> RowCheck:
    """What all reward functions that are known here ask of a row's columns, as one check for every row."""
    checks = {name: _CHECKS[name] for name in given if isinstance(name, str) and name in _CHECKS}

    def check(columns: Mapping[str, Any]) -> str | None:
        for name, problem_of in checks.items():
            # A column that no row has is told by the columns alone.
            problem = problem_of(columns) if required_columns(REGISTERED[name]) <= set(columns) else None
            if problem is not None:
                return f"{problem} The reward function {name} asks for it."
        return None

    return check


def _check_columns(spec: RewardSpec, columns: Collection[str]) -> None:
    missing = required_columns(load_function(spec)) - set(columns)
    for column in sorted(missing):
        guess = nearest(column, columns)
        fix = f"Did you mean {guess!r}?" if guess else "Add the column, or give the parameter a default."
        raise ConfigError(
            f"Reward function {spec.name} asks for the column {column!r}; the dataset has "
            f"{', '.join(columns) or 'none besides the prompt'}. {fix}"
        )


def required_columns(function: RewardFunction) -> set[str]:
    """Dataset columns that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name
        for parameter in parameters
        if parameter.kind in named and parameter.default is parameter.empty and parameter.name not in GIVEN_ALWAYS
    }


def wants_raw_texts(function: RewardFunction) -> bool:
    """Whether a function names an argument that holds special tokens."""
    try:
        return bool(RAW & set(inspect.signature(function).parameters))
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False


def load_function(spec: RewardSpec) -> RewardFunction:
    """The function of a spec.

    Raises:
        ConfigError: the reference does not resolve here, e.g. its module is not installed on this machine.
    """
    if spec.reference is not None:
        return resolve(spec.reference)
    if spec.pickled is None:
        raise ConfigError(f"Reward function {spec.name} must have a reference or a pickled callable, it has neither.")
    loaded: RewardFunction = cloudpickle.loads(spec.pickled)
    return loaded


def plain_rule(function: Callable[..., Any]) -> Callable[[str], bool] | None:
    """Which answers of a function that evaluates them need no process of their own; None: by the general rule."""
    return mathematics.is_plain if _is_mathematics(function) else None


def warm_up(function: Callable[..., Any]) -> None:
    """Make what a function would make at its first call, where processes are forked from this one afterwards."""
    if _is_mathematics(function):
        mathematics.warm_up()


def known_names() -> list[str]:
    """Names that need no path."""
    return sorted([*REGISTERED, *(f"{name}(...)" for name in FACTORIES)])


def resolve(reference: str) -> RewardFunction:
    """The function that a config names.

    Raises:
        ConfigError: offers the nearest name.
    """
    if reference in REGISTERED:
        return REGISTERED[reference]
    call = _CALL.fullmatch(reference)
    if call or reference in FACTORIES:
        return _build(call[1], call[2], reference) if call else _build(reference, "", reference)
    if ":" not in reference:
        guess = nearest(reference, [*REGISTERED, *FACTORIES])
        hint = f"Did you mean {guess!r}?" if guess else f"Known names: {', '.join(known_names())}."
        raise ConfigError(
            f"A reward function must be a known name, package.module:function or file.py:function, got {reference!r}. "
            + hint
        )
    found = find_object(reference, what="Reward function")
    if inspect.isclass(found) or not callable(found):
        raise ConfigError(f"Reward function {reference!r} must be a function, it is {type(found).__name__}.")
    function: RewardFunction = found
    return function


def _build(name: str, arguments: str, reference: str) -> RewardFunction:
    """A function from a registered factory, e.g. ``soft_overlong(max_completion_len=256, soft_punish_cache=64)``."""
    factory = FACTORIES.get(name)
    if factory is None:
        raise ConfigError(
            f"Only {', '.join(FACTORIES)} take arguments, got {reference!r}. Write a function without arguments and "
            "name it as package.module:function."
        )
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("arguments must be given as name=value")
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return factory(**values)
    except (SyntaxError, TypeError, ValueError) as error:
        options = ", ".join(f"{parameter}=..." for parameter in inspect.signature(factory).parameters)
        raise ConfigError(f"{reference!r} must read {name}({options}): {error}.") from error
