import json
from pathlib import Path

from trl_ray.observe.trace import TraceFile, chrome_trace, export_chrome_trace, idle_shares, merged, read_trace
from trl_ray.types import Span


def _span(actor: str, name: str, start: float, end: float) -> Span:
    return Span(actor=actor, name=name, start=start, end=end)


SPANS = [
    _span("learner", "step", 10.0, 14.0),
    _span("learner", "wait", 14.0, 20.0),
    _span("rollout-0", "generate", 10.0, 15.0),
    _span("rollout-0", "generate", 12.0, 18.0),
]


def test_overlapping_spans_count_once_and_waiting_is_idle() -> None:
    learner, rollout = idle_shares(SPANS)
    assert (learner.actor, learner.busy, learner.idle) == ("learner", 0.4, 0.6)
    assert learner.by_name == {"step": 0.4, "wait": 0.6}
    assert (rollout.busy, rollout.by_name) == (0.8, {"generate": 0.8})


def test_shares_of_a_window_cut_spans_at_its_edges() -> None:
    learner, rollout = idle_shares(SPANS, start=12.0, end=16.0)
    assert (learner.busy, rollout.busy) == (0.5, 1.0)
    assert idle_shares([]) == []


def test_touching_intervals_merge() -> None:
    assert merged([(3.0, 4.0), (0.0, 1.0), (1.0, 2.0)]) == [(0.0, 2.0), (3.0, 4.0)]


def test_a_trace_is_read_back_without_torn_or_impossible_lines(tmp_path: Path) -> None:
    sink = TraceFile(tmp_path / "trace.jsonl")
    sink.spans(SPANS)
    sink.close()
    with (tmp_path / "trace.jsonl").open("a") as stream:
        stream.write('{"actor":"x","name":"y","start":5,"end":4}\n{"actor":"x","na')
    assert list(read_trace(tmp_path / "trace.jsonl")) == sorted(SPANS, key=lambda span: span.start)


def test_the_chrome_trace_gives_overlapping_spans_lanes_of_their_own(tmp_path: Path) -> None:
    events = [event for event in chrome_trace(SPANS)["traceEvents"] if event["ph"] == "X"]
    rollout = [event for event in events if event["name"] == "generate"]
    assert [(event["ts"], event["dur"], event["tid"]) for event in rollout] == [(0.0, 5e6, 1), (2e6, 6e6, 2)]
    assert [event["tid"] for event in events if event["pid"] == 1] == [1, 1]
    target = export_chrome_trace(tmp_path / "missing.jsonl", tmp_path / "chrome.json")
    assert json.loads(target.read_text())["traceEvents"] == []
