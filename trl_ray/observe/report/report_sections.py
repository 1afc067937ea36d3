"""The report's sections besides the curves: tiles, ledger, timeline, events, completions, configuration.

RunData -> header | ledger | timeline | events | completions | configuration -> HTML text, all of it escaped
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from trl_ray.observe.completions import PART_PREFIX
from trl_ray.observe.console import duration
from trl_ray.observe.report.report_data import RunData, Samples, Status
from trl_ray.observe.report.svg import Bar, Lane, compact, draw_timeline, escape, hue
from trl_ray.observe.run_files import parse_json
from trl_ray.observe.trace import idle_shares, is_waiting, merged
from trl_ray.types import DropReason, EventKind, Span

_STATUS_STYLE = {
    Status.FINISHED: "good",
    Status.FAILED: "bad",
    Status.INTERRUPTED: "warn",
    Status.UNFINISHED: "plain",
}
_LOSSES = frozenset({EventKind.RUN_FAILED, EventKind.ACTOR_LOST})
_ATTENTION = _LOSSES | {
    EventKind.ACTOR_RESTARTED,
    EventKind.WARNING,
    EventKind.LEASE_EXPIRED,
    EventKind.GROUP_REISSUED,
    EventKind.GROUP_DROPPED,
    EventKind.REWARD_FAILED,
    EventKind.TEACHER_FAILED,
    EventKind.WAITING,
    EventKind.INTERRUPTED,
}
# Drops that a healthy run makes: what was still on its way at the end, and what the user asked to drop.
_ORDINARY_DROPS = frozenset({DropReason.END_OF_RUN, DropReason.ZERO_VARIANCE})
_ENDS_OF_RUN = 5
_HELD_OUT = (
    ("eval/loss", "Held-out loss"),
    ("eval/accuracy", "Held-out accuracy"),
    ("eval/rewards/accuracies", "Held-out accuracy"),
    ("eval/mean_token_accuracy", "Held-out token accuracy"),
)
_TIMELINE_STEPS = 8
_TIMELINE_FALLBACK_S = 120.0
_MAX_EVENTS = 400
_MAX_TEXT = 1500
_SAMPLES_PER_STEP = 3


def header(run: RunData) -> str:
    """Name, status, and the few numbers one looks for first."""
    moments = run.moments
    facts = []
    if run.config.get("model_name_or_path"):
        facts.append(str(run.config["model_name_or_path"]))
    if moments is not None:
        facts.append("started " + time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moments[0])))
        facts.append("lasted " + duration(moments[1] - moments[0]))
    status = run.status
    subtitle = " · ".join(map(escape, facts))
    return (
        f'<header class="top"><div><div class="headline"><h1>{escape(run.name)}</h1>'
        f'<span class="pill {_STATUS_STYLE[status]}">{escape(status.value)}</span></div>'
        f'<p class="sub">{subtitle}</p></div></header>'
    )


def tiles(run: RunData) -> str:
    """Steps, reward, staleness, throughput and waiting, one tile each."""
    rewards, total = run.present("reward/mean"), run.total_steps
    step = int(run.rows[-1]["step"]) if run.rows else 0
    shown = [_tile("Optimizer steps", str(step), f"of {total}" if total else "")]
    if rewards:
        last, first = fmean(rewards[-_ENDS_OF_RUN:]), fmean(rewards[:_ENDS_OF_RUN])
        count = min(_ENDS_OF_RUN, len(rewards))
        note = f"mean of last {count}, {last - first:+.3f} on the first {count}" if count > 1 else "of the only step"
        shown.append(_tile("Final reward", f"{last:.3f}", note))
    shown += _held_out_tiles(run)
    worst = run.present("staleness/max")
    if worst:
        bound = run.max_age_at_use
        mark = "" if bound is None else _mark(max(worst) <= bound, good=f"bound {bound}", bad=f"bound {bound}")
        shown.append(_tile("Worst staleness", compact(max(worst)), "optimizer steps", mark))
    for name in ("trained", "generated", "seen"):
        rates = run.present(f"throughput/{name}_tokens_per_s")
        if rates:
            shown.append(_tile(f"Tokens/s {name}", compact(fmean(rates)), "mean over steps"))
    waited = sum(run.present("time/wait_s"))
    worked = sum(run.present("time/step_s")) + sum(run.present("time/publish_s"))
    if waited + worked > 0:
        shown.append(_tile("Learner waited", f"{waited / (waited + worked):.0%}", f"{duration(waited)} in all"))
    return f'<div class="tiles">{"".join(shown)}</div>'


def _held_out_tiles(run: RunData) -> list[str]:
    """Loss and accuracy on held-out examples: the last, and what it was at first."""
    tiles = []
    for key, label in _HELD_OUT:
        told = [event["detail"].get(key) for event in run.events if event.get("kind") == EventKind.EVALUATED]
        values = [value for value in told if isinstance(value, int | float)]
        if values:
            tiles.append(_tile(label, f"{values[-1]:.3f}", f"{values[-1] - values[0]:+.3f} on the first evaluation"))
    return tiles


def _tile(label: str, value: str, note: str, mark: str = "") -> str:
    return (
        f'<div class="card tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)} {mark}</div></div>'
    )


def _mark(holds: bool, *, good: str, bad: str) -> str:
    return f'<span class="pill {"good" if holds else "bad"}">{"✓ " + good if holds else "✗ " + bad}</span>'


def ledger(run: RunData) -> str:
    """issued = trained + dropped + live, and what the dropped and live ones are."""
    if run.ledger is None:
        return '<p class="empty">This run has no ledger.json.</p>'
    book = run.ledger
    dropped, live = sum(book.dropped.values()), sum(book.live.values())
    gap = book.issued - book.trained - dropped - live
    mark = _mark(book.balanced, good="balanced", bad=f"unbalanced: {gap:+d} unaccounted for")
    # Prompts come in groups; a dataset that is trained on has rows.
    what = "rows" if run.present("examples/trained") else "groups"
    rows = [("trained", book.trained, "c2"), ("dropped", dropped, "c1"), ("live", live, "c0")]
    return (
        f'<div class="card"><div class="equation"><b>{book.issued}</b> <span>{what} issued</span> = '
        f"<b>{book.trained}</b> <span>trained</span> + <b>{dropped}</b> <span>dropped</span> + <b>{live}</b> "
        f"<span>live</span> {mark}</div>{_proportions(rows, book.issued)}"
        f'<div class="split">{_counts("Dropped by reason", book.dropped, "Nothing dropped.")}'
        f"{_counts('Live by state', book.live, 'Nothing on its way.')}</div></div>"
    )


def _proportions(rows: Sequence[tuple[str, int, str]], whole: int) -> str:
    left, bars, keys = 0.0, "", ""
    for name, count, color in rows:
        share = count / max(whole, 1)
        bars += f'<rect class="bar {color}" x="{1000 * left:.1f}" width="{1000 * share:.1f}" height="12"/>'
        keys += f'<li><i class="key {color}"></i>{name} <b>{share:.1%}</b></li>'
        left += share
    return (
        '<svg class="ledger-bar" viewBox="0 0 1000 12" preserveAspectRatio="none" aria-hidden="true">'
        f'{bars}</svg><ul class="legend">{keys}</ul>'
    )


def _counts(title: str, counts: Mapping[str, int], none: str) -> str:
    if not counts:
        return f'<div><h3>{title}</h3><p class="empty">{none}</p></div>'
    rows = "".join(
        f'<tr><td>{escape(name.replace("_", " "))}</td><td class="number">{count}</td></tr>'
        for name, count in sorted(counts.items(), key=lambda pair: -pair[1])
    )
    return f"<div><h3>{title}</h3><table>{rows}</table></div>"


def timeline(run: RunData) -> str:
    """What each actor did in the last steps, and how busy each was over the run."""
    if not run.spans:
        return '<p class="empty">This run has no trace.jsonl.</p>'
    ends = [(row["time"], f"step {int(row['step'])}") for row in run.rows if "time" in row]
    finish = max(span.end for span in run.spans)
    start = ends[-1 - _TIMELINE_STEPS][0] if len(ends) > _TIMELINE_STEPS else min(span.start for span in run.spans)
    if not ends:
        start = max(start, finish - _TIMELINE_FALLBACK_S)
    if finish <= start:
        start = finish - 1.0
    inside = [span for span in run.spans if span.end > start]
    names = list(dict.fromkeys(span.name for span in run.spans if not is_waiting(span.name)))
    by_actor: dict[str, list[Span]] = {actor: [] for actor in sorted({span.actor for span in run.spans})}
    for span in inside:
        by_actor[span.actor].append(span)
    lanes = [_lane(actor, spans, names, finish - start) for actor, spans in by_actor.items()]
    marks = [(moment, name) for moment, name in ends if start < moment <= finish]
    drawing = draw_timeline(lanes, start=start, end=finish, marks=marks)
    keys = "".join(f'<li><i class="key c{hue(index)}"></i>{escape(name)}</li>' for index, name in enumerate(names))
    keys += '<li><i class="key waiting"></i>waiting</li>' if any(is_waiting(span.name) for span in run.spans) else ""
    return (
        f'<div class="card"><h3>Last {duration(finish - start)}</h3><div class="scroll">{drawing}</div>'
        f'<ul class="legend">{keys}</ul></div>{_shares(run.spans)}'
    )


def _lane(actor: str, spans: Sequence[Span], names: Sequence[str], window: float) -> Lane:
    bars = []
    lengths: Counter[str] = Counter()
    for span in spans:
        lengths[span.name] += 1 + int(1000 * (span.end - span.start))
    for name, _ in lengths.most_common():  # the longest first, so that short ones lie on top
        color = None if is_waiting(name) else hue(names.index(name))
        # Gaps too narrow to see are closed: a long run must not become a file of a million rectangles.
        close = window / 600
        for begin, end in merged((span.start, span.end + close) for span in spans if span.name == name):
            bars.append(Bar(start=begin, end=end - close, name=name, color=color))
    return Lane(name=actor, bars=bars)


def _shares(spans: Sequence[Span]) -> str:
    rows = []
    for share in idle_shares(spans):
        parts = sorted(share.by_name.items(), key=lambda pair: -pair[1])
        told = " · ".join(f"{escape(name)} {fraction:.0%}" for name, fraction in parts)
        bar = (
            '<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            '<rect class="track" width="100" height="10"/>'
            f'<rect class="bar c0" width="{100 * share.busy:.1f}" height="10"/></svg>'
        )
        rows.append(
            f'<tr><td>{escape(share.actor)}</td><td>{bar}</td><td class="number">{share.busy:.0%}</td>'
            f'<td class="number">{share.idle:.0%}</td><td class="detail">{told}</td></tr>'
        )
    return (
        '<h3 class="section">Whole run</h3><div class="card scroll"><table><thead><tr><th>Actor</th>'
        '<th>Share of the run</th><th class="number">Busy</th><th class="number">Idle</th>'
        f"<th>By kind of work, which may overlap</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def events(run: RunData) -> str:
    """Losses and failures first, then what else deserves attention; the rest folded away."""
    if not run.events:
        return '<p class="empty">This run has no events.jsonl.</p>'
    start = run.moments[0] if run.moments else 0.0
    attention = sorted(
        (event for event in run.events if _deserves_attention(event)), key=lambda event: event["kind"] not in _LOSSES
    )
    rest = [event for event in run.events if not _deserves_attention(event)]
    counts = Counter(str(event["kind"]).replace("_", " ") for event in rest)
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    calm = '<p class="empty">Nothing was lost, restarted, dropped or warned about.</p>'
    return (
        f'<div class="card">{_event_table(attention, start) if attention else calm}</div>'
        f'<details class="card fold"><summary>{len(rest)} ordinary events</summary><p class="sub">{escape(told)}</p>'
        f"{_event_table(rest, start)}</details>"
    )


def _deserves_attention(event: Mapping[str, Any]) -> bool:
    detail = event.get("detail")
    reason = detail.get("reason") if isinstance(detail, Mapping) else None
    ordinary = event["kind"] == EventKind.GROUP_DROPPED and isinstance(reason, str) and reason in _ORDINARY_DROPS
    return event["kind"] in _ATTENTION and not ordinary


def _event_table(shown: Sequence[Mapping[str, Any]], start: float) -> str:
    rows = []
    for event in shown[:_MAX_EVENTS]:
        kind = str(event["kind"])
        style = "bad" if kind in _LOSSES else "warn" if _deserves_attention(event) else "plain"
        moment = event.get("time")
        at = f"+{duration(moment - start)}" if isinstance(moment, int | float) else ""
        rows.append(
            f'<tr><td class="number">{at}</td><td><span class="pill {style}">{escape(kind.replace("_", " "))}</span>'
            f"</td><td>{escape(event.get('actor', ''))}</td>"
            f'<td class="detail">{escape(_detail(event.get("detail")))}</td></tr>'
        )
    left_out = len(shown) - len(rows)
    more = f'<p class="sub">{left_out} more in events.jsonl.</p>' if left_out > 0 else ""
    return (
        '<div class="scroll"><table><thead><tr><th class="number">After</th><th>Event</th><th>Actor</th><th>Detail</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}"
    )


def _detail(detail: Any) -> str:
    if not isinstance(detail, Mapping):
        return ""
    told = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in detail.values())
    return _cut("  ".join(f"{key}={value}" for key, value in zip(detail, told, strict=True)), 400)


def completions(run: RunData) -> str:
    """Best, middle and worst completion of the first, middle and last step, side by side."""
    if not run.samples:
        return '<p class="empty">This run has no completions.</p>'
    return f'<div class="samples">{"".join(map(_step_samples, run.samples))}</div>'


def _step_samples(samples: Samples) -> str:
    ranked = sorted(samples.rows, key=lambda row: _number(row.get("reward"), float("-inf")), reverse=True)
    rewards = [row["reward"] for row in ranked if row.get("reward") is not None]
    chosen = sorted({0, len(ranked) // 2, len(ranked) - 1})[:_SAMPLES_PER_STEP] if ranked else []
    mean = f"mean reward {fmean(rewards):.3f}, {len(ranked)} completions" if rewards else f"{len(ranked)} completions"
    return (
        f'<section class="card"><h3>Step {samples.step} <span class="unit">{mean}</span></h3>'
        f"{''.join(_sample(ranked[index]) for index in chosen)}</section>"
    )


def _sample(row: Mapping[str, Any]) -> str:
    reward = row.get("reward")
    style = "plain" if reward is None else "good" if reward > 0 else "bad"
    chips = [f'<span class="pill {style}">reward {_short(reward)}</span>']
    chips += [
        f'<span class="pill plain">{escape(name.removeprefix(PART_PREFIX))} {_short(value)}</span>'
        for name, value in row.items()
        if name.startswith(PART_PREFIX)
    ]
    chips += [f'<span class="pill plain">advantage {_short(row.get("advantage"))}</span>']
    chips += [f'<span class="pill plain">age {_short(row.get("age"))}</span>']
    if row.get("finish_reason") == "length":
        chips.append('<span class="pill warn">truncated</span>')
    return (
        f'<div class="sample"><div class="chips">{"".join(chips)}</div><p class="who">Prompt</p>'
        f'<pre class="prompt" dir="auto">{escape(_cut(_prompt(str(row.get("prompt", "")))))}</pre>'
        f'<p class="who">Completion</p><pre dir="auto">{escape(_cut(str(row.get("completion", ""))))}</pre></div>'
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


def _cut(text: str, limit: int = _MAX_TEXT) -> str:
    return text if len(text) <= limit else text[:limit] + f"… ({len(text) - limit} more characters)"


def configuration(run: RunData) -> str:
    """The resolved options, without secrets."""
    if not run.config:
        return '<p class="empty">This run has no config.yaml that can be read.</p>'
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)
    summary = f"<summary>{len(run.config)} options</summary>"
    return f'<details class="card">{summary}<pre class="config">{escape(text)}</pre></details>'
