"""Keeps what an actor has to tell until the driver asks for it.

actor -> event, span -> ActorLog -> drain -> ActorReport -> driver -> events.jsonl, trace.jsonl
"""

from __future__ import annotations

from collections.abc import Callable

from trl_ray.types import ActorReport, Event, EventKind, Span, steady_time


class ActorLog:
    """Events and spans of one actor since it was last asked, oldest first."""

    def __init__(self, actor: str, clock: Callable[[], float] = steady_time) -> None:
        """Start empty.

        Args:
            actor: how events and spans name it.
            clock: seconds since the epoch.
        """
        self._actor, self._clock = actor, clock
        self._events: list[Event] = []
        self._spans: list[Span] = []

    def event(self, kind: EventKind, /, **detail: object) -> None:
        """Something that happens now; `detail` are JSON values."""
        self._events.append(Event(kind=kind, actor=self._actor, time=self._clock(), detail=detail))

    def span(self, name: str, begin: float) -> Span:
        """Work that began at `begin`, in seconds since the epoch, and ends now."""
        span = Span(actor=self._actor, name=name, start=begin, end=self._clock())
        self._spans.append(span)
        return span

    def drain(self) -> ActorReport:
        """Hand over everything; from then on it is the driver's."""
        events, self._events = self._events, []
        spans, self._spans = self._spans, []
        return ActorReport(events=tuple(events), spans=tuple(spans))
