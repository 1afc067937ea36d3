"""Draws the report's charts as inline SVG: lines, stacked bars, and intervals on a time axis.

    Chart(series) -> draw_chart -> <figure> with axes, legend and the numbers for the pointer
    Lane(intervals) -> draw_timeline -> <svg>

Everything is drawn in a fixed view box and scales with its card; colours come from classes: ``c0`` .. ``c7`` tell
things apart, ``c8`` .. ``c13`` are shades from little to much.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 376, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 24
COLORS = 8
SHADES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line or one layer of a stack."""

    name: str
    values: Sequence[float | None]
    """[points] None is a gap."""
    color: int
    """0 .. 13; see `hue` and `shade`."""
    faint: bool = False
    """Drawn thin behind the others and left out of the legend: the raw values under a smoothed line."""
    dots: bool = False
    """Drawn as separate points: values that few steps have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What to draw over the optimizer steps."""

    title: str
    steps: Sequence[int]
    """[points]"""
    series: Sequence[Series]
    unit: str = ""
    bound: float | None = None
    """Value of a horizontal line."""
    bound_name: str = "bound"
    stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps values to coordinates of the view box."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """An interval of a lane, in seconds."""

    start: float
    end: float
    name: str
    color: int | None
    """None draws waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The row of one actor."""

    name: str
    bars: Sequence[Bar]


def hue(index: int) -> int:
    """The colour of the index-th of several things of different kind."""
    return index % COLORS


def shade(index: int) -> int:
    """The colour of the index-th of several things in an order; all from the last shade on look the same."""
    return COLORS + min(index, SHADES - 1)


def escape(text: object) -> str:
    """Text for HTML, quotes included, control characters shown as pictures of themselves."""
    shown = "".join(chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else char for char in str(text))
    return html.escape(shown.encode("utf-8", "replace").decode(), quote=True)


def compact(value: float | None) -> str:
    """A number in at most about six characters."""
    if value is None or not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for limit, suffix in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if suffix == 'M' else 1e3):.3g}{suffix}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_chart(chart: Chart) -> str:
    """A figure with title, drawing and legend, or nothing when no series has a value."""
    series = [line for line in chart.series if any(value is not None for value in line.values)]
    if not series:
        return ""
    half = 0.5 if chart.stacked or len(chart.steps) == 1 else 0.0
    x = Scale(low=min(chart.steps) - half, high=max(chart.steps) + half, start=_LEFT, end=WIDTH - _RIGHT)
    y = _value_scale(chart, series)
    lines = (_line(line, chart.steps, x, y) for line in series)
    body = _stacked(chart, series, x, y) if chart.stacked else "".join(lines)
    bound = _bound(chart, y) if chart.bound is not None else ""
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    return (
        f'<figure class="card chart"><figcaption>{escape(chart.title)}{unit}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(_summary(chart, series))}" '
        f'data-plot="{escape(_plot_data(chart, series, x))}">'
        f"{_axes(chart, x, y)}{body}{bound}"
        f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg>{_legend(series)}</figure>'
    )


def _value_scale(chart: Chart, series: Sequence[Series]) -> Scale:
    values = [value for line in series for value in line.values if value is not None]
    if chart.stacked:
        columns = zip(*(line.values for line in series), strict=True)
        values = [0.0, *(sum(value or 0.0 for value in column) for column in columns)]
    if chart.bound is not None:
        values.append(chart.bound)
    low, high = min(values), max(values)
    if 0 < low <= 0.5 * high:
        low = 0.0
    # The name of a bound stands above its line.
    room = (high - low) * (0.06 if chart.bound is None else 0.16) or abs(high) * 0.1 or 1.0
    low, high = (low if low == 0 else low - room), high + room
    return Scale(low=low, high=high, start=HEIGHT - _BOTTOM, end=_TOP)


def _axes(chart: Chart, x: Scale, y: Scale) -> str:
    parts = []
    for value in ticks(y.low, y.high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        name = compact(value)
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{name}</text>')
    for step in _step_ticks(chart.steps):
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step}</text>')
    return "".join(parts)


def _step_ticks(steps: Sequence[int]) -> list[int]:
    low, high = min(steps), max(steps)
    if high - low < 6:
        return list(range(low, high + 1))
    return [round(value) for value in ticks(low, high, 6) if value == round(value)]


def _line(line: Series, steps: Sequence[int], x: Scale, y: Scale) -> str:
    runs: list[list[str]] = [[]]
    for step, value in zip(steps, line.values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{x(step):.1f},{y(value):.1f}")
    kind = f"c{line.color}" + (" faint" if line.faint else "")
    parts: list[str] = []
    for run in filter(None, runs):
        if line.dots or len(run) == 1:
            points = (point.split(",") for point in run)
            parts.extend(f'<circle class="dot {kind}" cx="{left}" cy="{top}" r="3"/>' for left, top in points)
        else:
            parts.append(f'<polyline class="line {kind}" points="{" ".join(run)}"/>')
    return "".join(parts)


def _stacked(chart: Chart, series: Sequence[Series], x: Scale, y: Scale) -> str:
    gaps = [after - before for before, after in pairwise(chart.steps)]
    slot = (x.end - x.start) / (x.high - x.low) * min(gaps, default=1)
    width = max(0.8, min(slot * (0.82 if slot > 5 else 1.0), 60.0))
    parts: list[str] = []
    for index, step in enumerate(chart.steps):
        floor = 0.0
        for line in series:
            value = line.values[index] or 0.0
            if value > 0:
                top, bottom = y(floor + value), y(floor)
                parts.append(
                    f'<rect class="bar c{line.color}" x="{x(step) - width / 2:.1f}" y="{top:.1f}" '
                    f'width="{width:.1f}" height="{bottom - top:.1f}"/>'
                )
                floor += value
    return "".join(parts)


def _bound(chart: Chart, y: Scale) -> str:
    assert chart.bound is not None
    top = y(chart.bound)
    return (
        f'<line class="bound" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>'
        f'<text class="bound-name" x="{WIDTH - _RIGHT - 4}" y="{top - 5:.1f}" text-anchor="end">'
        f"{escape(chart.bound_name)} {compact(chart.bound)}</text>"
    )


def _legend(series: Sequence[Series]) -> str:
    shown = [line for line in series if not line.faint]
    items = "".join(
        f'<li><i class="key c{line.color}"></i><span class="name">{escape(line.name)}</span> '
        f"<b>{compact(_last(line))}</b></li>"
        for line in shown
    )
    return f'<ul class="legend">{items}</ul>'


def _last(line: Series) -> float | None:
    return next((value for value in reversed(line.values) if value is not None), None)


def _summary(chart: Chart, series: Sequence[Series]) -> str:
    parts = []
    for line in series:
        first = next((value for value in line.values if value is not None), None)
        if not line.faint:
            parts.append(f"{line.name} from {compact(first)} to {compact(_last(line))}")
    span = f"steps {min(chart.steps)} to {max(chart.steps)}"
    return f"{chart.title}, {span}: " + ", ".join(parts) + ". Arrow keys read single steps."


def _plot_data(chart: Chart, series: Sequence[Series], x: Scale) -> str:
    return json.dumps(
        {
            "at": [round(x(step), 1) for step in chart.steps],
            "steps": list(chart.steps),
            "series": [
                {
                    "name": line.name + (" (each step)" if line.faint else ""),
                    "color": line.color,
                    "text": [compact(value) if value is not None else "" for value in line.values],
                }
                for line in series
            ],
        },
        separators=(",", ":"),
    )


_LANE, _LABELS, _TIMELINE_WIDTH, _AXIS = 30, 132, 1120, 24


def draw_timeline(lanes: Sequence[Lane], *, start: float, end: float, marks: Sequence[tuple[float, str]]) -> str:
    """Intervals over [start, end] seconds, one row per lane, with named vertical lines."""
    x = Scale(low=start, high=end, start=_LABELS, end=_TIMELINE_WIDTH - 10)
    height = _LANE * len(lanes) + 2 * _AXIS
    parts = []
    for seconds in ticks(0.0, end - start, 8):
        left = x(start + seconds)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{left:.1f}" y1="{_AXIS}" y2="{height - _AXIS}"/>')
        name = f"{compact(seconds)} s"
        parts.append(f'<text class="tick" x="{left:.1f}" y="{height - 7}" text-anchor="middle">{name}</text>')
    for row, lane in enumerate(lanes):
        top = _AXIS + row * _LANE
        parts.append(
            f'<text class="lane" x="{_LABELS - 10}" y="{top + _LANE / 2 + 4}" text-anchor="end">'
            f"{escape(lane.name[:20])}</text>"
            f'<line class="grid" x1="{_LABELS}" x2="{_TIMELINE_WIDTH - 10}" y1="{top + _LANE}" y2="{top + _LANE}"/>'
        )
        parts.extend(_bar(bar, x, top) for bar in lane.bars)
    for time, name in marks:
        at = f"{x(time):.1f}"
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{_AXIS - 6}" y2="{height - _AXIS}"/>')
        anchor = "end" if x(time) > _TIMELINE_WIDTH - 40 else "middle"
        parts.append(f'<text class="tick" x="{at}" y="12" text-anchor="{anchor}">{escape(name)}</text>')
    label = f"Timeline of {len(lanes)} actors over {compact(end - start)} seconds"
    return (
        f'<svg class="timeline" viewBox="0 0 {_TIMELINE_WIDTH} {height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _bar(bar: Bar, x: Scale, top: float) -> str:
    left, right = x(max(bar.start, x.low)), x(min(bar.end, x.high))
    kind = "waiting" if bar.color is None else f"c{bar.color}"
    inset = 11 if bar.color is None else 6
    return (
        f'<rect class="bar {kind}" x="{left:.1f}" y="{top + inset}" width="{max(right - left, 0.8):.1f}" '
        f'height="{_LANE - 2 * inset}" rx="1.5"><title>{escape(bar.name)} {bar.end - bar.start:.2f} s</title></rect>'
    )
