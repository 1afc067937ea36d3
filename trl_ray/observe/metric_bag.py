"""Joins metrics of micro-batches, ranks and groups into one number per key, each by its own rule.

    {key: Metric(value, reduce, weight)}, ... -> MetricBag.add -> MetricBag.reduce -> {key: float}

The mean is the weighted mean over everything added, never a mean of means.
"""

from __future__ import annotations

from collections.abc import Mapping

from trl_ray.types import Metric, Reduce


class MetricBag:
    """Gathers the metrics of one optimizer step.

    bag = MetricBag()
    bag.add({"loss": Metric(value=2.0, weight=3), "tokens/trained": Metric(value=3, reduce=Reduce.SUM)})
    bag.add({"loss": Metric(value=1.0, weight=1), "tokens/trained": Metric(value=1, reduce=Reduce.SUM)})
    bag.reduce()  # {"loss": 1.75, "tokens/trained": 4.0}
    """

    def __init__(self) -> None:
        self._metrics: dict[str, list[Metric]] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add one mapping; a key must come with the same rule every time (asserted)."""
        for key, metric in metrics.items():
            seen = self._metrics.setdefault(key, [])
            assert not seen or seen[0].reduce is metric.reduce, (
                f"metric {key!r} must keep one rule, got {metric.reduce.value!r} after {seen[0].reduce.value!r}"
            )
            assert metric.weight >= 0, f"metric {key!r} must have a weight >= 0, got {metric.weight}"
            seen.append(metric)

    def reduce(self) -> dict[str, float]:
        """One number per key, in the order the keys first came.

        A mean whose weights are all 0 has no value and is left out.
        """
        reduced = {key: _reduce(metrics) for key, metrics in self._metrics.items()}
        return {key: value for key, value in reduced.items() if value is not None}


def _reduce(metrics: list[Metric]) -> float | None:
    rule = metrics[0].reduce
    values = [float(metric.value) for metric in metrics]
    if rule is Reduce.MEAN:
        # A value of weight 0 speaks for nothing; leaving it out keeps its NaN, if it has one, out of the sum.
        counted = [metric for metric in metrics if metric.weight > 0]
        weight = sum(metric.weight for metric in counted)
        return sum(metric.value * metric.weight for metric in counted) / weight if weight else None
    if rule is Reduce.SUM:
        return sum(values)
    if rule is Reduce.MAX:
        return max(values)
    if rule is Reduce.MIN:
        return min(values)
    return values[-1]
