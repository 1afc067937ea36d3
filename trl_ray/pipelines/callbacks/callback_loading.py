"""Makes the callbacks of a run before anything starts: those that the configuration names, then those given in Python.

callbacks: ["package.module:Class", {path: ..., kwargs: {...}}] --construct--> objects --+--> CallbackList
Pipeline(callbacks=[MyCallback()]) ------------------------------------------------------+
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from trl_ray.config.callback_options import CallbackSpec
from trl_ray.config.messages import nearest
from trl_ray.config.object_paths import FROM_PYTHON, find_object
from trl_ray.config.runs.cadence_options import HubStrategy
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ConfigError
from trl_ray.pipelines.callbacks.hooks import CallbackList, Hook
from trl_ray.pipelines.run.hub_pushes import HubCallback


def specs_with(named: Sequence[CallbackSpec], given: Sequence[Any] | None) -> list[CallbackSpec]:
    """What config.yaml says of the callbacks: objects cannot be written down, but their place is kept.

    Raises:
        ConfigError: `given` is no list.
    """
    if given is not None and not isinstance(given, list | tuple):
        raise ConfigError(f"callbacks must be a list, got a {type(given).__name__}. Write callbacks=[...].")
    kept = [spec for spec in named if given is None or not spec.is_from_python]
    return [*kept, *(CallbackSpec(path=FROM_PYTHON + _class_of(item)) for item in given or ())]


def make_callbacks(config: RunConfig, given: Sequence[Any] | None) -> CallbackList:
    """All callbacks of a run; classes among `given` are constructed without arguments.

    Raises:
        ConfigError: a path leads nowhere, an object cannot be constructed or has no hook, or those that Python gave
            the first time are missing.
    """
    missing = [spec.path for spec in config.callbacks if spec.is_from_python]
    if missing and given is None:
        raise ConfigError(
            f"callbacks must name classes that can be found again, got {missing}: they were given as objects, in "
            "Python. Resume there too, with from_run(run_dir, callbacks=[...]).train(); callbacks=[] leaves them out."
        )
    named = [_construct(spec) for spec in config.callbacks if not spec.is_from_python]
    objects = [_called(item, {}, _class_of(item)) if inspect.isclass(item) else item for item in given or ()]
    for callback in (*named, *objects):
        _check_hooks(callback)
    own = [HubCallback(config)] if config.push_to_hub and config.hub_strategy is not HubStrategy.END else []
    return CallbackList([*named, *objects, *own], args=config)


def _construct(spec: CallbackSpec) -> Any:
    found = find_object(spec.path, what="Callback")
    if not callable(found):
        raise ConfigError(
            f"Callback {spec.path!r} must be a class, or a function that makes an object, it is "
            f"{type(found).__name__}. Name the class."
        )
    return _called(found, spec.kwargs, spec.path)


def _called(make: Any, kwargs: dict[str, Any], name: str) -> Any:
    try:
        return make(**kwargs)
    except Exception as error:  # a user's constructor may raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ConfigError(
            f"Callback {name}({given}) must be constructible, but: {type(error).__name__}: {error}. Mend its kwargs."
        ) from error


def _check_hooks(callback: Any) -> None:
    known = [hook.value for hook in Hook]
    if any(callable(getattr(callback, hook, None)) for hook in known):
        return
    tried = [name for name in dir(callback) if name.startswith("on_")]
    guess = nearest(tried[0], known) if tried else None
    hint = f"It has {tried[0]}; did you mean {guess}?" if guess else f"Known hooks: {', '.join(known)}."
    raise ConfigError(f"A callback must have at least one hook, got {callback!r}. {hint}")


def _class_of(item: Any) -> str:
    return item.__name__ if inspect.isclass(item) else type(item).__name__
