import importlib.machinery
import io
import json
import sys
import threading
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trl_ray.errors import ConfigError, RunError
from trl_ray.observe.completions import write_completions
from trl_ray.observe.console import ConsoleSink, duration, printable, progress_line, sparkline
from trl_ray.observe.observer import open_observer
from trl_ray.observe.redact import redact
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import read_json_lines
from trl_ray.observe.services import service_calls
from trl_ray.observe.services.service_calls import ServiceCalls
from trl_ray.observe.services.wandb_sink import WandbSink
from trl_ray.observe.sinks import MetricsFile, Observer, Sink, TrainedGroups
from trl_ray.types import Event, EventKind, RolloutGroup

GroupMaker = Callable[..., RolloutGroup]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class DeadTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_every_step_is_one_flushed_line(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl", clock=lambda: 7.0)
    sink.step(1, {"loss": 0.5, "kl/ref": float("nan")})
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "time": 7.0, "loss": 0.5, "kl/ref": None}]
    sink.close()


def test_a_run_writes_its_files(finished_run: RunDirectory, tmp_path: Path) -> None:
    assert [record["step"] for record in read_json_lines(finished_run.metrics)] == [1, 2, 3]
    kinds = [record["kind"] for record in read_json_lines(finished_run.events)]
    assert kinds == ["run_started", "actor_lost", "run_finished"]
    assert len(read_json_lines(finished_run.trace)) == 3
    assert len(list(finished_run.completions.glob("*.parquet"))) == 3
    assert "step 3/3" in (tmp_path / "console.txt").read_text()


def test_every_sink_is_closed_even_when_one_fails() -> None:
    closed = []

    class Failing(Sink):
        def close(self) -> None:
            raise RunError("disk full")

    class Closing(Sink):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(RunError, match="disk full"):
        Observer([Closing(), Failing()]).close()
    assert closed == [True]


def test_the_progress_line_says_what_was_measured_and_no_more() -> None:
    metrics = {
        "reward/mean": 0.41234,
        "loss": 0.5,
        "staleness/mean": 0.8,
        "staleness/max": 2.0,
        "queue/ready": 3.0,
        "queue/in_flight": 12.0,
        "queue/slots": 24.0,
        "throughput/trained_tokens_per_s": 812.4,
    }
    assert progress_line(3, 30, metrics, eta_s=151.0) == (
        "step 3/30  reward 0.412  loss 0.5000  stale 0.80 max 2  trained 812 tok/s  "
        "queue 3 ready 12 in flight 24 slots  eta 2m 31s"
    )
    assert progress_line(3, None, {}) == "step 3"


def test_of_a_policy_the_line_says_what_tells_health_and_not_a_loss_near_0_by_construction() -> None:
    metrics = {
        "reward/mean": 0.5,
        "loss": 1e-9,
        "kl/sampler": 2.5e-4,
        "importance/ess": 0.987,
        "entropy": 1.25,
        "grad_norm": 0.5,
        "completion/truncated_fraction": 0.25,
    }
    line = "step 1  reward 0.500  {}sampler kl 2.5e-04  ess 0.99  entropy 1.250  grad 0.5  cut off 25%"
    assert progress_line(1, None, metrics) == line.format("")
    taught = {**metrics, "loss": 0.5, "self_distillation/distillation_loss": 1.0}
    assert progress_line(1, None, taught) == line.format("loss 0.5000  ")


def test_without_a_terminal_each_logged_step_is_a_plain_line() -> None:
    out, times = io.StringIO(), iter([0.0, 10.0, 20.0])
    sink = ConsoleSink(total_steps=3, every=2, stream=out, clock=lambda: next(times))
    for step in (1, 2, 3):
        sink.step(step, {"reward/mean": 0.5})
    sink.close()
    assert out.getvalue() == "step 2/3  reward 0.500  eta 10s\nstep 3/3  reward 0.500\n"


def test_the_first_step_is_told_where_it_is_asked_for() -> None:
    out, times = io.StringIO(), iter([0.0, 10.0, 20.0])
    sink = ConsoleSink(total_steps=9, every=5, first=True, stream=out, clock=lambda: next(times))
    for step in (1, 2, 3):
        sink.step(step, {"reward/mean": 0.5})
    sink.close()
    assert out.getvalue() == "step 1/9  reward 0.500\n"


