"""What each actor did in the last steps, and how busy each was over the run.

RunData.spans -> timeline -> Timeline(lanes, shares) -> templates/timeline.html.jinja
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trl_ray.observe.columns import SpanColumns
from trl_ray.observe.console import duration
from trl_ray.observe.report.chart_layout import Frame, LegendKey, Scale, Tick, compact, hue, ticks
from trl_ray.observe.report.report_data import RunData
from trl_ray.observe.trace import idle_shares, is_waiting, merged
from trl_ray.types import Span

_STEPS = 8
_FALLBACK_S = 120.0
_LANE, _AXIS, _LABELS, _WIDTH = 30, 24, 132, 1120
_BAR_INSET, _WAITING_INSET = 6, 11
_MIN_BAR = 0.8
_RESOLUTION = 600
"""Gaps shorter than this part of the window are closed: a long run must not become a file of a million rectangles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineBar:
    """One interval, in units of the view box."""

    color: str
    left: str
    top: int
    width: str
    height: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineLane:
    """The row of one actor."""

    name: str
    bottom: int
    text_at: float
    bars: Sequence[TimelineBar]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineMark:
    """The end of a step."""

    at: str
    name: str
    anchor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyRow:
    """How one actor spent the run."""

    actor: str
    busy: float
    """Fraction of the run."""
    idle: float
    parts: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The drawing of the last steps, and the table of the whole run."""

    window: str
    label: str
    frame: Frame
    ticks: Sequence[Tick]
    lanes: Sequence[TimelineLane]
    marks: Sequence[TimelineMark]
    legend: Sequence[LegendKey]
    shares: Sequence[BusyRow]


def timeline(run: RunData) -> Timeline | None:
    """The last steps of every actor, or None for a run without a trace."""
    if not run.spans:
        return None
    known = zip(run.values("time"), run.values("step"), strict=True)
    ends = [(moment, step) for moment, step in known if moment is not None and step is not None]
    spans = SpanColumns.of(run.spans)
    start, finish = _window(spans, [moment for moment, _ in ends])
    names = [name for name in spans.names if not is_waiting(name)]
    actors = sorted(spans.actors)
    inside = list(spans.where(spans.end > start))
    height = _LANE * len(actors) + 2 * _AXIS
    frame = Frame(width=_WIDTH, height=height, left=_LABELS, right=_WIDTH - 10, top=_AXIS, bottom=height - _AXIS)
    x = Scale(low=start, high=finish, start=frame.left, end=frame.right)
    legend = [LegendKey(name=name, color=f"c{hue(index)}") for index, name in enumerate(names)]
    if len(names) < len(spans.names):
        legend.append(LegendKey(name="waiting", color="waiting"))
    return Timeline(
        window=duration(finish - start),
        label=f"Timeline of {len(actors)} actors over {compact(finish - start)} seconds",
        frame=frame,
        ticks=[
            Tick(at=f"{x(start + seconds):.1f}", name=f"{compact(seconds)} s")
            for seconds in ticks(0.0, finish - start, 8)
        ],
        lanes=[
            _lane(row, actor, [span for span in inside if span.actor == actor], names, x)
            for row, actor in enumerate(actors)
        ],
        marks=[_mark(x(moment), f"step {int(step)}") for moment, step in ends if start < moment <= finish],
        legend=legend,
        shares=_shares(spans),
    )


def _window(spans: SpanColumns, ends: Sequence[float]) -> tuple[float, float]:
    finish = float(spans.end.max())
    start = ends[-1 - _STEPS] if len(ends) > _STEPS else float(spans.start.min())
    if not ends:
        start = max(start, finish - _FALLBACK_S)
    return (finish - 1.0 if finish <= start else start), finish


def _lane(row: int, actor: str, spans: Sequence[Span], names: Sequence[str], x: Scale) -> TimelineLane:
    top = _AXIS + row * _LANE
    lengths: Counter[str] = Counter()
    for span in spans:
        lengths[span.name] += 1 + int(1000 * (span.end - span.start))
    close = (x.high - x.low) / _RESOLUTION
    bars = []
    for name, _ in lengths.most_common():  # the longest first, so that short ones lie on top
        color = "waiting" if is_waiting(name) else f"c{hue(names.index(name))}"
        for begin, end in merged((span.start, span.end + close) for span in spans if span.name == name):
            bars.append(_bar(begin, end - close, name, color, top, x))
    return TimelineLane(name=actor[:20], bottom=top + _LANE, text_at=top + _LANE / 2 + 4, bars=bars)


def _bar(begin: float, end: float, name: str, color: str, top: int, x: Scale) -> TimelineBar:
    left, right = x(max(begin, x.low)), x(min(end, x.high))
    inset = _WAITING_INSET if color == "waiting" else _BAR_INSET
    return TimelineBar(
        color=color,
        left=f"{left:.1f}",
        top=top + inset,
        width=f"{max(right - left, _MIN_BAR):.1f}",
        height=_LANE - 2 * inset,
        title=f"{name} {end - begin:.2f} s",
    )


def _mark(at: float, name: str) -> TimelineMark:
    return TimelineMark(at=f"{at:.1f}", name=name, anchor="end" if at > _WIDTH - 40 else "middle")


def _shares(spans: Sequence[Span]) -> list[BusyRow]:
    rows = []
    for share in idle_shares(spans):
        parts = sorted(share.by_name.items(), key=lambda pair: -pair[1])
        told = " · ".join(f"{name} {fraction:.0%}" for name, fraction in parts)
        rows.append(BusyRow(actor=share.actor, busy=share.busy, idle=share.idle, parts=told))
    return rows
