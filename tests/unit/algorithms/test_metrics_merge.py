"""Joining metrics of micro-batches, ranks and groups."""

from __future__ import annotations

import pytest

from trl_ray.algorithms.metric_merging import mean_metric, merge_metrics, merged_values, token_mean
from trl_ray.types import Metric, Reduce


def test_a_mean_is_weighted_and_an_empty_part_does_not_count() -> None:
    parts = [{"a": token_mean(6.0, 2)}, {"a": token_mean(1.0, 1)}, {"a": Metric(value=float("nan"), weight=0.0)}]
    merged = merge_metrics(parts)
    assert merged["a"].value == 7 / 3 and merged["a"].weight == 3
    assert merge_metrics([{"a": token_mean(0.0, 0)}]) == {}


def test_each_rule_joins_values_in_its_own_way() -> None:
    parts = [
        {
            "mean": Metric(value=value, weight=weight),
            "sum": Metric(value=value, reduce=Reduce.SUM),
            "max": Metric(value=value, reduce=Reduce.MAX),
            "min": Metric(value=value, reduce=Reduce.MIN),
            "last": Metric(value=value, reduce=Reduce.LAST),
        }
        for value, weight in ((2.0, 3.0), (1.0, 1.0))
    ]
    assert merged_values(parts) == {"mean": 1.75, "sum": 3.0, "max": 2.0, "min": 1.0, "last": 1.0}
    assert {name: metric.value for name, metric in merge_metrics(parts).items()} == merged_values(parts)
    assert {name: metric.reduce for name, metric in merge_metrics(parts).items()} == {
        name: metric.reduce for name, metric in parts[0].items()
    }


def test_a_mean_weighs_values_and_is_no_mean_of_means() -> None:
    parts = [
        {"x": Metric(value=sum(micro_batch) / len(micro_batch), weight=len(micro_batch))}
        for micro_batch in ([1.0], [0.0, 0.0, 0.0])
    ]
    assert merged_values(parts) == {"x": 0.25}


def test_joining_in_two_steps_is_joining_at_once() -> None:
    parts = [{"x": token_mean(3.0, 1)}, {"x": token_mean(1.0, 2)}, {"x": token_mean(0.0, 1)}]
    assert merged_values([merge_metrics(parts[:2]), parts[2]]) == merged_values(parts) == {"x": 1.0}


def test_one_name_with_two_rules_is_refused() -> None:
    with pytest.raises(AssertionError, match="'x' must keep one rule, got 'sum' after 'mean'"):
        merge_metrics([{"x": Metric(value=1.0)}, {"x": Metric(value=1.0, reduce=Reduce.SUM)}])


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(AssertionError, match="'x' must have a weight >= 0, got -1"):
        merge_metrics([{"x": Metric(value=1.0, weight=-1.0)}])


def test_a_mean_without_weight_is_left_out_even_when_it_is_nan() -> None:
    nothing = {"empty": Metric(value=float("nan"), weight=0.0), "x": Metric(value=float("nan"), weight=0.0)}
    assert merged_values([nothing, {"x": Metric(value=2.0)}]) == {"x": 2.0}


def test_numbers_are_floats_whatever_they_were_counted_in() -> None:
    values = merged_values(
        [{"oldest": Metric(value=2, reduce=Reduce.MAX), "trained": Metric(value=3, reduce=Reduce.SUM)}]
    )
    assert [str(value) for value in values.values()] == ["2.0", "3.0"]


def test_the_mean_of_what_is_known_leaves_out_what_is_not() -> None:
    assert mean_metric([1.0, None, 2.0]) == Metric(value=1.5, weight=2)
    assert mean_metric([None]) == Metric(value=0.0, weight=0)
