"""Callbacks that tests name by path, or hand over: plain objects, as users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_ray.pipelines.callbacks.hooks import Hook

PLAIN = tuple(hook for hook in Hook if not hook.is_of_self_distillation and hook is not Hook.INIT_END)


class Diary:
    """Writes down every hook with the step it is told at."""

    def __init__(self, name: str = "", book: list[str] | None = None) -> None:
        self.name, self.book = name, book if book is not None else []
        self.payloads: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, hook: str) -> Callable[..., None]:
        if hook not in PLAIN:
            raise AttributeError(hook)

        def note(args: Any, state: Any, control: Any, **payload: Any) -> None:
            self.book.append(f"{self.name}{hook.removeprefix('on_')} {state.global_step}")
            self.payloads.append((hook, payload))

        return note

    def of(self, hook: str) -> list[dict[str, Any]]:
        """What came with one hook."""
        return [payload for told, payload in self.payloads if told == hook]


class Asks:
    """Sets one field of control at one hook of one step."""

    def __init__(self, field: str, *, at: int, hook: str = "on_step_end") -> None:
        self._field, self._at = field, at
        setattr(self, hook, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
        if state.global_step == self._at:
            setattr(control, self._field, True)


class Counter:
    """Counts steps, and remembers over restarts."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
        """One more."""
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """From a checkpoint."""
        self.steps = state["steps"]


class StopsAt:
    """Ends training after a step; from YAML, with an argument."""

    def __init__(self, step: int, file: str | None = None) -> None:
        self._step, self._file = step, file

    def on_step_end(self, args: Any, state: Any, control: Any, **payload: Any) -> Any:
        """See the class."""
        if state.global_step >= self._step:
            control.should_training_stop = True
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(f"{state.global_step}\n")
        return control


class Raises:
    """Is broken."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **payload: Any) -> None:
        """Raises what asyncio cannot hand over between threads as it is."""
        raise StopIteration("no more patience")


class WantsAnArgument:
    """Cannot be constructed without."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def on_save(self, *given: Any, **payload: Any) -> None:
        """Nothing."""


class NoHook:
    """Misspells."""

    def on_step_ended(self, *given: Any, **payload: Any) -> None:
        """Nobody calls it."""
