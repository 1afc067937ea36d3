"""Joins metrics of micro-batches, ranks, updates and groups into one per name: each `Metric` says itself how.

    {name: Metric(value, reduce, weight)}, ... --merge_metrics--> {name: Metric} --merged_values--> {name: float}

MEAN is the weighted mean over everything joined, never a mean of means; SUM, MAX and MIN are what they are called; LAST
is the last one given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trl_ray.types import Metric, Reduce


def token_mean(total: float, count: float) -> Metric:
    """A mean over `count` things whose sum is `total`; joins with its like to the exact overall mean."""
    return Metric(value=total / count if count else 0.0, reduce=Reduce.MEAN, weight=count)


def mean_metric(values: Iterable[float | None]) -> Metric:
    """The mean of the values that exist, weighing as many as there are."""
    known = [float(value) for value in values if value is not None]
    return token_mean(sum(known), len(known))


def merge_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Join metrics name by name, in the order the names first came.

    A MEAN of total weight 0 (nothing was counted anywhere) is left out.

    Raises:
        AssertionError: one name came with two rules, or with a weight below 0.
    """
    by_name: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            by_name.setdefault(name, []).append(metric)
    merged = {name: _merge_metric(name, metrics) for name, metrics in by_name.items()}
    return {name: metric for name, metric in merged.items() if metric.reduce is not Reduce.MEAN or metric.weight > 0}


def merged_values(parts: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """`merge_metrics` as the numbers that are written down."""
    return {name: metric.value for name, metric in merge_metrics(parts).items()}


def _merge_metric(name: str, metrics: Sequence[Metric]) -> Metric:
    rule = metrics[0].reduce
    for metric in metrics:
        assert metric.reduce is rule, (
            f"metric {name!r} must keep one rule, got {metric.reduce.value!r} after {rule.value!r}"
        )
        assert metric.weight >= 0, f"metric {name!r} must have a weight >= 0, got {metric.weight}"
    values = [float(metric.value) for metric in metrics]
    match rule:
        case Reduce.MEAN:
            # An empty part may hold anything: 0 * NaN must not reach the sum.
            total = sum(metric.value * metric.weight for metric in metrics if metric.weight)
            return token_mean(total, sum(metric.weight for metric in metrics))
        case Reduce.SUM:
            return Metric(value=sum(values), reduce=rule)
        case Reduce.MAX:
            return Metric(value=max(values), reduce=rule)
        case Reduce.MIN:
            return Metric(value=min(values), reduce=rule)
        case Reduce.LAST:
            return Metric(value=values[-1], reduce=rule)
