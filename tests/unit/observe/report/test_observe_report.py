import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from trl_ray.errors import ConfigError
from trl_ray.observe import trace
from trl_ray.observe.observer import open_observer
from trl_ray.observe.report import report_data
from trl_ray.observe.report.chart_layout import Chart, Series, compact, place_chart, ticks
from trl_ray.observe.report.report_curves import curves, smoothed
from trl_ray.observe.report.report_data import LedgerFigures, RunData, Samples, Status, read_run, thinned
from trl_ray.observe.report.report_events import events
from trl_ray.observe.report.report_page import build_report, render, templates
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.types import Event, EventKind, Span

VOID = {"meta", "br", "link", "img"}
HOSTILE = """'"></title></pre></script><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }}"""
LOADING = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "background"}


class Page(HTMLParser):
    """Checks that tags balance; gathers scripts, text, the policy, charts, and attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.handlers: list[str] = []
        self.text = ""
        self.inlined: dict[str, str] = {}
        self.policy = ""
        self.charts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [value or "" for name, value in attrs if name in LOADING]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        named = {name: value or "" for name, value in attrs}
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy += named["content"]
        if "data-plot" in named:
            self.charts.append((named["aria-label"], named["data-plot"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in {"script", "style"}:
            self.inlined[self.open[-1]] = self.inlined.get(self.open[-1], "") + data


def _read(run: RunDirectory) -> Page:
    page = Page(build_report(run.path).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_report_is_balanced_html_that_loads_nothing(finished_run: RunDirectory) -> None:
    page = _read(finished_run)
    text = finished_run.report.read_text(encoding="utf-8")
    assert page.loads and all(target.startswith("#") for target in page.loads)
    assert page.handlers == []
    assert not re.search(r"@import|url\(|<link|<img|<iframe", text)
    assert "default-src 'none'" in page.policy and "unsafe-inline" not in text


def test_the_policy_lets_only_the_inlined_style_sheet_and_script_run(finished_run: RunDirectory) -> None:
    page = _read(finished_run)
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.inlined[tag].encode()).digest()).decode()
        assert re.findall(f"{tag}-src ([^;]*)", page.policy) == [f"'sha256-{digest}'"]


def test_hostile_text_stays_text(finished_run: RunDirectory) -> None:
    page = _read(finished_run)
    text = finished_run.report.read_text(encoding="utf-8")
    assert page.scripts == 1
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text and "<script>alert" not in text
    assert "<b>killed" not in text and "\x1b" not in text


def test_hostile_text_stays_text_wherever_a_run_may_put_it(tmp_path: Path) -> None:
    row = {"prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0, f"reward/{HOSTILE}": 1.0}
    run = RunData(
        path=tmp_path,
        config={"run_name": HOSTILE, "model_name_or_path": HOSTILE},
        rows=[{"step": 1.0, f"reward/{HOSTILE}/mean": 1.0}],
        events=[{"kind": "warning", "actor": HOSTILE, "time": 1.0, "detail": {HOSTILE: HOSTILE}}],
        ledger=LedgerFigures(issued=2, trained=0, dropped={HOSTILE: 1}, live={HOSTILE: 1}),
        spans=[Span(actor=HOSTILE, name=HOSTILE, start=1.0, end=2.0)],
        samples=[Samples(step=1, rows=[row])],
    )
    page = Page(render(run))
    assert page.open == [] and page.scripts == 1 and page.handlers == []
    assert all(target.startswith("#") for target in page.loads)
    # Title, heading, model; dropped, live; legend of the curve; timeline: bar, legend, actor, work;
    # event: actor, key, value; prompt, completion, part of the reward.
    assert page.text.count(HOSTILE) == 16
    ((label, plot),) = page.charts
    assert HOSTILE in label and json.loads(plot)["series"][0]["name"] == HOSTILE


def test_a_name_that_a_template_misses_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="misspelt"):
        templates().from_string("{{ page.misspelt }}").render(page=object())


def test_the_report_says_what_the_run_did(finished_run: RunDirectory) -> None:
    page = _read(finished_run)
    for expected in ("finished", "balanced", "bound 2", "actor lost", "Step 1", "Step 2", "Step 3", "end of run"):
        assert expected in page.text
    assert "6 groups issued = 3 trained + 2 dropped + 1 live" in re.sub(r"\s+", " ", page.text)
    assert "hunter2" not in finished_run.report.read_text() and "[removed]" in page.text


def test_an_unbalanced_ledger_is_an_alarm(finished_run: RunDirectory) -> None:
    finished_run.write_ledger({"issued": 7, "trained": 3, "dropped": {"end_of_run": 2}, "live": {"ready": 1}})
    assert "unbalanced: +1 unaccounted for" in _read(finished_run).text
    assert not LedgerFigures(issued=7, trained=3, dropped={"x": 2}, live={}).balanced


@pytest.mark.parametrize(
    "missing", ["config.yaml", "events.jsonl", "ledger.json", "trace.jsonl", "completions", "metrics.jsonl"]
)
def test_any_file_may_be_missing(finished_run: RunDirectory, missing: str) -> None:
    target = finished_run.path / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    _read(finished_run)


def test_torn_files_cost_only_what_is_torn(finished_run: RunDirectory) -> None:
    with finished_run.metrics.open("a") as stream:
        stream.write('{"step":4,"rew')
    finished_run.config.write_text("a: [1,")
    finished_run.ledger.write_text('{"issued":')
    finished_run.completions_file(2).write_bytes(b"PAR1 torn")
    data = read_run(finished_run)
    assert [row["step"] for row in data.rows] == [1, 2, 3] and data.ledger is None and data.config == {}
    assert [samples.step for samples in data.samples] == [1, 3]
    assert data.total_steps is None and data.max_age_at_use is None
    _read(finished_run)


def test_one_step_and_no_step_make_a_report(finished_run: RunDirectory) -> None:
    finished_run.truncate_after(1)
    assert "of the only step" in _read(finished_run).text
    finished_run.truncate_after(0)
    assert "No step was finished." in _read(finished_run).text


def test_an_empty_run_makes_a_report(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert "unfinished" in _read(run).text
    with pytest.raises(ConfigError):
        build_report(tmp_path)


def test_the_status_is_what_happened_last(finished_run: RunDirectory) -> None:
    with finished_run.events.open("a") as stream:
        stream.write('{"kind":"run_resumed","actor":"driver","time":200,"detail":{"staleness_bound":4}}\n')
    data = read_run(finished_run)
    assert data.status is Status.UNFINISHED and data.max_age_at_use == 4


def test_losses_come_first_and_drops_at_the_end_of_the_run_are_ordinary(finished_run: RunDirectory) -> None:
    with finished_run.events.open("a") as stream:
        stream.write('{"kind":"warning","actor":"queue","time":1,"detail":{}}\n')
        stream.write('{"kind":"group_dropped","actor":"queue","time":2,"detail":{"reason":"end_of_run"}}\n')
        stream.write('{"kind":"actor_lost","actor":"reward-0","time":3,"detail":{}}\n')
    text = _read(finished_run).text
    order = [text.index(word) for word in ("actor lost", "reward-0", "warning", "ordinary events", "group dropped")]
    assert order == sorted(order)


def test_a_step_trained_twice_shows_its_last_numbers(finished_run: RunDirectory) -> None:
    with finished_run.metrics.open("a") as stream:
        stream.write('{"step":2,"reward/mean":0.9}\n')
    assert read_run(finished_run).values("reward/mean") == [0.1, 0.9, 0.3]


def test_thinning_averages_but_keeps_maxima_and_the_last_step() -> None:
    rows = [{"step": float(step), "loss": float(step), "staleness/max": float(step == 1)} for step in range(1, 5)]
    assert thinned(rows, limit=2) == [
        {"step": 2.0, "loss": 1.5, "staleness/max": 1.0},
        {"step": 4.0, "loss": 3.5, "staleness/max": 0.0},
    ]


def test_smoothing_is_unbiased_at_the_start_and_keeps_gaps() -> None:
    assert smoothed([1.0, None, 2.0]) == [1.0, None, 2.0]
    values = smoothed([1.0] * 20 + [2.0] * 20)
    assert values[0] == 1.0 and values[20] == pytest.approx(1.25, abs=0.01)


def test_numbers_and_ticks_are_round() -> None:
    shown = [compact(value) for value in (0, 0.5, 1234, 12345, 2.5e6, 1e-5, None, float("nan"))]
    assert shown == ["0", "0.5", "1234", "12.3k", "2.5M", "1e-5", "n/a", "n/a"]
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_chart_of_nothing_is_nothing_and_a_flat_line_is_drawn() -> None:
    empty = Chart(title="x", steps=[1, 2], series=[Series(name="a", values=[None, None], color=0)])
    assert place_chart(empty) is None
    flat = Chart(title="x", steps=[1, 2], series=[Series(name="<a>", values=[0.0, 0.0], color=0)])
    drawn = templates().get_template("chart.html.jinja").render(chart=place_chart(flat))
    assert "polyline" in drawn and "&lt;a&gt;" in drawn and "<a>" not in drawn


def test_held_out_sets_and_metrics_of_the_users_own_have_cards(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    observer = open_observer(run, total_steps=2, config={}, console_stream=io.StringIO())
    for step in (1, 2):
        observer.step(step, {"loss": 1.0})
        told = {"eval/near_loss": 2.0, "eval/far_loss": 3.0, "eval/near_nll_loss": 4.0, "own": ["near_rouge"]}
        observer.event(Event.now(EventKind.EVALUATED, "evaluation", step=step, **told, **{"eval/near_rouge": 0.5}))
    observer.close()
    charts = {placed.title: placed for placed in curves(read_run(run))}
    assert [line.name for line in charts["Held-out loss by set"].legend] == ["near", "far"]
    assert [line.name for line in charts["Metrics of your own"].legend] == ["near_rouge"]


def test_a_long_run_reads_like_a_list_of_rows_and_spans_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path / "run")
    rows = [{"step": n, "time": 100.0 + n, "loss": n / 8} for n in range(1, 1001)]
    rows = [{**row, "eval/loss": 2.0} if row["step"] % 5 == 0 else row for row in rows]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spans = [("learner", "step", n, n + 0.5) for n in range(500)]
    spans += [("rollout-0", "wait", n, n + 0.9) for n in range(400)]
    lines = [json.dumps(dict(zip(("actor", "name", "start", "end"), each, strict=True))) for each in spans]
    run.trace.write_text("\n".join(lines) + "\n" + '{"actor":"torn","na')
    fast = read_run(run)
    monkeypatch.setattr(report_data, "read_metric_columns", lambda path: None)
    monkeypatch.setattr(trace, "read_span_columns", lambda path: None)
    slow = read_run(run)
    assert list(fast.rows) == list(slow.rows)
    assert fast.values("eval/loss") == slow.values("eval/loss")
    assert fast.present("loss") == slow.present("loss")
    assert fast.moments == slow.moments == (0.0, 1100.0)
    assert list(fast.spans) == list(slow.spans)
    for ours, theirs in zip(thinned(fast.rows, 7), thinned(slow.rows, 7), strict=True):
        assert ours == pytest.approx(theirs)
    assert render(fast) == render(slow)


def test_events_of_every_step_are_counted_and_only_the_first_and_the_last_are_read(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    with run.events.open("w") as stream:
        for step in range(1000):
            stream.write(f'{{"time":{step},"kind":"weights_pulled","actor":"rollout-0","detail":{{}}}}\n')
        stream.write('{"time":3000.0,"kind":"warning","actor":"a","detail":{"kind":"weights_pulled"}}\n')
    data = read_run(run)
    assert [event["time"] for event in data.events] == [*range(400), 3000.0, 999]
    found = events(data)
    assert found is not None
    assert (found.ordinary_count, found.ordinary.left_out, len(found.ordinary.rows)) == (1000, 600, 400)
    assert found.ordinary_kinds == "1000 weights pulled"
    assert len(found.attention.rows) == 1
