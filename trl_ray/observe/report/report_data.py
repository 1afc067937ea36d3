"""Reads what there is of a run: any file may be missing, torn, or of a run that is still going.

RUN_DIR/{config.yaml, metrics.jsonl, events.jsonl, ledger.json, trace.jsonl, completions/} -> read_run -> RunData
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trl_ray.observe.columns import Columns, SpanColumns, read_metric_columns
from trl_ray.observe.redact import redact
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import parse_json, read_json_lines
from trl_ray.observe.trace import read_trace
from trl_ray.types import EventKind, Span

MAX_POINTS = 400
MAX_EVENTS = 400
"""Of one list of events."""
_BY_LARGEST = frozenset({"step", "time", "staleness/max"})
"""Metrics of which several steps have the largest value, and of others the mean."""
_OF_EVERY_STEP = re.compile(
    rb'\{"time":[0-9.e+-]+,"kind":"('
    + b"|".join(kind.value.encode() for kind in (EventKind.WEIGHTS_PUBLISHED, EventKind.WEIGHTS_PULLED))
    + rb')",'
)
"""As events.jsonl writes the kinds that every step has, which are no news."""
Row = Mapping[str, float]


class Status(enum.StrEnum):
    """How a run stands, as far as its files tell."""

    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    UNFINISHED = "unfinished"
    """Still running, or killed before it could say so."""


_ENDS = {
    EventKind.RUN_FINISHED: Status.FINISHED,
    EventKind.RUN_FAILED: Status.FAILED,
    EventKind.INTERRUPTED: Status.INTERRUPTED,
    EventKind.RUN_STARTED: Status.UNFINISHED,
    EventKind.RUN_RESUMED: Status.UNFINISHED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFigures:
    """The balance: issued = trained + dropped + live."""

    issued: int
    trained: int
    dropped: Mapping[str, int]
    live: Mapping[str, int]

    @property
    def balanced(self) -> bool:
        """Whether every issued group is accounted for."""
        return self.issued == self.trained + sum(self.dropped.values()) + sum(self.live.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Completions of one step."""

    step: int
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Everything the report draws."""

    path: Path
    config: Mapping[str, Any]
    """Without secrets; empty when config.yaml is missing or torn."""
    rows: Sequence[Row]
    """Metrics by step, in order, the last line winning where a step was trained twice."""
    events: Sequence[Mapping[str, Any]]
    """In the order they happened; of the kinds of every step, the first ones and the last."""
    ledger: LedgerFigures | None
    spans: Sequence[Span]
    samples: Sequence[Samples]
    """First, middle and last step that has completions."""
    more_events: Mapping[str, int] = field(default_factory=dict)
    """By kind, how many are not among `events`."""

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.config.get("run_name") or self.path.name)

    @property
    def status(self) -> Status:
        """What the last event about the run as a whole says."""
        for event in reversed(self.events):
            if event.get("kind") in _ENDS:
                return _ENDS[EventKind(event["kind"])]
        return Status.UNFINISHED

    @property
    def total_steps(self) -> int | None:
        """How many steps the run is to take, where it says so."""
        for value in (self.announced("total_steps"), self.config.get("max_steps")):
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def max_age_at_use(self) -> int | None:
        """The worst age a token may have."""
        announced = self.announced("staleness_bound")
        if isinstance(announced, int):
            return announced
        configured = self.config.get("max_staleness")
        return configured if isinstance(configured, int) else None

    @property
    def moments(self) -> tuple[float, float] | None:
        """First and last known moment, in seconds since the epoch."""
        known = self.present("time")
        known += [float(event["time"]) for event in self.events if isinstance(event.get("time"), int | float)]
        spans = SpanColumns.of(self.spans)
        known += [float(spans.start.min()), float(spans.end.max())] if self.spans else []
        return (min(known), max(known)) if known else None

    def announced(self, key: str) -> Any:
        """What the run said of itself when it started or was resumed last, or None."""
        for event in reversed(self.events):
            if event.get("kind") in {EventKind.RUN_STARTED, EventKind.RUN_RESUMED}:
                detail = event.get("detail")
                if isinstance(detail, Mapping) and key in detail:
                    return detail[key]
        return None

    def values(self, key: str) -> list[float | None]:
        """[rows] of one metric, None where a step lacks it."""
        if isinstance(self.rows, Columns):
            return self.rows.values(key)
        return [row.get(key) for row in self.rows]

    def present(self, key: str) -> list[float]:
        """The values of one metric that exist, in order."""
        if isinstance(self.rows, Columns):
            return self.rows.present(key)
        return [row[key] for row in self.rows if key in row]


def read_run(run: RunDirectory) -> RunData:
    """Read a run directory.

    Raises:
        ConfigError: by the caller's `RunDirectory.open_existing`; nothing that is missing or torn here raises.
    """
    events, more = _read_events(run.events)
    return RunData(
        path=run.path,
        config=_read_config(run.config),
        rows=_read_metrics(run.metrics),
        events=events,
        more_events=more,
        ledger=_read_ledger(run.ledger),
        spans=read_trace(run.trace),
        samples=_read_samples(run.completions),
    )


def thinned(rows: Sequence[Row], limit: int = MAX_POINTS) -> list[Row]:
    """At most `limit` rows: neighbours are averaged, maxima stay maxima, the last step names the row."""
    if len(rows) <= limit:
        return list(rows)
    edges = [len(rows) * index // limit for index in range(limit + 1)]
    if isinstance(rows, Columns):
        return list(rows.joined(edges, by_largest=_BY_LARGEST))
    return [_joined(rows[start:end]) for start, end in pairwise(edges)]


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, and how many were left out."""
    return text if len(text) <= limit else text[:limit] + f"… ({len(text) - limit} more characters)"


