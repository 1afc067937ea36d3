"""Services get the numbers of the steps that are told, and a missing or failing library never reaches training."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_ray.errors import ConfigError
from trl_ray.observe.observer import open_observer
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.services.service_sinks import (
    SERVICES,
    MLflowSink,
    ServiceSink,
    TensorBoardSink,
    TrackioSink,
    services_of,
)
from trl_ray.types import Event, EventKind

Calls = list[tuple[Any, ...]]
CONFIG = {"learning_rate": 0.1, "hub_token": "secret"}


def found(*names: str) -> Callable[[str], object | None]:
    return lambda name: object() if name in names else None


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """All three libraries, which write down how they are called."""
    calls: Calls = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            calls.append(("writer", log_dir))

        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, *args))

    def note(name: str, answer: object = None) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            calls.append((name, *args, kwargs))
            return answer

        return call

    board, mlflow, trackio = (types.ModuleType(name) for name in ("torch.utils.tensorboard", "mlflow", "trackio"))
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    mlflow.exceptions = types.SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))  # type: ignore[attr-defined]
    for name in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "end_run"):
        setattr(mlflow, name, note(name))
    mlflow.start_run = note("start_run", run)  # type: ignore[attr-defined]
    for name in ("init", "log", "finish"):
        setattr(trackio, name, note(name))
    for module in (board, mlflow, trackio):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.util.find_spec", found("tensorboard", "mlflow", "trackio"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return calls


def sinks(path: Path, **options: Any) -> list[ServiceSink]:
    return [
        TensorBoardSink(path, config=CONFIG, **options),
        MLflowSink(path, project="p", run_name="r", config=CONFIG, **options),
        TrackioSink(project="p", run_name="r", config=CONFIG, space_id="me/space", private=True, **options),
    ]


def test_points_come_with_their_step_and_evaluations_whenever_they_are_made(tmp_path: Path, libraries: Calls) -> None:
    for sink in sinks(tmp_path, every=2, first=True):
        libraries.clear()
        for step in (1, 2, 3):
            sink.step(step, {"loss": step / 2})
        evaluated = {"step": 3, "prompts": 4, "reward/mean": 0.25, "eval/loss": 2.0, "seconds": 1.0}
        sink.event(Event.now(EventKind.EVALUATED, "evaluation", **evaluated))
        sink.event(Event.now(EventKind.WARNING, "driver", detail="no number"))
        sink.close()
        sink.close()
        sink.step(4, {"loss": 9.0})
        numbers = {"eval/reward/mean": 0.25, "eval/loss": 2.0}
        if isinstance(sink, TensorBoardSink):
            scalars = [call[1:] for call in libraries if call[0] == "add_scalar"]
            assert scalars == [("loss", 0.5, 1), ("loss", 1.0, 2), *((*each, 3) for each in numbers.items())]
        else:
            logged = [(call[1], call[-1]["step"]) for call in libraries if call[0] in ("log", "log_metrics")]
            assert logged == [({"loss": 0.5}, 1), ({"loss": 1.0}, 2), (numbers, 3)]
        assert sum(call[0] in ("close", "end_run", "finish") for call in libraries) == 1


def test_runs_are_named_and_no_secret_leaves(tmp_path: Path, libraries: Calls) -> None:
    sinks(tmp_path)
    assert "secret" not in str(libraries) and "[removed]" in str(libraries)
    assert ("writer", str(tmp_path / "tensorboard")) in libraries
    [started] = [call[-1] for call in libraries if call[0] == "start_run"]
    assert started == {"run_id": None, "run_name": "r"}
    [begun] = [call[-1] for call in libraries if call[0] == "init"]
    assert (begun["project"], begun["name"], begun["space_id"], begun["private"]) == ("p", "r", "me/space", True)
    assert "bucket_id" not in begun  # older Trackios have none
    TrackioSink(project="p", run_name="r", config=CONFIG, bucket_id="me/bucket")
    assert [call[-1] for call in libraries if call[0] == "init"][1]["bucket_id"] == "me/bucket"
    MLflowSink(tmp_path, project="p", run_name="r", config=CONFIG)  # a run that is resumed
    assert [call[-1] for call in libraries if call[0] == "start_run"][1] == {"run_id": "abc", "run_name": None}


def test_a_service_that_fails_is_given_up_with_one_warning(
    tmp_path: Path, libraries: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MLflowSink(tmp_path, project="p", run_name="r", config=CONFIG)
    module: Any = sys.modules["mlflow"]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise module.exceptions.MlflowException("gone")

    monkeypatch.setattr(module, "log_metrics", fail)
    with caplog.at_level(logging.WARNING):
        sink.step(1, {"loss": 1.0})
        sink.step(2, {"loss": 1.0})
        sink.close()
    assert [record.getMessage() for record in caplog.records] == [
        "mlflow stopped taking metrics (gone); metrics.jsonl still has them all."
    ]
    monkeypatch.setattr(module, "set_experiment", fail)
    with pytest.raises(ConfigError, match="Fix MLFLOW_TRACKING_URI"):
        MLflowSink(
            tmp_path / "other" if (tmp_path / "other").mkdir() else tmp_path, project="p", run_name="r", config={}
        )


def test_a_missing_library_is_told_before_a_run_and_all_are_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", found("tensorboardX", "trackio"))
    assert services_of(["all"]) == ("tensorboard", "trackio")
    assert services_of(["trackio", "tensorboard", "trackio"]) == ("trackio", "tensorboard")
    assert services_of([]) == ()
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=f"report_to={name} needs the package {name}, which is not installed"):
            services_of([name])


def test_a_run_opens_the_services_it_names(tmp_path: Path, libraries: Calls) -> None:
    run = RunDirectory.create(tmp_path / "run")
    observer = open_observer(
        run, total_steps=2, config=CONFIG, report_to=["tensorboard", "mlflow", "trackio"], log_completions=False
    )
    assert [type(sink) for sink in observer.sinks if isinstance(sink, ServiceSink)] == [
        TensorBoardSink,
        MLflowSink,
        TrackioSink,
    ]
    assert set(SERVICES) == {"wandb", "tensorboard", "mlflow", "trackio"}
    observer.close()
