import pytest

from trl_ray.observe.metric_bag import MetricBag
from trl_ray.types import Metric, Reduce


def test_each_rule_joins_values_in_its_own_way() -> None:
    bag = MetricBag()
    for value, weight in ((2.0, 3.0), (1.0, 1.0)):
        bag.add(
            {
                "mean": Metric(value=value, weight=weight),
                "sum": Metric(value=value, reduce=Reduce.SUM),
                "max": Metric(value=value, reduce=Reduce.MAX),
                "min": Metric(value=value, reduce=Reduce.MIN),
                "last": Metric(value=value, reduce=Reduce.LAST),
            }
        )
    assert bag.reduce() == {"mean": 1.75, "sum": 3.0, "max": 2.0, "min": 1.0, "last": 1.0}


def test_a_mean_weighs_values_and_is_no_mean_of_means() -> None:
    bag = MetricBag()
    for micro_batch in ([1.0], [0.0, 0.0, 0.0]):
        bag.add({"x": Metric(value=sum(micro_batch) / len(micro_batch), weight=len(micro_batch))})
    assert bag.reduce() == {"x": 0.25}


def test_one_key_with_two_rules_is_refused() -> None:
    bag = MetricBag()
    bag.add({"x": Metric(value=1.0)})
    with pytest.raises(AssertionError, match="'x' must keep one rule, got 'sum' after 'mean'"):
        bag.add({"x": Metric(value=1.0, reduce=Reduce.SUM)})


def test_a_mean_without_weight_is_left_out_even_when_it_is_nan() -> None:
    bag = MetricBag()
    bag.add({"empty": Metric(value=float("nan"), weight=0.0), "x": Metric(value=float("nan"), weight=0.0)})
    bag.add({"x": Metric(value=2.0)})
    assert bag.reduce() == {"x": 2.0}
