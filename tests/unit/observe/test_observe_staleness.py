from collections.abc import Callable

import pytest

from trl_ray.algorithms.metric_merging import merged_values
from trl_ray.errors import WeightError
from trl_ray.observe.staleness import StalenessMonitor
from trl_ray.types import RolloutGroup, Span

GroupMaker = Callable[..., RolloutGroup]


def test_ages_weigh_tokens_and_split_into_flight_and_queue(make_group: GroupMaker) -> None:
    # Learner at 5. First group: 3 tokens of v3, 1 of v4. Second: 4 tokens of v5.
    groups = [make_group(versions=[[(3, 0, 3), (4, 3, 4)]]), make_group(group_id=1, versions=[[(5, 0, 4)]])]
    assert merged_values([StalenessMonitor(max_age_at_use=2).observe(groups, learner_version=5)]) == {
        "staleness/max": 2.0,
        "staleness/mean": (3 * 2 + 1 * 1) / 8,
        "staleness/hist_0": 4 / 8,
        "staleness/hist_1": 1 / 8,
        "staleness/hist_2": 3 / 8,
        "staleness/in_flight": 0.5,
        "staleness/in_queue": 0.5,
    }


def test_a_token_above_the_bound_stops_the_run_and_names_its_group(make_group: GroupMaker) -> None:
    monitor = StalenessMonitor(max_age_at_use=2)
    monitor.observe([make_group(versions=[[(3, 0, 4)]])], learner_version=5)
    with pytest.raises(WeightError, match=r"older than 2 optimizer steps, got age 3 in group 9 \(attempt 1"):
        monitor.observe([make_group(group_id=9, versions=[[(2, 0, 1), (5, 1, 4)]])], learner_version=5)
    assert monitor.worst_age == 2


def test_tool_output_counts_for_the_bound_but_not_for_the_mean(make_group: GroupMaker) -> None:
    group = make_group(versions=[[(3, 0, 2), (5, 2, 4)]], loss_mask=[False, False, True, True])
    metrics = StalenessMonitor(max_age_at_use=2).observe([group], learner_version=5)
    assert metrics["staleness/mean"].value == 0.0
    with pytest.raises(WeightError):
        StalenessMonitor(max_age_at_use=1).observe([group], learner_version=5)


def test_groups_younger_than_a_resumed_learner_have_age_zero(make_group: GroupMaker) -> None:
    metrics = StalenessMonitor(max_age_at_use=0).observe([make_group(versions=[[(7, 0, 4)]])], learner_version=5)
    assert metrics["staleness/max"].value == 0 and metrics["staleness/in_queue"].value == 0


def test_waiting_in_the_queue_runs_from_the_last_span_to_the_take(make_group: GroupMaker) -> None:
    spans = (Span(actor="r", name="generate", start=1.0, end=4.0), Span(actor="w", name="score", start=4.0, end=6.0))
    metrics = StalenessMonitor(max_age_at_use=0).observe([make_group(spans=spans)], learner_version=0, taken_at=9.0)
    assert metrics["staleness/in_queue_s"].value == 3.0


def test_no_groups_give_no_metrics() -> None:
    assert StalenessMonitor(max_age_at_use=0).observe([], learner_version=0) == {}
