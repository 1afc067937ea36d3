"""Chooses what the report plots: one card per question a person asks of a run, in the order they ask it.

RunData.rows -> curves -> Chart, Chart, ... -> place_chart -> templates/curves.html.jinja
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trl_ray.observe.report.chart_layout import Chart, PlacedChart, Series, hue, place_chart, shade
from trl_ray.observe.report.report_data import RunData, thinned
from trl_ray.types import EventKind

_SMOOTHING_FRACTION = 0.1
_PART = re.compile(r"reward/(.+)/mean")
_HELD_OUT_REWARD = re.compile(r"eval/(.+)_reward")
_HELD_OUT_LOSS = re.compile(r"eval/(.+)(?<!_nll)_loss")
_HISTOGRAM = re.compile(r"staleness/hist_(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """A card that plots keys as they are: (key, name) pairs."""

    title: str
    keys: tuple[tuple[str, str], ...]
    unit: str = ""
    stacked: bool = False
    smoothed: bool = False
    held_out: bool = False
    """Whether values on held-out examples (``eval/`` and the key) are shown as dots."""
    held_out_as: str | None = None
    """Their key, where it is another than the only one of the card."""


_AFTER_REWARDS = (
    _Plain(title="Loss", keys=(("loss", "loss"),), smoothed=True, held_out=True),
    _Plain(
        title="Accuracy",
        unit="fraction",
        held_out=True,
        keys=(
            ("accuracy", "preferred or right"),
            ("rewards/accuracies", "chosen above rejected"),
            ("mean_token_accuracy", "most probable token"),
        ),
    ),
    _Plain(
        title="Implicit reward",
        keys=(("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin")),
    ),
    _Plain(
        title="Predicted reward",
        keys=(("mean_reward", "mean"), ("min_reward", "least"), ("max_reward", "greatest"), ("margin", "margin")),
    ),
    _Plain(
        title="Log-probability",
        unit="nats per completion",
        keys=(("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
    ),
    _Plain(title="Gradient norm", keys=(("grad_norm", "before clipping"),)),
    _Plain(title="Entropy", keys=(("entropy", "policy"),), unit="nats per token"),
    _Plain(
        title="Divergence",
        unit="nats per token",
        keys=(("kl/sampler", "learner and sampler"), ("kl/ref", "policy and reference")),
    ),
    _Plain(
        title="Clipped and without signal",
        unit="fraction",
        keys=(
            ("clip/low", "clipped low"),
            ("clip/high", "clipped high"),
            ("advantage/zero_std_fraction", "groups with equal rewards"),
        ),
    ),
    _Plain(
        title="Student and teacher",
        unit="nats per token",
        held_out=True,
        keys=(
            ("distillation/log_ratio", "student above teacher"),
            ("self_distillation/logprob_abs_diff", "apart, either way"),
        ),
    ),
    _Plain(
        title="What the self-teacher is shown",
        unit="fraction",
        keys=(
            ("self_distillation/success_group_fraction", "groups with a success"),
            ("self_distillation/reprompt_sample_fraction", "completions with a hint"),
            ("self_distillation/feedback_used_fraction", "completions with feedback"),
        ),
    ),
)
_AFTER_STALENESS = (
    _Plain(
        title="Queue",
        unit="groups",
        keys=(("queue/ready", "ready"), ("queue/in_flight", "in flight"), ("queue/slots", "slots")),
    ),
    _Plain(
        title="Throughput",
        unit="tokens/s",
        keys=(
            ("throughput/trained_tokens_per_s", "trained"),
            ("throughput/generated_tokens_per_s", "generated"),
            ("throughput/seen_tokens_per_s", "seen"),
        ),
    ),
    _Plain(
        title="Time per step",
        unit="seconds",
        stacked=True,
        keys=(("time/step_s", "learner step"), ("time/wait_s", "waiting for groups"), ("time/publish_s", "publishing")),
    ),
    _Plain(
        title="Completion length",
        keys=(("completion/length_mean", "mean"),),
        unit="tokens",
        held_out=True,
        held_out_as="completions/mean_length",
    ),
    _Plain(
        title="Truncated completions",
        keys=(("completion/truncated_fraction", "truncated"),),
        unit="fraction",
        held_out=True,
        held_out_as="completions/clipped_ratio",
    ),
    _Plain(title="Learning rate", keys=(("lr", "learning rate"),)),
)


def curves(run: RunData) -> list[PlacedChart]:
    """All cards for which the run has numbers."""
    if not run.rows:
        return []
    run = replace(run, rows=thinned(run.rows))
    charts = [
        _rewards(run),
        _reward_parts(run),
        _sets(run),
        _own(run),
        *(_plain(run, card) for card in _AFTER_REWARDS),
        _staleness(run),
        _token_ages(run),
        *(_plain(run, card) for card in _AFTER_STALENESS),
    ]
    return [placed for placed in map(place_chart, charts) if placed is not None]


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Exponential moving average over about a tenth of the points, unbiased at the start; gaps stay gaps."""
    decay = 1.0 - 1.0 / max(1.0, len(values) * _SMOOTHING_FRACTION)
    total = weight = 0.0
    line: list[float | None] = []
    for value in values:
        if value is None:
            line.append(None)
            continue
        total, weight = decay * total + value, decay * weight + 1.0
        line.append(total / weight)
    return line


def _steps(run: RunData) -> list[int]:
    return [int(row["step"]) for row in run.rows]


def _with_smooth(name: str, values: Sequence[float | None], color: int) -> list[Series]:
    return [
        Series(name=name, values=values, color=color, faint=True),
        Series(name=f"{name}, smoothed", values=smoothed(values), color=color),
    ]


