"""Best, middle and worst completion of the first, middle and last step, side by side.

RunData.samples -> step_samples -> StepSamples(samples) -> templates/completions.html.jinja
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trl_ray.observe.completions import PART_PREFIX
from trl_ray.observe.report.chart_layout import compact
from trl_ray.observe.report.report_data import RunData, Samples, shortened
from trl_ray.observe.report.report_summary import Pill
from trl_ray.observe.run_files import parse_json

_MAX_TEXT = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCard:
    """One completion, its prompt, and what was made of it."""

    pills: Sequence[Pill]
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """The completions shown of one step."""

    step: int
    summary: str
    samples: Sequence[SampleCard]


def step_samples(run: RunData) -> list[StepSamples]:
    """One column per step that was read."""
    return [_of_step(samples) for samples in run.samples]


def _of_step(samples: Samples) -> StepSamples:
    ranked = sorted(samples.rows, key=lambda row: _number(row.get("reward"), float("-inf")), reverse=True)
    rewards = [row["reward"] for row in ranked if row.get("reward") is not None]
    chosen = sorted({0, len(ranked) // 2, len(ranked) - 1}) if ranked else []
    count = f"{len(ranked)} completions"
    return StepSamples(
        step=samples.step,
        summary=f"mean reward {fmean(rewards):.3f}, {count}" if rewards else count,
        samples=[_sample(ranked[index]) for index in chosen],
    )


def _sample(row: Mapping[str, Any]) -> SampleCard:
    reward = row.get("reward")
    style = "plain" if reward is None else "good" if reward > 0 else "bad"
    pills = [Pill(text=f"reward {_short(reward)}", style=style)]
    pills += [
        Pill(text=f"{name.removeprefix(PART_PREFIX)} {_short(value)}", style="plain")
        for name, value in row.items()
        if name.startswith(PART_PREFIX)
    ]
    pills += [Pill(text=f"{name} {_short(row.get(name))}", style="plain") for name in ("advantage", "age")]
    if row.get("finish_reason") == "length":
        pills.append(Pill(text="truncated", style="warn"))
    return SampleCard(
        pills=pills,
        prompt=shortened(_prompt(str(row.get("prompt", ""))), _MAX_TEXT),
        completion=shortened(str(row.get("completion", "")), _MAX_TEXT),
    )


def _prompt(text: str) -> str:
    messages = parse_json(text) if text.startswith("[") else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return text
    return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in messages)


def _number(value: Any, missing: float) -> float:
    return float(value) if isinstance(value, int | float) and value == value else missing


def _short(value: Any) -> str:
    return compact(value) if isinstance(value, int | float) else "none"
