import pytest

from trl_ray.actors.actor_log import ActorLog
from trl_ray.types import ActorReport, Event, EventKind, Span


def test_events_and_spans_are_told_once_in_their_order_and_end_when_they_are_told() -> None:
    moments = iter([10.0, 12.5, 13.0])
    log = ActorLog("reward-0", clock=lambda: next(moments))
    log.event(EventKind.REWARD_FAILED, kind="nan", actor="of the user", detail="x")
    span = log.span("score", 9.0)
    log.event(EventKind.WARNING)
    assert span == Span(actor="reward-0", name="score", start=9.0, end=12.5)
    assert log.drain() == ActorReport(
        events=(
            Event(
                kind=EventKind.REWARD_FAILED,
                actor="reward-0",
                time=10.0,
                detail={"kind": "nan", "actor": "of the user", "detail": "x"},
            ),
            Event(kind=EventKind.WARNING, actor="reward-0", time=13.0),
        ),
        spans=(span,),
    )
    assert log.drain() == ActorReport()


def test_an_event_that_happens_now_has_the_time_of_now_and_takes_any_name_of_detail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time", lambda: 42.0)
    event = Event.now(EventKind.WARNING, "driver", kind="a", actor="b", time="c")
    assert event == Event(
        kind=EventKind.WARNING, actor="driver", time=42.0, detail={"kind": "a", "actor": "b", "time": "c"}
    )
