"""Writes down a run: one metrics line per step, events, spans, the ledger, completions.

RolloutLoop --> Recorder --> Observer (console, metrics.jsonl, events.jsonl, wandb) and the run directory's files
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_ray.actors.rollout_worker import EvaluatedPrompt, mean_reward
from trl_ray.algorithms.metric_merging import merged_values
from trl_ray.algorithms.policy.group_samples import BuiltStep
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.sinks import Observer, TrainedGroups
from trl_ray.observe.staleness import StalenessMonitor
from trl_ray.pipelines.rollouts.evaluation_numbers import answer_numbers
from trl_ray.pipelines.run.own_metrics import own_numbers
from trl_ray.pipelines.run.ray_job import give_more_grace, in_ray_job, is_deleted_with_job
from trl_ray.types import ActorReport, Evaluation, Event, EventKind, Metric, RolloutGroup, StepResult, steady_time


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """When the parts of one step ended, in seconds since the epoch."""

    begin: float
    taken: float
    trained: float
    published: float


class RunRecorder:
    """What every run leaves behind, except its checkpoints: events, spans, metrics, the ledger."""

    def __init__(self, *, directory: RunDirectory, observer: Observer) -> None:
        self.directory = directory
        self.last: dict[str, float] = {}
        self.guard: Callable[[], None] = lambda: None
        """Raises where the run directory is no more this run's to write."""
        self.cut: Callable[[], None] = lambda: None
        """Forgets the steps that are trained again; not before all is there to train them."""
        self._observer = observer
        self._ended: float | None = None
        self._told_of_grace = False

    def emit(self, event: Event) -> None:
        """Write down one event."""
        self._observer.event(event)

    def say(self, kind: EventKind, actor: str, /, **detail: Any) -> None:
        """Write down one event of the driver's own."""
        self.emit(Event.now(kind, actor, **detail))

    def report(self, report: ActorReport) -> None:
        """Write down what actors had to tell."""
        self._observer.report(report)

    def skipped(self, step: int, *, what: str) -> None:
        """Write down that a step met NaN or infinity, and what was lost with it."""
        detail = f"loss or gradients were not finite; the step was skipped and its {what} dropped"
        self.say(EventKind.WARNING, "learner", step=step, detail=detail)

    def checkpoint(self, path: Path, *, step: int, seconds: float) -> None:
        """Write down a checkpoint."""
        self.say(EventKind.CHECKPOINT, "learner", step=step, path=path.name, seconds=round(seconds, 3))

    def begin(self) -> None:
        """Training begins: all that it needs is there."""
        self.guard()
        self.cut()

    def tell_of_grace(self, checkpoint_s: float, *, grace: float, is_measured: bool) -> None:
        """Say once in a Ray job that `ray job stop` leaves less time than a checkpoint takes."""
        if self._told_of_grace or not in_ray_job() or checkpoint_s < grace:
            return
        self._told_of_grace = True
        takes = f"takes {checkpoint_s:.1f} s" if is_measured else f"is likely to take {checkpoint_s:.0f} s or more"
        self.say(
            EventKind.WARNING,
            "driver",
            detail=f"a checkpoint {takes}, but `ray job stop` kills after {grace:g} s: what was trained since the last "
            f"checkpoint would be trained again. {give_more_grace(2 * checkpoint_s + 10)}",
        )

    def tell_of_lost_folder(self) -> None:
        """Say that the run will not outlive its Ray job."""
        if is_deleted_with_job(self.directory.path):
            detail = (
                f"output_dir is {self.directory.path}, in the copy of the submitted folder, which Ray deletes with the "
                "job. Give it an absolute path that outlives the job."
            )
            self.say(EventKind.WARNING, "driver", detail=detail)

    def close(self) -> None:
        """Flush and close all sinks."""
        self._observer.close()

    def _write_step(self, step: int, record: Mapping[str, float], ledger: LedgerSnapshot) -> None:
        """The line of one optimizer step, and the ledger after it."""
        self.guard()
        self.last = dict(record)
        self._observer.step(step, record)
        self.directory.write_ledger(ledger.to_json())

    def _elapsed(self, begin: float, end: float) -> float:
        """Seconds from the end of the step before to the end of this one."""
        # A checkpoint or an evaluation between two steps counts to the second.
        elapsed, self._ended = end - (self._ended or begin), end
        return elapsed


