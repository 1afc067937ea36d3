"""Joining metrics of micro-batches: each `Metric` says itself how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trl_ray.types import Metric, Reduce


def token_mean(total: float, count: float) -> Metric:
    """A mean over `count` things whose sum is `total`; joins with its like to the exact overall mean."""
    return Metric(value=total / count if count else 0.0, reduce=Reduce.MEAN, weight=count)


def merge_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Join the metrics of several micro-batches or ranks, name by name.

    A MEAN of total weight 0 (nothing was counted anywhere) is left out.
    """
    by_name: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            by_name.setdefault(name, []).append(metric)
    merged = {name: merge_metric(metrics) for name, metrics in by_name.items()}
    return {name: metric for name, metric in merged.items() if metric.reduce is not Reduce.MEAN or metric.weight > 0}


def merge_metric(metrics: list[Metric]) -> Metric:
    """Join values of one metric, which must agree on the rule."""
    rule = metrics[0].reduce
    assert all(metric.reduce is rule for metric in metrics), f"a metric has one rule, got {metrics}"
    values = [metric.value for metric in metrics]
    if rule is Reduce.MEAN:
        weight = sum(metric.weight for metric in metrics)
        # An empty part may hold anything: 0 * NaN must not reach the sum.
        total = sum(metric.value * metric.weight for metric in metrics if metric.weight)
        return Metric(value=total / weight if weight else 0.0, reduce=rule, weight=weight)
    if rule is Reduce.SUM:
        return Metric(value=sum(values), reduce=rule)
    if rule is Reduce.MAX:
        return Metric(value=max(values), reduce=rule)
    return Metric(value=min(values) if rule is Reduce.MIN else values[-1], reduce=rule)