def test_on_a_terminal_the_line_is_rewritten_and_events_stand_above() -> None:
    out = Terminal()
    sink = ConsoleSink(total_steps=2, stream=out)
    sink.step(1, {"reward/mean": 0.1})
    sink.event(Event(kind=EventKind.ACTOR_LOST, actor="rollout-0", time=0.0, detail={"reason": "\x1b[2Jkilled"}))
    sink.step(2, {"reward/mean": 0.9})
    sink.close()
    assert "step 2/2" in out.getvalue() and "actor lost [rollout-0]" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue() and "▁█" in out.getvalue()


@pytest.mark.parametrize("gone", ["broken", "closed"])
def test_a_terminal_that_goes_away_does_not_reach_training(gone: str) -> None:
    out: io.StringIO = DeadTerminal() if gone == "broken" else Terminal()
    sink = ConsoleSink(total_steps=2, stream=out)
    if gone == "closed":
        sink.step(1, {"loss": 1.0})
        out.close()
    sink.step(2, {"loss": 1.0})
    sink.event(Event(kind=EventKind.WARNING, actor="queue", time=0.0))
    sink.close()


def test_printed_completions_cannot_steer_the_terminal(make_group: GroupMaker) -> None:
    out = io.StringIO()
    trained = TrainedGroups(
        step=1, groups=[make_group(texts=["a\x1b[31m[bold]\nb"])], advantages=[[0.0]], learner_version=0
    )
    ConsoleSink(total_steps=1, print_completions=1, stream=out).completions(trained)
    assert out.getvalue() == "  reward 1.000  a\\x1b[31m[bold]\\nb\n"


def test_small_texts() -> None:
    assert [duration(seconds) for seconds in (45, 151, 11220)] == ["45s", "2m 31s", "3h 07m"]
    assert sparkline([0.0, float("nan"), 1.0]) == "▁ █" and sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""
    assert printable("x" * 500) == "x" * 400 + "…"


def test_completions_become_one_row_each(tmp_path: Path, make_group: GroupMaker) -> None:
    group = make_group(group_id=7, versions=[[(3, 0, 2), (4, 2, 4)], [(4, 0, 4)]], texts=["\ud800", "b"])
    trained = TrainedGroups(step=12, groups=[group], advantages=[[0.5, -0.5]], learner_version=5)
    table = pq.read_table(write_completions(tmp_path / "step-000012.parquet", trained))
    assert table.column_names == [
        "step",
        "group_id",
        "attempt",
        "prompt",
        "completion",
        "finish_reason",
        "reward",
        "reward/exact",
        "reward/silent",
        "extras",
        "advantage",
        "versions",
        "age",
        "worker",
    ]
    first, second = table.to_pylist()
    assert (first["step"], first["group_id"], first["attempt"], first["completion"]) == (12, 7, 1, "?")
    assert json.loads(first["prompt"]) == [{"role": "user", "content": "2 + 2 = ?"}]
    assert json.loads(first["versions"]) == [[3, 0, 2], [4, 2, 4]] and (first["age"], second["age"]) == (2, 1)
    assert (second["reward"], second["reward/exact"], second["reward/silent"]) == (0.5, 1.0, None)
    assert second["advantage"] == -0.5 and json.loads(second["extras"]) == {"parsed": 4}


def test_secrets_are_removed_by_name_shape_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "correct-horse-battery")
    options = {
        "hub": {"hf_token": "x", "urls": ["https://me:pw@host/x"]},
        "note": "use correct-horse-battery",
        "args": "hf_abcdefghijklmnopqrst",
        "max_tokens": 16,
        "token": None,
        "monkey": "kept",
    }
    assert redact(options) == {
        "hub": {"hf_token": "[removed]", "urls": ["https://[removed]@host/x"]},
        "note": "use [removed]",
        "args": "[removed]",
        "max_tokens": 16,
        "token": None,
        "monkey": "kept",
    }


class FakeWandbRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def define_metric(self, *names: str, **options: str) -> None: ...

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def _fake_wandb(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]], run: FakeWandbRun) -> types.ModuleType:
    module = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))  # type: ignore[attr-defined]
    module.Settings = lambda **options: options  # type: ignore[attr-defined]

    def init(**options: Any) -> FakeWandbRun:
        calls.append(options)
        return run

    module.init = init  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_offline_in_the_run_directory_without_a_key_and_sees_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    calls: list[dict[str, Any]] = []
    run = FakeWandbRun()
    _fake_wandb(monkeypatch, calls, run)
    sink = WandbSink(tmp_path, project="p", run_name="r", config={"hf_token": "s", "lr": 0.1}, every=2)
    for step in (1, 2):
        sink.step(step, {"loss": 0.5})
    sink.event(Event.now(EventKind.EVALUATED, "evaluation", step=3, prompts=4, **{"reward/mean": 0.25}))
    sink.close()
    sink.close()
    assert calls[0]["mode"] == "offline" and calls[0]["dir"] == str(tmp_path)
    assert calls[0]["config"] == {"hf_token": "[removed]", "lr": 0.1}
    assert run.logged == [{"step": 2, "loss": 0.5}, {"step": 3, "eval/reward/mean": 0.25}] and run.finished == 1


def test_a_team_and_a_group_of_runs_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    _fake_wandb(monkeypatch, calls, FakeWandbRun())
    run = RunDirectory.create(tmp_path / "run")
    open_observer(
        run, total_steps=1, config={}, report_to=["wandb"], wandb_entity="team", wandb_run_group="sweep"
    ).close()
    assert (calls[0]["entity"], calls[0]["group"]) == ("team", "sweep")


def test_a_resumed_run_keeps_its_wandb_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    calls: list[dict[str, Any]] = []
    _fake_wandb(monkeypatch, calls, FakeWandbRun())
    for _ in range(2):
        WandbSink(tmp_path, project="p", run_name=None, config={})
    assert calls[0]["id"] == calls[1]["id"]


def test_a_service_that_cannot_be_reached_is_recorded_offline_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    calls: list[dict[str, Any]] = []
    module: Any = _fake_wandb(monkeypatch, calls, FakeWandbRun())
    answers = module.init

    def init(**options: Any) -> FakeWandbRun:
        found: FakeWandbRun = answers(**options)
        if options["mode"] == "online":
            raise module.errors.Error("Timed out initializing run: POST http://h/graphql giving up after 1 attempt(s)")
        return found

    module.init = init
    sink = WandbSink(tmp_path, project="p", run_name=None, config={})
    sink.step(1, {"loss": 0.5})
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert [call["settings"]["init_timeout"] for call in calls] == [15.0, 15.0]
    assert "cannot be reached (Timed out initializing run" in caplog.text and "`wandb sync` sends" in caplog.text


def test_a_service_that_does_not_answer_is_named_after_a_moment_and_left_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_calls, "_SAY_S", 0.05)
    run, free = FakeWandbRun(), threading.Event()
    _fake_wandb(monkeypatch, [], run)
    sink = WandbSink(tmp_path, project="p", run_name=None, config={})
    monkeypatch.setattr(run, "finish", lambda: free.wait(30))
    monkeypatch.setattr(sink._calls, "call", partial(sink._calls.call, within_s=0.15))
    begin = time.monotonic()
    sink.close()
    free.set()
    assert time.monotonic() - begin < 5
    assert "Weights & Biases has not answered for 0.05 s; it is waited for 0.15 s at most" in caplog.text
    assert "could not finish its run (Weights & Biases has not answered for 0.15 s)" in caplog.text


def test_calls_of_a_service_are_made_in_one_thread_and_none_after_it_was_silent() -> None:
    calls, free = ServiceCalls("mlflow"), threading.Event()
    assert calls.call(threading.get_ident) == calls.call(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"mlflow has not answered for 0\.05 s"):
        calls.call(lambda: free.wait(30), within_s=0.05)
    with pytest.raises(TimeoutError, match="does not answer"):
        calls.call(lambda: 1)
    free.set()


def test_wandb_failures_are_input_errors_at_the_start_and_warnings_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeWandbRun()
    module: Any = _fake_wandb(monkeypatch, [], run)
    sink = WandbSink(tmp_path, project="p", run_name=None, config={})

    def fail(*_: object, **__: object) -> None:
        raise module.errors.Error("no network")

    monkeypatch.setattr(run, "log", fail)
    sink.step(1, {"loss": 0.5})
    module.init = fail
    with pytest.raises(ConfigError, match="no network"):
        WandbSink(tmp_path, project="p", run_name=None, config={})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        WandbSink(tmp_path, project="p", run_name=None, config={})
