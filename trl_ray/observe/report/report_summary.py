"""The top of the report: name and status, the numbers one looks for first, and the balance of the ledger.

RunData -> header | tiles | ledger -> templates/{header,tiles,ledger}.html.jinja
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from trl_ray.observe.console import duration
from trl_ray.observe.report.chart_layout import compact
from trl_ray.observe.report.report_data import RunData, Status
from trl_ray.types import EventKind

_STATUS_STYLE = {
    Status.FINISHED: "good",
    Status.FAILED: "bad",
    Status.INTERRUPTED: "warn",
    Status.UNFINISHED: "plain",
}
_ENDS_OF_RUN = 5
_HELD_OUT = (
    ("eval/loss", "Held-out loss"),
    ("eval/accuracy", "Held-out accuracy"),
    ("eval/rewards/accuracies", "Held-out accuracy"),
    ("eval/mean_token_accuracy", "Held-out token accuracy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pill:
    """A few words on a coloured ground."""

    text: str
    style: str
    """good, bad, warn or plain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The name of the run, how it stands, and facts about it."""

    name: str
    status: Pill
    facts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number, what it is, and what to compare it with."""

    label: str
    value: str
    note: str
    pill: Pill | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerShare:
    """A part of all that was issued."""

    name: str
    count: int
    color: str
    left: float
    """Where the part starts in the bar, a fraction."""
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCard:
    """issued = trained + dropped + live, and what the dropped and live ones are."""

    what: str
    issued: int
    shares: Sequence[LedgerShare]
    pill: Pill
    dropped: Sequence[tuple[str, int]]
    live: Sequence[tuple[str, int]]


def header(run: RunData) -> Header:
    """Name, status, model, start and length."""
    facts = []
    if run.config.get("model_name_or_path"):
        facts.append(str(run.config["model_name_or_path"]))
    moments = run.moments
    if moments is not None:
        facts.append("started " + time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moments[0])))
        facts.append("lasted " + duration(moments[1] - moments[0]))
    return Header(name=run.name, status=Pill(text=run.status.value, style=_STATUS_STYLE[run.status]), facts=facts)


def tiles(run: RunData) -> list[Tile]:
    """Steps, reward, staleness, throughput and waiting, one tile each."""
    total = run.total_steps
    step = int(run.rows[-1]["step"]) if run.rows else 0
    shown = [Tile(label="Optimizer steps", value=str(step), note=f"of {total}" if total else "")]
    shown += [*_reward_tile(run), *_held_out_tiles(run), *_staleness_tile(run)]
    for name in ("trained", "generated", "seen"):
        rates = run.present(f"throughput/{name}_tokens_per_s")
        if rates:
            shown.append(Tile(label=f"Tokens/s {name}", value=compact(fmean(rates)), note="mean over steps"))
    waited = sum(run.present("time/wait_s"))
    worked = sum(run.present("time/step_s")) + sum(run.present("time/publish_s"))
    if waited + worked > 0:
        share, note = f"{waited / (waited + worked):.0%}", f"{duration(waited)} in all"
        shown.append(Tile(label="Learner waited", value=share, note=note))
    return shown


def _reward_tile(run: RunData) -> list[Tile]:
    rewards = run.present("reward/mean")
    if not rewards:
        return []
    last, first = fmean(rewards[-_ENDS_OF_RUN:]), fmean(rewards[:_ENDS_OF_RUN])
    count = min(_ENDS_OF_RUN, len(rewards))
    note = f"mean of last {count}, {last - first:+.3f} on the first {count}" if count > 1 else "of the only step"
    return [Tile(label="Final reward", value=f"{last:.3f}", note=note)]


def _staleness_tile(run: RunData) -> list[Tile]:
    ages, bound = run.present("staleness/max"), run.max_age_at_use
    if not ages:
        return []
    pill = None if bound is None else _check(max(ages) <= bound, good=f"bound {bound}", bad=f"bound {bound}")
    return [Tile(label="Worst staleness", value=compact(max(ages)), note="optimizer steps", pill=pill)]


def _held_out_tiles(run: RunData) -> list[Tile]:
    """Loss and accuracy on held-out examples: the last, and what it was at first."""
    shown = []
    for key, label in _HELD_OUT:
        told = [event["detail"].get(key) for event in run.events if event.get("kind") == EventKind.EVALUATED]
        values = [value for value in told if isinstance(value, int | float)]
        if values:
            note = f"{values[-1] - values[0]:+.3f} on the first evaluation"
            shown.append(Tile(label=label, value=f"{values[-1]:.3f}", note=note))
    return shown


def _check(holds: bool, *, good: str, bad: str) -> Pill:
    return Pill(text=f"✓ {good}", style="good") if holds else Pill(text=f"✗ {bad}", style="bad")


def ledger(run: RunData) -> LedgerCard | None:
    """The balance, or None for a run without a ledger."""
    book = run.ledger
    if book is None:
        return None
    dropped, live = sum(book.dropped.values()), sum(book.live.values())
    gap = book.issued - book.trained - dropped - live
    shares: list[LedgerShare] = []
    left = 0.0
    for name, count, color in (("trained", book.trained, "c2"), ("dropped", dropped, "c1"), ("live", live, "c0")):
        share = count / max(book.issued, 1)
        shares.append(LedgerShare(name=name, count=count, color=color, left=left, share=share))
        left += share
    return LedgerCard(
        # Prompts come in groups; a dataset that is trained on has rows.
        what="rows" if run.present("examples/trained") else "groups",
        issued=book.issued,
        shares=shares,
        pill=_check(book.balanced, good="balanced", bad=f"unbalanced: {gap:+d} unaccounted for"),
        dropped=_by_count(book.dropped),
        live=_by_count(book.live),
    )


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), count) for name, count in sorted(counts.items(), key=lambda pair: -pair[1])]
