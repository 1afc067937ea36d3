"""Metrics of self-distillation by hand, and warnings at the first and every N-th degenerate step in a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.distillation.self_distillation_diagnostics import (
    Degeneracy,
    SelfDistillationDiagnostics,
    SelfDistillationGroup,
    self_distillation_group,
    self_distillation_metrics,
)
from trl_ray.types import GroupTicket, Prompt, Reward, RolloutGroup, TeacherContext


def group(rewards: list[float], **changes: Any) -> SelfDistillationGroup:
    values: dict[str, Any] = {
        "rewards": np.array(rewards, np.float32),
        "has_success": bool(np.nanmax([*rewards, -1.0]) >= 1),
        "num_demonstrated": 0,
        "num_with_feedback": 0,
        "num_feedback_used": 0,
        "num_distilled": 0,
    }
    return SelfDistillationGroup(**values | changes)


def metrics(*groups: SelfDistillationGroup) -> dict[str, float]:
    found = self_distillation_metrics(groups, flat_tolerance=1e-8)
    return {name.removeprefix("self_distillation/"): value for name, value in found.items()}


def test_facts_of_a_group_are_told_from_its_rewards_and_contexts() -> None:
    prompt = Prompt(prompt_id="0:0", token_ids=np.array([1], np.int32))
    contexts = (
        TeacherContext(prompt_ids=prompt.token_ids, demonstration=1, has_feedback=True, uses_feedback=True, num_cut=3),
        TeacherContext(prompt_ids=prompt.token_ids, is_distilled=False, has_feedback=True),
        TeacherContext(prompt_ids=prompt.token_ids, demonstration=1),
    )
    finished = RolloutGroup(
        ticket=GroupTicket(group_id=0, attempt=0, prompt=prompt, admitted_at_version=0),
        completions=(),
        rewards=tuple(
            Reward(total=total, parts=parts)
            for total, parts in ((0.0, {"right": 0.0}), (0.75, {"right": 1.0, "short": None}), (None, {}))
        ),
        worker="rollout-0",
        contexts=contexts,
    )
    facts = self_distillation_group(finished, threshold=0.75)
    np.testing.assert_array_equal(facts.rewards, np.array([0, 0.75, np.nan], np.float32))
    np.testing.assert_array_equal(facts.parts["right"], np.array([0, 1, np.nan], np.float32))
    assert np.isnan(facts.parts["short"]).all()
    assert facts.has_success
    assert not self_distillation_group(finished, threshold=0.76).has_success
    assert (facts.num_demonstrated, facts.num_with_feedback, facts.num_feedback_used) == (2, 2, 1)
    assert (facts.num_distilled, facts.num_cut) == (2, 1)
    assert self_distillation_group(replace(finished, contexts=()), threshold=0.75).num_distilled == 0


def test_metrics_are_those_of_the_whole_step() -> None:
    first = group([0, 2], num_demonstrated=1, num_with_feedback=2, num_feedback_used=1, num_distilled=2, num_cut=1)
    found = metrics(first, group([0.5, 0.5]))
    assert found == {
        "success_group_fraction": 0.5,
        "success_sample_fraction": 0.25,
        "feedback_available_fraction": 0.5,
        "feedback_used_fraction": 0.25,
        "reprompt_sample_fraction": 0.5,
        "reprompt_cut_fraction": 0.25,
        "reward_mean": 0.75,
        # Deviations -0.75, 1.25, -0.25, -0.25 from the mean; their squares sum to 2.25, over three.
        "reward_std": pytest.approx(np.sqrt(2.25 / 3)),
        "reward_min": 0.0,
        "reward_max": 2.0,
        # sqrt(2) and 0.
        "group_reward_std_mean": pytest.approx(np.sqrt(2) / 2),
        "flat_group_fraction": 0.5,
    }


def test_rewards_that_nobody_gave_are_left_out() -> None:
    parts = {"right": np.array([1, np.nan], np.float32), "short": np.array([np.nan, np.nan], np.float32)}
    found = metrics(group([np.nan, 3], parts=parts), group([np.nan, np.nan]))
    assert (found["reward_mean"], found["reward_min"], found["reward_max"], found["reward_std"]) == (3, 3, 3, 0)
    assert found["rewards/right"] == 1
    assert "rewards/short" not in found
    assert found["success_group_fraction"] == 0.5
    nobody = metrics(group([np.nan, np.nan]))
    assert "reward_mean" not in nobody
    assert nobody["flat_group_fraction"] == 1


def observe(diagnostics: SelfDistillationDiagnostics, *groups: SelfDistillationGroup) -> int:
    return len(diagnostics.observe(self_distillation_metrics(groups, flat_tolerance=1e-8)))


HEALTHY = group([0, 1], num_distilled=1)
NOTHING = group([0, 0])


def test_a_warning_comes_with_the_first_and_every_nth_step_in_a_row() -> None:
    diagnostics = SelfDistillationDiagnostics(warning_interval=3, flat_tolerance=1e-8)
    # All three kinds at once.
    assert [observe(diagnostics, NOTHING) for _ in range(7)] == [3, 0, 3, 0, 0, 3, 0]
    assert diagnostics.counts == dict.fromkeys(Degeneracy, 7)


def test_a_healthy_step_begins_the_count_anew() -> None:
    diagnostics = SelfDistillationDiagnostics(warning_interval=3, flat_tolerance=1e-8)
    assert [observe(diagnostics, each) for each in (NOTHING, NOTHING, HEALTHY, NOTHING)] == [3, 0, 0, 3]


def test_every_kind_is_counted_by_itself() -> None:
    diagnostics = SelfDistillationDiagnostics(warning_interval=10, flat_tolerance=1e-8)
    observe(diagnostics, group([0, 0.5], num_distilled=1))
    observe(diagnostics, group([1, 1], num_distilled=1))
    observe(diagnostics, group([1, 1]))
    assert diagnostics.counts == {
        Degeneracy.FLAT_REWARDS: 2,
        Degeneracy.INACTIVE_SELF_DISTILLATION: 1,
        Degeneracy.NO_SUCCESSFUL_ROLLOUTS: 0,
    }


def test_groups_that_are_flat_each_on_another_level_are_not_flat_rewards() -> None:
    diagnostics = SelfDistillationDiagnostics(warning_interval=10, flat_tolerance=1e-8)
    observe(diagnostics, group([0, 0]), group([1, 1]))
    assert diagnostics.counts[Degeneracy.FLAT_REWARDS] == 0


def test_an_interval_of_zero_neither_counts_nor_warns() -> None:
    diagnostics = SelfDistillationDiagnostics(warning_interval=0, flat_tolerance=1e-8)
    assert [observe(diagnostics, NOTHING) for _ in range(3)] == [0, 0, 0]
    assert diagnostics.counts == dict.fromkeys(Degeneracy, 0)


def test_the_count_goes_on_after_a_checkpoint() -> None:
    diagnostics = SelfDistillationDiagnostics(warning_interval=3, flat_tolerance=1e-8)
    observe(diagnostics, NOTHING), observe(diagnostics, NOTHING)
    resumed = SelfDistillationDiagnostics(warning_interval=3, flat_tolerance=1e-8)
    resumed.restore(diagnostics.state())
    assert observe(resumed, NOTHING) == 3
    assert resumed.state() == dict.fromkeys(["flat_rewards", "inactive_self_distillation", "no_successful_rollouts"], 3)