class Recorder(RunRecorder):
    """Everything a run of policy optimisation leaves behind, except its checkpoints and its journal.

    `pulled_version` is the version that every working rollout worker has pulled; tickets carry it.
    """

    def __init__(self, *, directory: RunDirectory, observer: Observer, max_age_at_use: int, start_step: int) -> None:
        super().__init__(directory=directory, observer=observer)
        self.pulled_version = start_step
        self._monitor = StalenessMonitor(max_age_at_use=max_age_at_use)

    @property
    def worst_age(self) -> int:
        """The oldest token that was trained on, in optimizer steps."""
        return self._monitor.worst_age

    def check_staleness(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
        """Measure the age of every token about to be trained on.

        Raises:
            WeightError: a token is older than the bound.
        """
        return self._monitor.observe(groups, learner_version=step - 1, taken_at=steady_time())

    def line(
        self,
        *,
        groups: Sequence[RolloutGroup],
        built: BuiltStep,
        result: StepResult,
        times: StepTimes,
        version: int,
        snapshot: LedgerSnapshot,
        slots: int,
        staleness: Mapping[str, Metric],
    ) -> dict[str, float]:
        """The numbers of one optimizer step."""
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            **merged_values([built.metrics, result.metrics, staleness]),
            "weights/version": version,
            **self._queue(snapshot, slots),
            **self._speed(groups, built, result, times),
        }

    def step(
        self,
        step: int,
        *,
        line: Mapping[str, float],
        groups: Sequence[RolloutGroup],
        built: BuiltStep,
        snapshot: LedgerSnapshot,
        evaluated: Mapping[str, float],
    ) -> None:
        """Write the line of one optimizer step, with what was evaluated after it, its ledger and its completions."""
        self._write_step(step, {**line, **{f"eval/{name}": value for name, value in evaluated.items()}}, snapshot)
        self._observer.completions(
            TrainedGroups(step=step, groups=groups, advantages=built.advantages, learner_version=step - 1)
        )

    def evaluated(
        self,
        step: int,
        answers: Sequence[EvaluatedPrompt],
        held_out: Evaluation | None,
        seconds: float,
        *,
        name: str = "",
        own: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Write down an evaluation on held-out prompts, with what the learner said of the answers.

        Args:
            step: finished optimizer steps.
            answers: of the workers.
            held_out: of the learner, where it was asked.
            seconds: that it took.
            name: of the set; begins those of its numbers.
            own: what the user's `compute_metrics` says of them.

        Returns:
            Its numbers, without ``eval/``.
        """
        found = answer_numbers(answers)
        if held_out is not None:
            found |= {"loss": held_out.loss, **merged_values([held_out.metrics])}
        mine, left_out = own_numbers(own or {}, name)
        if left_out is not None:
            self.say(EventKind.WARNING, "evaluation", detail=left_out)
        found |= mine
        numbers = {f"{name}_{key}" if name else key: value for key, value in found.items()}
        self.say(
            EventKind.EVALUATED,
            "evaluation",
            step=step,
            prompts=len(answers),
            scored=sum(mean_reward(answer.scored.rewards) is not None for answer in answers),
            **{f"eval/{key}": value for key, value in numbers.items()},
            **({"own": [f"{name}_{key}" if name else key for key in mine]} if mine else {}),
            seconds=round(seconds, 3),
        )
        groups = [answer.as_group(number) for number, answer in enumerate(answers)]
        unknown = [np.full(len(group.completions), np.nan) for group in groups]
        self._observer.completions(
            TrainedGroups(step=step, groups=groups, advantages=unknown, learner_version=step, held_out=name)
        )
        return numbers

    def _queue(self, snapshot: LedgerSnapshot, slots: int) -> dict[str, float]:
        live = snapshot.live
        ready = live.get("ready", 0)
        return {
            "queue/ready": ready,
            "queue/in_flight": snapshot.live_total - ready - live.get("taken", 0),
            "queue/slots": slots,
            "ledger/issued": snapshot.issued,
            "ledger/trained": snapshot.trained,
            "ledger/dropped": snapshot.dropped_total,
            "ledger/reissued": snapshot.reissued,
        }

    def _speed(
        self, groups: Sequence[RolloutGroup], built: BuiltStep, result: StepResult, times: StepTimes
    ) -> dict[str, float]:
        elapsed = self._elapsed(times.begin, times.published)
        generated = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        trained = built.num_valid_tokens
        # The learner's own time; what the call adds to it is orchestration.
        wait, learn = times.taken - times.begin, result.seconds
        return {
            "time/step_s": elapsed,
            "time/wait_s": wait,
            "time/learner_s": learn,
            "time/publish_s": times.published - times.trained,
            "time/other_s": max(0.0, elapsed - wait - learn - (times.published - times.trained)),
            "tokens/trained": trained,
            "tokens/generated": generated,
            "throughput/trained_tokens_per_s": trained / elapsed,
            "throughput/generated_tokens_per_s": generated / elapsed,
        }
