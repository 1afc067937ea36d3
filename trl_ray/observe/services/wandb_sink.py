"""Sends metrics to Weights & Biases; without WANDB_API_KEY it writes an offline run inside the run directory.

    metrics -> WandbSink -> RUN_DIR/wandb -> the service, at once or later with `wandb sync`

Options go through `redact` first; command line, code, git state and console output are not uploaded at all.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ray.errors import ConfigError
from trl_ray.observe.private_files import make_folder
from trl_ray.observe.redact import redact
from trl_ray.observe.run_files import atomic_write_text, jsonable, writing
from trl_ray.observe.services.service_calls import ServiceCalls
from trl_ray.observe.sinks import Sink, evaluated_numbers
from trl_ray.types import Event

_LOG = logging.getLogger(__name__)
_INIT_S = 15.0
_UNREACHED = re.compile(r"timed? ?out|deadline exceeded|giving up|refused|unreachable|no such host", re.IGNORECASE)
"""What wandb says of a service that does not answer, as against one that refuses."""


class WandbSink(Sink):
    """One wandb run per run directory, resumed when the run is.

    Raises:
        ConfigError: wandb is not installed, or refuses the project or the key.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        run_name: str | None,
        entity: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any],
        every: int = 1,
        first: bool = False,
    ) -> None:
        self._wandb = _import_wandb()
        self._every, self._first = every, first
        folder = run_dir / "wandb"
        with writing(folder):
            make_folder(folder)
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._calls, self._folder = ServiceCalls("Weights & Biases"), folder
        given = {
            "project": project,
            "entity": entity,
            "group": group,
            "name": run_name,
            "id": _run_id(folder),
            "dir": str(run_dir),
            "config": jsonable(redact(config)),
        }
        try:
            self._run = self._begin(given, mode)
        except (TimeoutError, self._wandb.errors.Error) as error:
            raise ConfigError(
                f"report_to=wandb needs a project and a key that wandb accepts, got project {project!r}: {error}. "
                "Fix WANDB_API_KEY, unset it to record offline, or remove wandb from report_to."
            ) from error
        # Steps repeat after a resume; wandb refuses steps that go back unless they are an ordinary metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _begin(self, given: Mapping[str, Any], mode: str) -> Any:
        """The service's run; a service that cannot be reached costs no run, which is recorded offline."""
        online = mode == "online"
        settings = self._wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            silent=not online,
            init_timeout=_INIT_S,
        )
        options = {**given, "settings": settings, "mode": mode, "resume": "allow" if online else None}
        try:
            return self._calls.call(lambda: self._wandb.init(**options), within_s=_INIT_S + _INIT_S / 2)
        except (TimeoutError, self._wandb.errors.Error) as error:
            if not online or not (isinstance(error, TimeoutError) or _UNREACHED.search(str(error))):
                raise
            _LOG.warning(
                "Weights & Biases cannot be reached (%s); the run is recorded offline in %s, which `wandb sync` sends.",
                str(error).partition("\n")[0],
                self._folder,
            )
        self._calls = ServiceCalls("Weights & Biases")
        return self._begin(given, "offline")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send every `every`-th step, and the first if that is asked; once wandb fails, the run goes on without it."""
        if step % self._every == 0 or (self._first and step == 1):
            self._send(step, metrics)

    def event(self, event: Event) -> None:
        """Send the numbers of evaluations, whichever step they come after."""
        if numbers := evaluated_numbers(event):
            self._send(int(event.detail.get("step", 0)), numbers)

    def _send(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **metrics})
        except self._wandb.errors.Error as error:
            _LOG.warning("wandb stopped taking metrics at step %d (%s); metrics.jsonl still has them all.", step, error)
            self._run = None

    def close(self) -> None:
        """Finish the wandb run; calling it again does nothing."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            self._calls.call(run.finish)
        except (TimeoutError, self._wandb.errors.Error) as error:
            _LOG.warning(
                "wandb could not finish its run (%s); metrics.jsonl has it all, and `wandb sync` sends what is in %s.",
                error,
                self._folder,
            )


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "report_to=wandb needs the package wandb, which is not installed. pip install wandb, or remove it from "
            "report_to."
        ) from error


def _run_id(folder: Path) -> str:
    file = folder / "run_id.txt"
    if not file.is_file():
        atomic_write_text(file, uuid.uuid4().hex[:12])
    return file.read_text(encoding="utf-8").strip()
