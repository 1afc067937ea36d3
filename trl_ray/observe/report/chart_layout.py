"""Works out where everything in a chart of the report stands; a template turns that into inline SVG.

    Chart(series) -> place_chart -> PlacedChart -> templates/chart.html.jinja

Coordinates are in the units of a fixed view box, which scales with its card. Colours come from classes: ``c0`` ..
``c7`` tell things apart, ``c8`` .. ``c13`` are shades from little to much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

COLORS = 8
SHADES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A view box, and the part of it inside the axes."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


_CHART = Frame(width=376, height=190, left=42, right=368, top=8, bottom=166)


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
class Tick:
    """A named place on an axis."""

    at: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendKey:
    """A colour and what it stands for."""

    name: str
    color: str
    """The class of the colour."""
    value: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one series looks like."""

    color: str
    """The classes of the colour."""
    lines: Sequence[str] = ()
    """Points of one polyline each; a gap starts another."""
    dots: Sequence[tuple[str, str]] = ()
    """Centres."""
    bars: str = ""
    """A path of one rectangle per step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedChart:
    """A chart as its template draws it."""

    title: str
    unit: str
    summary: str
    """The chart in a sentence, for those who do not see it."""
    frame: Frame
    value_ticks: Sequence[Tick]
    step_ticks: Sequence[Tick]
    shapes: Sequence[Shape]
    bound: Tick | None
    legend: Sequence[LegendKey]
    plot: Mapping[str, Any]
    """The numbers for the pointer, as JSON for report.js."""


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


def hue(index: int) -> int:
    """The colour of the index-th of several things of different kind."""
    return index % COLORS


def shade(index: int) -> int:
    """The colour of the index-th of several things in an order; all from the last shade on look the same."""
    return COLORS + min(index, SHADES - 1)


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


def place_chart(chart: Chart) -> PlacedChart | None:
    """The chart with every coordinate worked out, or None when no series has a value."""
    series = [line for line in chart.series if any(value is not None for value in line.values)]
    if not series:
        return None
    half = 0.5 if chart.stacked or len(chart.steps) == 1 else 0.0
    x = Scale(low=min(chart.steps) - half, high=max(chart.steps) + half, start=_CHART.left, end=_CHART.right)
    y = _value_scale(chart, series)
    shapes = (
        _stacked(chart.steps, series, x, y) if chart.stacked else [_line(line, chart.steps, x, y) for line in series]
    )
    bound = chart.bound
    return PlacedChart(
        title=chart.title,
        unit=chart.unit,
        summary=_summary(chart, series),
        frame=_CHART,
        value_ticks=[Tick(at=f"{y(value):.1f}", name=compact(value)) for value in ticks(y.low, y.high)],
        step_ticks=[Tick(at=f"{x(step):.1f}", name=str(step)) for step in _step_ticks(chart.steps)],
        shapes=shapes,
        bound=None if bound is None else Tick(at=f"{y(bound):.1f}", name=f"{chart.bound_name} {compact(bound)}"),
        legend=[
            LegendKey(name=line.name, color=f"c{line.color}", value=compact(_last(line)))
            for line in series
            if not line.faint
        ],
        plot=_plot_data(chart, series, x),
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
    return Scale(low=low, high=high, start=_CHART.bottom, end=_CHART.top)


def _step_ticks(steps: Sequence[int]) -> list[int]:
    low, high = min(steps), max(steps)
    if high - low < 6:
        return list(range(low, high + 1))
    return [round(value) for value in ticks(low, high, 6) if value == round(value)]


def _line(line: Series, steps: Sequence[int], x: Scale, y: Scale) -> Shape:
    runs: list[list[tuple[str, str]]] = [[]]
    for step, value in zip(steps, line.values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((f"{x(step):.1f}", f"{y(value):.1f}"))
    # A single value between two gaps would be a line without length.
    apart = [line.dots or len(run) == 1 for run in runs]
    return Shape(
        color=f"c{line.color}" + (" faint" if line.faint else ""),
        lines=[" ".join(map(",".join, run)) for run, single in zip(runs, apart, strict=True) if run and not single],
        dots=[point for run, single in zip(runs, apart, strict=True) if single for point in run],
    )


def _stacked(steps: Sequence[int], series: Sequence[Series], x: Scale, y: Scale) -> list[Shape]:
    gaps = [after - before for before, after in pairwise(steps)]
    slot = (x.end - x.start) / (x.high - x.low) * min(gaps, default=1)
    width = max(0.8, min(slot * (0.82 if slot > 5 else 1.0), 60.0))
    floors = [0.0] * len(steps)
    shapes = []
    for line in series:
        bars = []
        for index, step in enumerate(steps):
            value = line.values[index] or 0.0
            if value > 0:
                top, bottom = y(floors[index] + value), y(floors[index])
                bars.append(f"M{x(step) - width / 2:.1f},{top:.1f}h{width:.1f}v{bottom - top:.1f}h-{width:.1f}z")
                floors[index] += value
        shapes.append(Shape(color=f"c{line.color}", bars="".join(bars)))
    return shapes


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


def _plot_data(chart: Chart, series: Sequence[Series], x: Scale) -> dict[str, Any]:
    return {
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
    }
