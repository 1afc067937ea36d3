"""Where a run lives: Ray or this process, what the learner gets, and how long anything may take."""

from __future__ import annotations

import enum
from typing import Annotated

from pydantic import Field

from trl_ray.config.base import FROM_STRING, Natural, Positive, Seconds, Section


class RuntimeKind(enum.StrEnum):
    """Where actors live."""

    RAY = "ray"
    LOCAL = "local"
    """All in this process, one after the other: for a debugger, and for bit-for-bit repeatable runs."""


class RuntimeConfig(Section):
    """Ray, resources, supervision."""

    kind: Annotated[RuntimeKind, FROM_STRING] = RuntimeKind.RAY
    address: str | None = None
    """``host:port`` of a running cluster or ``auto``; None starts Ray on this machine (inside a Ray job: joins it)."""
    num_cpus: Positive | None = None
    """CPUs of a cluster started here; None counts the machine's."""
    num_learners: Positive = 1
    """Ranks of the learner, one actor each; the batch options are per rank."""
    learner_num_cpus: Annotated[float, Field(ge=0)] = 1.0
    learner_num_gpus: Annotated[float, Field(ge=0)] = 0.0
    learner_threads: Positive | None = None
    """Compute threads of each learner rank; None uses its CPUs."""
    placement_strategy: Annotated[str, Field(pattern="^(PACK|SPREAD|STRICT_PACK|STRICT_SPREAD)$")] = "PACK"
    placement_timeout_s: Seconds = 60.0
    connect_timeout_s: Seconds = 10.0
    start_deadline_s: Seconds = 600.0
    """For an actor to load its model."""
    collective_timeout_s: Seconds = 1800.0
    """For one exchange between the ranks of the learner."""
    step_deadline_s: Seconds = 3600.0
    """For one optimizer step."""
    pull_deadline_s: Seconds = 600.0
    """For a worker to pull one set of weights."""
    health_interval_s: Seconds = 1.0
    health_deadline_s: Seconds = 15.0
    """An actor that has answered no probe for this long is replaced."""
    stall_deadline_s: Seconds = 900.0
    """The run stops, naming who it waits for, when no step has come nearer for this long."""
    stop_grace_s: Seconds | None = None
    """From SIGTERM to SIGKILL; None: what `ray job stop` leaves in a Ray job (3 s by default), 30 s elsewhere."""
    max_restarts: Natural = 10
    """Of each worker and of the queue; five finished steps give one back, and so does a restart of the learner."""
    max_learner_restarts: Natural = 3
    """From one checkpoint; a newer one gives them back."""

    @property
    def threads_of_learner(self) -> int:
        """Compute threads: `learner_threads`, or one for each of its CPUs."""
        return self.learner_threads or max(1, int(self.learner_num_cpus))
