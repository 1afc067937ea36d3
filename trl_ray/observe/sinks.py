"""Where the numbers of a run go: the `Sink` protocol, the files among the sinks, and the `Observer` that fans out.

    pipeline -> Observer.step / event / spans / completions -> Sink, Sink, ...
                    metrics.jsonl  events.jsonl  trace.jsonl  completions/*.parquet  console  wandb

A closed terminal or an unreachable service never reaches training; a file that cannot be written (disk full) does,
as `RunError`, because a run whose record is lost should stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trl_ray.observe.run_files import JsonLines
from trl_ray.types import ActorReport, Event, EventKind, RolloutGroup, Span


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedGroups:
    """What one step trained on."""

    step: int
    groups: Sequence[RolloutGroup]
    advantages: Sequence[Sequence[float] | NDArray[np.floating[Any]]] | NDArray[np.floating[Any]]
    """[groups][G] in the order of the groups and their completions."""
    learner_version: int
    """Version of the learner's weights before the step."""
    held_out: str | None = None
    """The name of the held-out set that was answered after the step, "" where there is one alone; None: trained on."""


class Sink(Protocol):
    """Takes what a run says; a sink overrides what it wants to hear and may ignore the rest."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one optimizer step."""
        return

    def event(self, event: Event) -> None:
        """Take one event."""
        return

    def spans(self, spans: Sequence[Span]) -> None:
        """Take intervals of actors' timelines."""
        return

    def completions(self, trained: TrainedGroups) -> None:
        """Take the groups of one step, or of an evaluation after it."""
        return

    def close(self) -> None:
        """Write what is held back and let go; calling it again does nothing."""
        return


def evaluated_numbers(event: Event) -> dict[str, float]:
    """The numbers of an evaluation by their names with ``eval/``; none of any other event."""
    if event.kind is not EventKind.EVALUATED:
        return {}
    return {
        name if name.startswith("eval/") else f"eval/{name}": float(value)
        for name, value in event.detail.items()
        if "/" in name and isinstance(value, int | float)
    }


class MetricsFile(Sink):
    """``metrics.jsonl``: one line per step, `step` and `time` (seconds since the epoch) first."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._lines = JsonLines(path)
        self._clock = clock

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append and flush.

        Raises:
            RunError: the file cannot be written.
        """
        self._lines.append({"step": step, "time": self._clock(), **metrics})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class EventsFile(Sink):
    """``events.jsonl``: one line per event."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def event(self, event: Event) -> None:
        """Append and flush.

        Raises:
            RunError: the file cannot be written.
        """
        self._lines.append({"time": event.time, "kind": event.kind, "actor": event.actor, "detail": event.detail})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class Observer:
    """Hands everything to every sink, in their order.

    observer = Observer([MetricsFile(run.metrics), EventsFile(run.events)])
    observer.event(Event.now(EventKind.RUN_STARTED, "driver", staleness_bound=2))
    observer.step(1, {"loss": 0.5})
    observer.close()
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of optimizer step `step` (1-based)."""
        for sink in self.sinks:
            sink.step(step, metrics)

    def event(self, event: Event) -> None:
        """One event."""
        for sink in self.sinks:
            sink.event(event)

    def spans(self, spans: Sequence[Span]) -> None:
        """Intervals of actors' timelines."""
        if spans:
            for sink in self.sinks:
                sink.spans(spans)

    def report(self, report: ActorReport) -> None:
        """What an actor gathered since it was last asked."""
        for event in report.events:
            self.event(event)
        self.spans(report.spans)

    def completions(self, trained: TrainedGroups) -> None:
        """The groups one step trained on. Their spans are not recorded here: workers report them as well."""
        for sink in self.sinks:
            sink.completions(trained)

    def close(self) -> None:
        """Close every sink, the last first, even when one fails; the first failure is raised at the end."""
        failure: Exception | None = None
        for sink in reversed(self.sinks):
            try:
                sink.close()
            except Exception as error:  # the other sinks still hold data to write
                failure = failure or error
        if failure is not None:
            raise failure
