"""Measures how old the tokens of a step are when they are trained on, and stops the run when one is too old.

    RolloutGroups + learner version at use -> StalenessMonitor.observe -> {"staleness/...": Metric}

    version      v0 ......... v1 ......... v2 ......... v3
    group          [oldest token ... youngest token]     |  trained on by the learner at v3
                   |<------ in flight ------------>|<--->|  in queue
                   |<---------------- age --------------->|

Ages count optimizer steps: learner version - the version that sampled the token. After a resume, groups restored from
the journal may be younger than the learner; their age is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trl_ray.errors import WeightError
from trl_ray.types import Completion, Metric, Reduce, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenRun:
    """Trained tokens of one completion that one weight version sampled."""

    version: int
    tokens: int


class StalenessMonitor:
    """Knows the oldest age that the run allows and the oldest it has seen.

    monitor = StalenessMonitor(max_age_at_use=2)
    metrics = monitor.observe(groups, learner_version=7)
    """

    def __init__(self, *, max_age_at_use: int) -> None:
        assert max_age_at_use >= 0, f"max_age_at_use must be >= 0, got {max_age_at_use}"
        self.max_age_at_use = max_age_at_use
        self.worst_age = 0

    def observe(
        self, groups: Sequence[RolloutGroup], *, learner_version: int, taken_at: float | None = None
    ) -> dict[str, Metric]:
        """Metrics of the groups that one step takes.

        Args:
            groups: what the step trains on.
            learner_version: version of the learner's weights before the step.
            taken_at: when the step took the groups, in seconds since the epoch; with it the time that groups waited
                after their last span is reported in seconds.

        Returns:
            ``staleness/mean`` and ``staleness/hist_<age>`` (the fraction of trained tokens of that age) weigh tokens;
            ``staleness/in_flight`` and ``staleness/in_queue`` weigh groups; ``staleness/max`` is the oldest token.

        Raises:
            WeightError: a token is older than the bound.
        """
        ages: Counter[int] = Counter()
        metrics: dict[str, Metric] = {}
        in_flight, in_queue, waited = [], [], []
        for group in groups:
            runs = [run for completion in group.completions for run in _token_runs(completion)]
            if not runs:
                continue
            oldest, youngest = min(run.version for run in runs), max(run.version for run in runs)
            self._check(group, oldest=oldest, learner_version=learner_version)
            in_flight.append(youngest - oldest)
            in_queue.append(max(0, learner_version - youngest))
            for run in runs:
                ages[max(0, learner_version - run.version)] += run.tokens
            if taken_at is not None and group.spans:
                waited.append(max(0.0, taken_at - max(span.end for span in group.spans)))
        if in_flight:
            self.worst_age = max(self.worst_age, *ages)
            metrics = self._age_metrics(ages)
            metrics["staleness/in_flight"] = _mean(in_flight)
            metrics["staleness/in_queue"] = _mean(in_queue)
        if waited:
            metrics["staleness/in_queue_s"] = _mean(waited)
        return metrics

    def _check(self, group: RolloutGroup, *, oldest: int, learner_version: int) -> None:
        age = learner_version - oldest
        who = f"group {group.ticket.group_id} (attempt {group.ticket.attempt}, from {group.worker})"
        if age > self.max_age_at_use:
            raise WeightError(
                f"No trained token may be older than {self.max_age_at_use} optimizer steps, got age {age} in {who}: "
                f"sampled by version {oldest}, learner at version {learner_version}. Admission slots were freed too "
                "early; resume from the last checkpoint and report the run's journal.bin."
            )

    def _age_metrics(self, ages: Counter[int]) -> dict[str, Metric]:
        tokens = ages.total()
        metrics = {"staleness/max": Metric(value=max(ages), reduce=Reduce.MAX)}
        if tokens:
            mean = sum(age * count for age, count in ages.items()) / tokens
            metrics["staleness/mean"] = Metric(value=mean, weight=tokens)
            for age in range(self.max_age_at_use + 1):
                metrics[f"staleness/hist_{age}"] = Metric(value=ages[age] / tokens, weight=tokens)
        return metrics


def _token_runs(completion: Completion) -> Iterator[_TokenRun]:
    for span in completion.versions:
        mask = completion.loss_mask
        tokens = span.end - span.start if mask is None else int(mask[span.start : span.end].sum())
        # A span of tool output alone still counts for the bound: its version shaped what followed.
        yield _TokenRun(version=span.version, tokens=tokens)


def _mean(values: Sequence[float]) -> Metric:
    return Metric(value=sum(values) / len(values), weight=len(values))