def _joined(rows: Sequence[Row]) -> Row:
    joined: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        joined[key] = max(values) if key in _BY_LARGEST else sum(values) / len(values)
    return joined


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        return {}
    return redact(loaded) if isinstance(loaded, dict) else {}


def _read_metrics(path: Path) -> Sequence[Row]:
    columns = read_metric_columns(path)
    if columns is not None:
        return columns
    by_step: dict[int, Row] = {}
    for record in read_json_lines(path):
        numbers = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
        if "step" in numbers:
            by_step[int(numbers["step"])] = numbers
    return [by_step[step] for step in sorted(by_step)]


def _read_events(path: Path) -> tuple[list[dict[str, Any]], Mapping[str, int]]:
    """Events, and how many of each kind are left out: those that every step has, once there are enough of them."""
    known, seen, left_out, last = {kind.value for kind in EventKind}, 0, Counter[str](), b""

    def skips(line: bytes) -> bool:
        nonlocal seen, last
        match = _OF_EVERY_STEP.match(line)
        seen += match is not None
        if match is None or seen <= MAX_EVENTS or not line.endswith(b"}\n"):
            return False
        left_out[match[1].decode()] += 1
        last = line
        return True

    events = [event for event in read_json_lines(path, skips=skips) if event.get("kind") in known]
    event = parse_json(last.decode("utf-8", errors="replace"))
    if isinstance(event, dict):
        # When the run was last heard of.
        left_out[event["kind"]] -= 1
        events.append(event)
    return events, left_out


def _read_ledger(path: Path) -> LedgerFigures | None:
    content = parse_json(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if not isinstance(content, dict) or not isinstance(content.get("issued"), int):
        return None
    trained = content.get("trained")
    return LedgerFigures(
        issued=content["issued"],
        trained=trained if isinstance(trained, int) else 0,
        dropped=_counts(content.get("dropped")),
        live=_counts(content.get("live")),
    )


def _counts(value: Any) -> dict[str, int]:
    if isinstance(value, int):
        return {"all": value} if value else {}
    if not isinstance(value, Mapping):
        return {}
    return {str(name): count for name, count in value.items() if isinstance(count, int) and count}


def _read_samples(folder: Path) -> list[Samples]:
    named = ((re.fullmatch(r"step-(\d+)", file.stem), file) for file in folder.glob("step-*.parquet"))
    files = sorted((int(match[1]), file) for match, file in named if match)
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    samples = []
    for index in chosen:
        step, file = files[index]
        try:
            samples.append(Samples(step=step, rows=pq.read_table(file).to_pylist()))
        except (OSError, pa.ArrowException):  # torn; the report shows the others
            continue
    return samples
