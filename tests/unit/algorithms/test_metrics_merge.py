"""Joining metrics of micro-batches."""

from __future__ import annotations

from trl_ray.algorithms.metric_merging import merge_metrics, token_mean
from trl_ray.types import Metric, Reduce


def test_a_mean_is_weighted_and_an_empty_part_does_not_count() -> None:
    parts = [{"a": token_mean(6.0, 2)}, {"a": token_mean(1.0, 1)}, {"a": Metric(value=float("nan"), weight=0.0)}]
    merged = merge_metrics(parts)
    assert merged["a"].value == 7 / 3 and merged["a"].weight == 3
    assert merge_metrics([{"a": token_mean(0.0, 0)}]) == {}


def test_each_rule_joins_its_own_way() -> None:
    for rule, expected in [(Reduce.SUM, 3.0), (Reduce.MAX, 2.0), (Reduce.MIN, 1.0), (Reduce.LAST, 1.0)]:
        parts = [{"a": Metric(value=2.0, reduce=rule)}, {"a": Metric(value=1.0, reduce=rule)}]
        assert merge_metrics(parts)["a"].value == expected
