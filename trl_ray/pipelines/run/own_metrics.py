"""Calls the user's own function on what is known of held-out rows: TRL's `compute_metrics`.

compute_metrics=function, or the option's package.module:function ─► function
EvalPrediction ─ called, guarded ─► numbers     of which those of other kinds are told, and written nowhere
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from trl_ray.config.object_paths import FROM_PYTHON, find_object
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import RuntimeKind
from trl_ray.errors import CallbackError, ConfigError
from trl_ray.models.scoring.predictor import plain_numbers

ComputeMetrics = Callable[..., Any]
"""Takes transformers' `EvalPrediction`, or what is one; returns numbers by name."""


def named_metrics(given: ComputeMetrics | None, named: str | None) -> str | None:
    """What config.yaml says of the function: one given as an object cannot be written down, but its place is kept."""
    if given is None:
        return named
    return f"{FROM_PYTHON}{getattr(given, '__name__', type(given).__name__)}"


def found_metrics(given: ComputeMetrics | None, named: str | None) -> ComputeMetrics | None:
    """The function that a run measures with; None where there is none.

    Raises:
        ConfigError: it is no function, its path leads nowhere, or the one that Python gave the first time is missing.
    """
    if given is None and named is not None:
        if named.startswith(FROM_PYTHON):
            raise ConfigError(
                f"compute_metrics must name a function that can be found again, got {named}: it was given as an "
                "object, in Python. Resume there too, with from_run(run_dir, compute_metrics=...).train(), or leave it "
                "out: trl-ray resume RUN_DIR compute_metrics=null"
            )
        given = find_object(named, what="compute_metrics")
    if given is not None and not callable(given):
        raise ConfigError(f"compute_metrics must be a function, got a {type(given).__name__}. Pass a function.")
    return given


async def computed_metrics(
    compute: ComputeMetrics, prediction: Any, config: RunConfig, *, is_last: bool | None = None
) -> dict[str, Any]:
    """What the function says.

    Args:
        compute: the user's function.
        prediction: of a held-out set, or of a batch of it.
        config: of the run.
        is_last: of a batch, whether it is the last one, which the function is told; None: there are no batches.

    Raises:
        CallbackError: it raised, or gave no dict.
    """
    more = {} if is_last is None else {"compute_result": is_last}
    call = partial(_guarded, compute, prediction, more)
    # With actors the loop must go on answering; without, breakpoints are simpler.
    found = await asyncio.to_thread(call) if config.runtime.kind is RuntimeKind.RAY else call()
    if is_last is False and found is None:
        return {}
    return plain_numbers(found)


def own_numbers(own: Mapping[str, Any], set_name: str) -> tuple[dict[str, float], str | None]:
    """What can be written down, without the prefix that all get, and a sentence about the rest."""
    prefix = f"eval_{set_name}_" if set_name else "eval_"
    numbers = {key.removeprefix(prefix): value for key, value in own.items() if isinstance(value, int | float)}
    left = [key for key in own if not isinstance(own[key], int | float)]
    told = f"compute_metrics gave {', '.join(left)}, which are no numbers and written nowhere" if left else None
    return numbers, told


def _guarded(compute: ComputeMetrics, prediction: Any, more: Mapping[str, Any]) -> Any:
    try:
        return compute(prediction, **more)
    except Exception as error:  # a user's function may raise anything
        raise CallbackError(
            f"compute_metrics must not raise, but did: {type(error).__name__}: {error}. It is given predictions "
            f"{_shape(prediction.predictions)} and label_ids {_shape(prediction.label_ids)}."
        ) from error


def _shape(found: Any) -> Any:
    if isinstance(found, list | tuple):
        return [_shape(each) for each in found[:3]]
    return tuple(getattr(found, "shape", ()))
