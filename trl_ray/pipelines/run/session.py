"""What a pipeline and its sessions hand to each other: a run's plan, what a session starts from, how a run ended.

Pipeline -- Plan, Opening --> Session.run -- TrainOutput --> Pipeline
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import read_json_lines
from trl_ray.observe.sinks import Observer
from trl_ray.pipelines.callbacks.hooks import CallbackList
from trl_ray.pipelines.run.recording import RunRecorder
from trl_ray.pipelines.run.signals import Stop
from trl_ray.runtime.runtime import Runtime

if TYPE_CHECKING:
    from trl_ray.runtime.remote import ActorPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutput:
    """How a run ended."""

    steps: int
    run_dir: Path
    metrics: dict[str, float]
    """The last step's line of metrics.jsonl."""
    ledger: LedgerSnapshot
    """Of prompt groups, or of rows where a dataset is trained on."""
    model: Path
    """Folder with the run's model: the last checkpoint, or the best with `load_best_model_at_end`."""
    worst_age: int | None = None
    """The oldest token trained on, in optimizer steps; None where nothing was sampled."""

    @property
    def global_step(self) -> int:
        """`steps`, as transformers calls them."""
        return self.steps

    @property
    def training_loss(self) -> float:
        """The mean loss over all steps; NaN of those that met one."""
        losses = [line.get("loss") for line in read_json_lines(self.run_dir / "metrics.jsonl")]
        known = [float(loss) for loss in losses if loss is not None]
        return sum(known) / len(known) if known else math.nan


class Plan(Protocol):
    """A run that is ready to start, as the dry run shows it."""

    @property
    def config(self) -> RunConfig:
        """Resolved options."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps of one pass over the rows; None where that is not known."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """The plan in numbers."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the rows, a sentence each."""
        ...

    def expected_memory(self) -> Mapping[str, float]:
        """Bytes that an actor of each plan is expected to hold, by `ActorPlan.key`; activations are not counted."""
        ...

    def actors(self) -> dict[str, ActorPlan]:
        """How many actors there are and what each gets, by the key of its plan."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opening:
    """What a session starts from."""

    runtime: Runtime
    directory: RunDirectory
    observer: Observer
    checkpoint: str | None
    """The newest good one."""
    step: int
    """Its step; 0 without one."""
    resuming: bool
    """Whether anything was trained before."""
    callbacks: CallbackList
    only_evaluates: bool = False
    """Nothing is trained: the held-out numbers are all that is asked for."""


class Session(ABC):
    """One life of the actors, from a checkpoint on."""

    recorder: RunRecorder

    @abstractmethod
    async def run(self, stop: Stop) -> TrainOutput:
        """Start the actors and train to the end.

        Raises:
            LearnerLostError: another session may go on from the last checkpoint.
            InterruptedRun: the stop event was set; a checkpoint was written if there was time.
        """

    @abstractmethod
    async def dismiss(self) -> None:
        """End the actors for good."""