def _plain(run: RunData, card: _Plain) -> Chart:
    series = []
    for color, (key, name) in enumerate(card.keys):
        values = run.values(key)
        plain = [Series(name=name, values=values, color=color)]
        series += _with_smooth(name, values, color) if card.smoothed else plain
        evaluated = _evaluations(run, f"eval/{card.held_out_as or key}") if card.held_out else {}
        if evaluated:
            series.append(_dots(run, evaluated, name=f"{name}, held out", color=color + len(card.keys)))
    return Chart(title=card.title, unit=card.unit, steps=_steps(run), series=series, stacked=card.stacked)


def _rewards(run: RunData) -> Chart:
    series = _with_smooth("mean", run.values("reward/mean"), 0)
    for color, (name, key) in enumerate(_held_out_rewards(run), start=1):
        evaluated = _evaluations(run, key) if name else _evaluations(run, key, "eval/reward/mean", "reward/mean")
        if evaluated:
            series.append(_dots(run, evaluated, name=f"held out {name}".rstrip(), color=color))
    return Chart(title="Reward", steps=_steps(run), series=series)


def _sets(run: RunData) -> Chart:
    """The losses of held-out sets that have names."""
    keys = _evaluated_keys(run)
    # A set alone has no name; what else ends in `_loss` then is a number of its own.
    found = () if "eval/loss" in keys else keys
    named = [(match[1], key) for key in found if (match := _HELD_OUT_LOSS.fullmatch(key))]
    return _evaluated_chart(run, "Held-out loss by set", named)


def _own(run: RunData) -> Chart:
    """What the user's own `compute_metrics` said."""
    told = [event["detail"].get("own") for event in run.events if isinstance(event.get("detail"), dict)]
    names = dict.fromkeys(str(name) for found in told if isinstance(found, list) for name in found)
    return _evaluated_chart(run, "Metrics of your own", [(name, f"eval/{name}") for name in names])


def _evaluated_chart(run: RunData, title: str, named: Sequence[tuple[str, str]]) -> Chart:
    series = [
        _dots(run, _evaluations(run, key), name=name, color=hue(index)) for index, (name, key) in enumerate(named)
    ]
    return Chart(title=title, steps=_steps(run), series=series)


def _evaluated_keys(run: RunData) -> list[str]:
    told = [event.get("detail") for event in run.events if event.get("kind") == EventKind.EVALUATED]
    return list(dict.fromkeys(key for detail in told if isinstance(detail, dict) for key in detail))


def _held_out_rewards(run: RunData) -> list[tuple[str, str]]:
    """Names of the held-out sets, "" for one without, and the keys of their mean rewards."""
    named = [(match[1], key) for key in _evaluated_keys(run) if (match := _HELD_OUT_REWARD.fullmatch(key))]
    return [("", "eval/reward"), *named]


def _dots(run: RunData, evaluated: Mapping[int, float], *, name: str, color: int) -> Series:
    """Values by step; where rows were thinned, one belongs to the row that ends with or after its step."""
    steps = _steps(run)
    values: list[float | None] = [None] * len(steps)
    for step, value in evaluated.items():
        row = next((index for index, last in enumerate(steps) if last >= step), len(steps) - 1)
        values[row] = value
    return Series(name=name, values=values, color=color, dots=True)


def _evaluations(run: RunData, *keys: str) -> dict[int, float]:
    """By step, from the metrics (the first key) or what evaluations told (the first key they have)."""
    found = {int(row["step"]): row[keys[0]] for row in run.rows if keys[0] in row}
    for event in run.events:
        detail = event.get("detail")
        if event.get("kind") == EventKind.EVALUATED and isinstance(detail, dict):
            step = detail.get("step")
            values = (detail.get(key) for key in keys)
            value = next((value for value in values if isinstance(value, int | float)), None)
            if isinstance(step, int) and value is not None:
                found[step] = float(value)
    return found


def _reward_parts(run: RunData) -> Chart:
    keys = dict.fromkeys(key for row in run.rows for key in row if _PART.fullmatch(key))
    series = [Series(name=key[7:-5], values=run.values(key), color=hue(index)) for index, key in enumerate(keys)]
    for index, name in enumerate(key[7:-5] for key in keys):
        if evaluated := _evaluations(run, f"eval/rewards/{name}/mean"):
            series.append(_dots(run, evaluated, name=f"{name}, held out", color=hue(index)))
    return Chart(title="Reward by function", unit="mean", steps=_steps(run), series=series)


def _staleness(run: RunData) -> Chart:
    keys = (
        ("staleness/max", "oldest token"),
        ("staleness/mean", "mean"),
        ("staleness/in_flight", "in flight"),
        ("staleness/in_queue", "in queue"),
    )
    series = [Series(name=name, values=run.values(key), color=color) for color, (key, name) in enumerate(keys)]
    bound = run.max_age_at_use
    return Chart(
        title="Staleness",
        unit="optimizer steps",
        steps=_steps(run),
        series=series,
        bound=None if bound is None else float(bound),
    )


def _token_ages(run: RunData) -> Chart:
    keys = {int(match[1]) for row in run.rows for key in row if (match := _HISTOGRAM.fullmatch(key))}
    series = [
        Series(name=f"age {age}", values=run.values(f"staleness/hist_{age}"), color=shade(age)) for age in sorted(keys)
    ]
    return Chart(title="Token ages", unit="fraction", steps=_steps(run), series=series, stacked=True)
