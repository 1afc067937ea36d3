"""Sends metrics to TensorBoard, MLflow and Trackio, through their own libraries.

    step, evaluated -> ServiceSink (thins out, gives up after a failure) -> RUN_DIR/tensorboard, RUN_DIR/mlflow, trackio

Options go through `redact` first. A service that fails later is given up with a warning: metrics.jsonl has all numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ray.errors import ConfigError
from trl_ray.observe.private_files import make_folder
from trl_ray.observe.redact import redact
from trl_ray.observe.run_files import atomic_write_text, jsonable
from trl_ray.observe.services.service_calls import ServiceCalls
from trl_ray.observe.sinks import Sink, evaluated_numbers
from trl_ray.types import Event

_LOG = logging.getLogger(__name__)
SERVICES: Mapping[str, tuple[str, ...]] = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""What `report_to` may name, and the packages that it needs one of."""
_PARAMETERS_AT_ONCE = 100
_LONGEST_PARAMETER = 500
_BEGIN_S = 60.0
"""For a service to take a run; one that does not is no input that can be trained with."""


def services_of(report_to: Sequence[str]) -> tuple[str, ...]:
    """The services that are reported to; ``all`` is every one whose package is installed.

    Raises:
        ConfigError: a package is missing.
    """
    if "all" in report_to:
        return tuple(name for name in SERVICES if _is_installed(name))
    for name in report_to:
        if not _is_installed(name):
            package = SERVICES[name][0]
            raise ConfigError(
                f"report_to={name} needs the package {package}, which is not installed. pip install {package}, or "
                "remove it from report_to."
            )
    return tuple(dict.fromkeys(report_to))


def _is_installed(service: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in SERVICES[service])


class ServiceSink(Sink, ABC):
    """What all services have in common.

    Args:
        name: of the service, for messages.
        every: steps between points.
        first: send the first step, too.
        failures: what its library raises.
    """

    def __init__(self, name: str, *, every: int, first: bool, failures: tuple[type[BaseException], ...]) -> None:
        self._name, self._every, self._first, self._failures = name, every, first, failures
        self._gave_up = False
        self._calls = ServiceCalls(name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send every `every`-th step, and the first if that is asked."""
        if step % self._every == 0 or (self._first and step == 1):
            self._try(lambda: self._send(step, metrics))

    def event(self, event: Event) -> None:
        """Send the numbers of evaluations, whichever step they come after."""
        if numbers := evaluated_numbers(event):
            self._try(lambda: self._send(int(event.detail.get("step", 0)), numbers))

    def close(self) -> None:
        """Finish; calling it again does nothing."""
        self._try(self._finish)
        self._gave_up = True

    def _try(self, action: Any) -> None:
        if self._gave_up:
            return
        try:
            self._calls.call(action)
        except self._failures as error:
            self._gave_up = True
            _LOG.warning("%s stopped taking metrics (%s); metrics.jsonl still has them all.", self._name, error)

    @abstractmethod
    def _send(self, step: int, numbers: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class TensorBoardSink(ServiceSink):
    """Event files in ``RUN_DIR/tensorboard``, which ``tensorboard --logdir`` shows.

    Raises:
        ConfigError: neither tensorboard nor tensorboardX is installed.
    """

    def __init__(self, run_dir: Path, *, config: Mapping[str, Any], every: int = 1, first: bool = False) -> None:
        super().__init__("tensorboard", every=every, first=first, failures=(OSError, ValueError))
        module = "torch.utils.tensorboard" if importlib.util.find_spec("tensorboard") else "tensorboardX"
        make_folder(run_dir / "tensorboard")
        self._writer = importlib.import_module(module).SummaryWriter(log_dir=str(run_dir / "tensorboard"))
        self._writer.add_text("args", json.dumps(jsonable(redact(config)), indent=2))

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _finish(self) -> None:
        self._writer.close()


class MLflowSink(ServiceSink):
    """One MLflow run per run directory, gone on with when the run is; without MLFLOW_TRACKING_URI it is written to
    ``RUN_DIR/mlflow``.

    Raises:
        ConfigError: MLflow refuses the run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        run_name: str,
        config: Mapping[str, Any],
        every: int = 1,
        first: bool = False,
    ) -> None:
        self._mlflow = importlib.import_module("mlflow")
        failure = self._mlflow.exceptions.MlflowException
        super().__init__("mlflow", every=every, first=first, failures=(failure, OSError))
        folder = run_dir / "mlflow"
        make_folder(folder)
        file = folder / "run_id.txt"
        known = file.read_text(encoding="utf-8").strip() if file.is_file() else None

        def begin() -> None:
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                self._mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or project)
            run = self._mlflow.start_run(run_id=known, run_name=None if known else run_name)
            atomic_write_text(file, run.info.run_id)
            if known is None:
                self._send_options(config)

        try:
            self._calls.call(begin, within_s=_BEGIN_S)
        except (failure, TimeoutError) as error:
            raise ConfigError(
                f"report_to=mlflow needs a server that takes the run, but: {error}. Fix MLFLOW_TRACKING_URI, unset it "
                "to record in the run directory, or remove mlflow from report_to."
            ) from error

    def _send_options(self, config: Mapping[str, Any]) -> None:
        options = [(name, str(value)[:_LONGEST_PARAMETER]) for name, value in jsonable(redact(config)).items()]
        for first in range(0, len(options), _PARAMETERS_AT_ONCE):
            self._mlflow.log_params(dict(options[first : first + _PARAMETERS_AT_ONCE]))

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        named = {re.sub(r"[^\w\-./: ]", "_", name): value for name, value in numbers.items()}
        self._mlflow.log_metrics(named, step=step)

    def _finish(self) -> None:
        self._mlflow.end_run()


class TrackioSink(ServiceSink):
    """A Trackio run: on this machine, or in the Space that `space_id` names.

    Raises:
        ConfigError: Trackio refuses the project.
    """

    def __init__(
        self,
        *,
        project: str,
        run_name: str,
        config: Mapping[str, Any],
        space_id: str | None = None,
        bucket_id: str | None = None,
        private: bool | None = None,
        every: int = 1,
        first: bool = False,
    ) -> None:
        super().__init__("trackio", every=every, first=first, failures=(OSError, RuntimeError, ValueError))
        self._trackio = importlib.import_module("trackio")
        options = {} if space_id is None else {"space_id": space_id, "private": private}
        if bucket_id is not None:
            options["bucket_id"] = bucket_id
        settings = {"project": project, "name": run_name, "resume": "allow", "config": jsonable(redact(config))}
        try:
            self._calls.call(lambda: self._trackio.init(**settings, **options), within_s=_BEGIN_S)
        except self._failures as error:
            raise ConfigError(
                f"report_to=trackio needs a project that trackio takes, got {project!r}: {error}. Check "
                "trackio_space_id, or remove trackio from report_to."
            ) from error

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def _finish(self) -> None:
        self._trackio.finish()
