"""What callbacks remember from step to step, in checkpoints: those that have `state_dict` and `load_state_dict`.

Those of transformers with a `state` (`ExportableState`) have its attributes kept.

callbacks --state_dict--> callbacks.json in step-N/ --load_state_dict--> callbacks of the same class, in their order
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from trl_ray.errors import CallbackError

CALLBACKS = "callbacks.json"


def write_states(callbacks: Sequence[Any]) -> dict[str, bytes]:
    """The contents of the file by its name; nothing where no callback has a state.

    Raises:
        CallbackError: `state_dict` raised, or gave what JSON cannot hold.
    """
    states = []
    for callback in callbacks:
        take = _taking(callback)
        if take is None:
            continue
        name = type(callback).__name__
        try:
            state = json.loads(json.dumps(take(), allow_nan=True))
        except Exception as error:  # a user's callback may raise anything
            raise CallbackError(
                f"{name}.state_dict must give what JSON can hold, but: {type(error).__name__}: {error}. Mend it: "
                "numbers, strings, lists, and dicts with strings for keys."
            ) from error
        states.append({"class": name, "state": state})
    return {CALLBACKS: json.dumps(states).encode()} if states else {}


def read_states(callbacks: Sequence[Any], kept: Path | bytes) -> tuple[str, ...]:
    """Hand states out again.

    Args:
        callbacks: of the run now.
        kept: a checkpoint, or the contents of the file.

    Returns:
        Sentences on states that no callback takes; one that has none in the checkpoint stays as it is.

    Raises:
        CallbackError: `load_state_dict` raised.
    """
    left: dict[str, list[Any]] = defaultdict(list)
    for entry in _entries(kept):
        left[entry["class"]].append(entry["state"])
    for callback in callbacks:
        name = type(callback).__name__
        give = _giving(callback)
        if not left[name] or give is None:
            continue
        try:
            give(left[name].pop(0))
        except Exception as error:  # a user's callback may raise anything
            raise CallbackError(
                f"{name}.load_state_dict must take what its state_dict gave, but: {type(error).__name__}: {error}. "
                "Mend the callback, then resume."
            ) from error
    return tuple(
        f"the checkpoint holds a state of the callback {name}, but the run has none that takes it"
        for name, states in left.items()
        for _ in states
    )


def _taking(callback: Any) -> Callable[[], Any] | None:
    """What gives a callback's state; None where it has none."""
    if callable(own := getattr(callback, "state_dict", None)):
        return cast(Callable[[], Any], own)
    if _is_exportable(callback):
        return lambda: callback.state()["attributes"]
    return None


def _giving(callback: Any) -> Callable[[Any], Any] | None:
    """What takes it again."""
    if callable(own := getattr(callback, "load_state_dict", None)):
        return cast(Callable[[Any], Any], own)
    return (lambda kept: vars(callback).update(kept)) if _is_exportable(callback) else None


def _is_exportable(callback: Any) -> bool:
    return callable(getattr(callback, "state", None)) and callable(getattr(type(callback), "from_state", None))


def _entries(kept: Path | bytes) -> list[dict[str, Any]]:
    if isinstance(kept, Path):
        file = kept / CALLBACKS
        kept = file.read_bytes() if file.is_file() else b""
    entries: list[dict[str, Any]] = json.loads(kept) if kept else []
    return entries
