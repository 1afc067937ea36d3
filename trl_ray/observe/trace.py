"""Records what each actor did when, and says how much of the run it was busy.

    Span(actor, name, start, end) -> TraceFile -> trace.jsonl -> idle_shares | chrome_trace | the report's timeline

Spans of one actor may overlap (an engine generates many groups at once); shares count each moment once. Spans named
``wait`` or ``idle``, or beginning with these words, say that the actor waited; they are not busy time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_ray.observe.columns import SpanColumns, covered, read_span_columns
from trl_ray.observe.run_files import JsonLines, atomic_write_json, read_json_lines
from trl_ray.observe.sinks import Sink
from trl_ray.types import Span

_WAITING = re.compile(r"(wait|idle)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorShare:
    """How one actor spent the run."""

    actor: str
    busy: float
    """Fraction of the run with at least one working span; 1 - busy is idle."""
    by_name: Mapping[str, float]
    """Fraction of the run covered by each kind of span, waiting included; the kinds may overlap."""

    @property
    def idle(self) -> float:
        """Fraction of the run without a working span."""
        return 1.0 - self.busy


class TraceFile(Sink):
    """``trace.jsonl``: one line per span, times in seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def spans(self, spans: Sequence[Span]) -> None:
        """Append and flush.

        Raises:
            RunError: the file cannot be written.
        """
        self._lines.append(
            *({"actor": span.actor, "name": span.name, "start": span.start, "end": span.end} for span in spans)
        )

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_trace(path: Path) -> SpanColumns:
    """The spans of a trace, by start; lines that are torn or end before they start are left out."""
    columns = read_span_columns(path)
    if columns is not None:
        return columns
    spans = []
    for record in read_json_lines(path):
        start, end = record.get("start"), record.get("end")
        if isinstance(start, int | float) and isinstance(end, int | float) and end >= start:
            actor, name = str(record.get("actor", "?")), str(record.get("name", "?"))
            spans.append(Span(actor=actor, name=name, start=float(start), end=float(end)))
    return SpanColumns.of(spans)


def is_waiting(name: str) -> bool:
    """Whether a span of this name is time without work."""
    return _WAITING.match(name) is not None


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals as disjoint intervals in order."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def idle_shares(spans: Sequence[Span], *, start: float | None = None, end: float | None = None) -> list[ActorShare]:
    """How busy each actor was between `start` and `end`; by default over the whole trace."""
    if not spans:
        return []
    all_spans = SpanColumns.of(spans)
    begin = float(all_spans.start.min()) if start is None else start
    finish = float(all_spans.end.max()) if end is None else end
    works = np.array([not is_waiting(name) for name in all_spans.names])
    shares = []
    for actor in sorted(all_spans.actors):
        own = all_spans.where(all_spans.actor == all_spans.actors.index(actor))
        kinds = dict.fromkeys(own.name.tolist())  # in the order in which they begin
        by_name = {all_spans.names[kind]: _share(own.where(own.name == kind), begin, finish) for kind in kinds}
        shares.append(ActorShare(actor=actor, busy=_share(own.where(works[own.name]), begin, finish), by_name=by_name))
    return shares


def _share(spans: SpanColumns, begin: float, finish: float) -> float:
    """The fraction of the time from `begin` to `finish` that is in at least one of the spans."""
    start, end = np.maximum(spans.start, begin), np.minimum(spans.end, finish)
    inside = end > start
    return min(1.0, covered(start[inside], end[inside]) / (finish - begin)) if finish > begin else 0.0


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The trace in Chrome's trace-event format, for Perfetto and chrome://tracing; times in microseconds.

    Overlapping spans of one actor get lanes of their own, because the format nests what shares a lane.
    """
    origin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for process, actor in enumerate(sorted({span.actor for span in spans}), start=1):
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": actor}})
        free_from: list[float] = []
        for span in sorted((span for span in spans if span.actor == actor), key=lambda span: span.start):
            lane = next((lane for lane, free in enumerate(free_from) if free <= span.start), len(free_from))
            free_from[lane : lane + 1] = [span.end]
            events.append(
                {
                    "name": span.name,
                    "cat": "wait" if is_waiting(span.name) else "work",
                    "ph": "X",
                    "pid": process,
                    "tid": lane + 1,
                    "ts": (span.start - origin) * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def export_chrome_trace(trace: Path, target: Path) -> Path:
    """Convert ``trace.jsonl`` to a file that Perfetto opens.

    Raises:
        RunError: `target` cannot be written.
    """
    atomic_write_json(target, chrome_trace(read_trace(trace)))
    return target
