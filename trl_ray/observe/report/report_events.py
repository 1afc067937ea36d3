"""What happened to whom: losses and failures first, then what else deserves attention, the rest folded away.

RunData.events -> events -> EventLists(attention, ordinary) -> templates/events.html.jinja
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ray.observe.console import duration
from trl_ray.observe.report.report_data import MAX_EVENTS, RunData, shortened
from trl_ray.observe.report.report_summary import Pill
from trl_ray.types import DropReason, EventKind

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
_MAX_DETAIL = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One event."""

    after: str
    kind: Pill
    actor: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTable:
    """Events in the order they are shown, the first few hundred of them."""

    rows: Sequence[EventRow]
    left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLists:
    """What deserves attention, and the rest with a count of each kind."""

    attention: EventTable
    ordinary: EventTable
    ordinary_count: int
    ordinary_kinds: str


def events(run: RunData) -> EventLists | None:
    """The events of the run, or None when it has none."""
    if not run.events:
        return None
    start = run.moments[0] if run.moments else 0.0
    attention = sorted(filter(_deserves_attention, run.events), key=lambda event: event["kind"] not in _LOSSES)
    rest = [event for event in run.events if not _deserves_attention(event)]
    counts = Counter(str(event["kind"]).replace("_", " ") for event in rest)
    counts.update({kind.replace("_", " "): count for kind, count in run.more_events.items()})
    more = sum(run.more_events.values())
    return EventLists(
        attention=_table(attention, start),
        ordinary=_table(rest, start, more),
        ordinary_count=len(rest) + more,
        ordinary_kinds=", ".join(f"{count} {name}" for name, count in counts.most_common()),
    )


def _deserves_attention(event: Mapping[str, Any]) -> bool:
    detail = event.get("detail")
    reason = detail.get("reason") if isinstance(detail, Mapping) else None
    ordinary = event["kind"] == EventKind.GROUP_DROPPED and isinstance(reason, str) and reason in _ORDINARY_DROPS
    return event["kind"] in _ATTENTION and not ordinary


def _table(shown: Sequence[Mapping[str, Any]], start: float, more: int = 0) -> EventTable:
    rows = [_row(event, start) for event in shown[:MAX_EVENTS]]
    return EventTable(rows=rows, left_out=len(shown) - len(rows) + more)


def _row(event: Mapping[str, Any], start: float) -> EventRow:
    kind, moment = str(event["kind"]), event.get("time")
    style = "bad" if kind in _LOSSES else "warn" if _deserves_attention(event) else "plain"
    return EventRow(
        after=f"+{duration(moment - start)}" if isinstance(moment, int | float) else "",
        kind=Pill(text=kind.replace("_", " "), style=style),
        actor=str(event.get("actor", "")),
        detail=_detail(event.get("detail")),
    )


def _detail(detail: Any) -> str:
    if not isinstance(detail, Mapping):
        return ""
    told = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in detail.values())
    return shortened("  ".join(f"{key}={value}" for key, value in zip(detail, told, strict=True)), _MAX_DETAIL)
