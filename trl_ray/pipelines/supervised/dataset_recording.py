"""Writes down a run on a dataset: one metrics line per step, evaluations, events, and what became of every row.

DatasetLoop --> SupervisedRecorder --> Observer and the run directory's files
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_ray.algorithms.metric_merging import merged_values
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.pipelines.run.own_metrics import own_numbers
from trl_ray.pipelines.run.recording import RunRecorder
from trl_ray.pipelines.supervised.example_feed import Fed, StreamPlace, place_of, state_of
from trl_ray.types import DropReason, Evaluation, EventKind, StepResult, steady_time


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedTimes:
    """When the parts of one step ended, in seconds since the epoch."""

    begin: float
    fed: float
    """The step's examples were there."""
    trained: float


@dataclass(slots=True, kw_only=True)
class Accounts:
    """What became of the rows so far; mutable, owned by the loop, kept in checkpoints.

    A row is issued when a step takes it, in every epoch anew; one that nothing can be trained of is dropped where it
    is met, once in a dataset, in every pass over a stream.
    """

    step: int = 0
    """Finished optimizer steps."""
    left_out: int = 0
    """Steps that a callback had left out at the ends of epochs."""
    trained: int = 0
    skipped: int = 0
    """Rows of steps that met NaN or infinity."""
    untrained: Mapping[str, int] = field(default_factory=dict)
    """Rows in no example, by reason."""
    losses: Mapping[str, int] = field(default_factory=dict)
    """What a stream has lost so far, by `Lost`."""
    place: StreamPlace | None = None

    def advance(self, fed: Fed, *, step: int, skipped: bool) -> None:
        """Count the rows of a finished step."""
        rows = sum(example.num_rows for example in fed.examples)
        self.step = step
        self.trained += 0 if skipped else rows
        self.skipped += rows if skipped else 0
        if fed.untrained is not None:
            self.untrained, self.losses = fed.untrained, fed.losses
        if fed.place is not None:
            self.place = fed.place

    def snapshot(self) -> LedgerSnapshot:
        """The balance: issued = trained + dropped."""
        dropped = Counter(self.untrained)
        if self.skipped:
            dropped[DropReason.NUMERICS.value] += self.skipped
        return LedgerSnapshot(
            issued=self.trained + dropped.total(),
            trained=self.trained,
            dropped=dict(dropped),
            live={},
            fenced=0,
            reissued=0,
            step=self.step,
            version=self.step,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "step": self.step,
            "left_out": self.left_out,
            "trained": self.trained,
            "skipped": self.skipped,
            "untrained": dict(self.untrained),
            "losses": dict(self.losses),
            "place": state_of(self.place),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Accounts:
        """The inverse of `state_dict`."""
        place = state["place"]
        return cls(**{**state, "place": None if place is None else place_of(place)})


class SupervisedRecorder(RunRecorder):
    """Everything a run on a dataset leaves behind, except its checkpoints."""

    def step(
        self,
        step: int,
        *,
        fed: Fed,
        result: StepResult,
        times: SupervisedTimes,
        accounts: Accounts,
        evaluated: Mapping[str, float],
    ) -> None:
        """Write the line of one optimizer step, with what was evaluated after it, and the ledger."""
        elapsed = self._elapsed(times.begin, times.trained)
        metrics, seen = merged_values([result.metrics]), sum(example.num_tokens for example in fed.examples)
        wait, learn = times.fed - times.begin, result.seconds
        ledger = accounts.snapshot()
        record: dict[str, float] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "epoch": fed.epoch,
            **metrics,
            **{f"eval/{name}": value for name, value in evaluated.items()},
            "weights/version": result.version,
            "ledger/issued": ledger.issued,
            "ledger/trained": ledger.trained,
            "ledger/dropped": ledger.dropped_total,
            "time/step_s": elapsed,
            "time/wait_s": wait,
            "time/learner_s": learn,
            "time/other_s": max(0.0, elapsed - wait - learn),
            "examples/trained": len(fed.examples),
            "tokens/seen": seen,
            "throughput/seen_tokens_per_s": seen / elapsed,
            "throughput/trained_tokens_per_s": metrics.get("tokens/trained", 0.0) / elapsed,
        }
        self._write_step(step, record, ledger)

    def evaluated(
        self,
        step: int,
        evaluation: Evaluation,
        *,
        examples: int,
        begin: float,
        name: str = "",
        own: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Write down an evaluation on held-out examples; the `name` of their set begins those of its numbers.

        Args:
            step: finished optimizer steps.
            evaluation: of the learner.
            examples: how many.
            begin: when it began, in seconds since the epoch.
            name: of their set.
            own: what the user's `compute_metrics` says of them.

        Returns:
            Its numbers, without ``eval/``.
        """
        found = {"loss": evaluation.loss, **merged_values([evaluation.metrics])}
        mine, left_out = own_numbers(own or {}, name)
        if left_out is not None:
            self.say(EventKind.WARNING, "evaluation", detail=left_out)
        found |= mine
        numbers = {f"{name}_{key}" if name else key: value for key, value in found.items()}
        self.say(
            EventKind.EVALUATED,
            "evaluation",
            step=step,
            examples=examples,
            **{f"eval/{key}": value for key, value in numbers.items()},
            **({"own": [f"{name}_{key}" if name else key for key in mine]} if mine else {}),
            seconds=round(steady_time() - begin, 3),
        )
        return numbers
