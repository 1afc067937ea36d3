"""From groups to micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.policy.group_samples import BuiltStep, RewardRules, build_step
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.config.losses.policy_options import KLEstimator, KLPlacement
from trl_ray.config.runs.grpo_config import GRPOConfig, RLOOConfig
from trl_ray.types import (
    Completion,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    SampleScores,
    VersionSpan,
)

REINFORCE = {"advantage_baseline": "none", "scale_rewards": "none"}
"""The advantage is the shaped reward itself."""


def _completion(length: int, finish: FinishReason = FinishReason.STOP, mask: list[bool] | None = None) -> Completion:
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -1.0, dtype=np.float32),
        versions=(VersionSpan(version=4, start=0, end=length),),
        finish_reason=finish,
        text="",
        loss_mask=None if mask is None else np.array(mask),
    )


def _group(group_id: int, rewards: list[float | None], completions: list[Completion] | None = None) -> RolloutGroup:
    prompt = Prompt(prompt_id=f"0:{group_id}", token_ids=np.array([1, 2, group_id], dtype=np.int32))
    return RolloutGroup(
        ticket=GroupTicket(group_id=group_id, attempt=0, prompt=prompt, admitted_at_version=4),
        completions=tuple(completions or [_completion(2) for _ in rewards]),
        rewards=tuple(Reward(total=r, parts={"f": r}) for r in rewards),
        worker="w",
    )


def _build(
    groups: list[RolloutGroup],
    *,
    rules: RewardRules | None = None,
    scores: list[SampleScores] | None = None,
    **options: Any,
) -> BuiltStep:
    config = AdvantageConfig(**options)
    return build_step(groups, config=config, rules=rules, scores=scores)


def _scores(length: int, gap: float) -> SampleScores:
    """The policy gives each token `gap` nats more than the reference does."""
    policy = np.full(length, -1.0, np.float32)
    return SampleScores(
        logprobs=policy, entropy=np.zeros(length, np.float32), reference_logprobs=policy - np.float32(gap)
    )


def test_truncated_completions_are_masked_but_count_in_the_statistics_of_their_group() -> None:
    completions = [_completion(3), _completion(5, FinishReason.LENGTH)]
    built = _build([_group(0, [0.0, 2.0], completions)], mask_truncated_completions=True)
    first, second = built.samples
    assert built.num_valid_tokens == 3
    assert not second.loss_mask.any() and first.advantage < 0 < second.advantage
    assert _build([_group(0, [0.0, 2.0], completions)]).num_valid_tokens == 8


def test_tokens_the_policy_did_not_sample_are_not_counted() -> None:
    built = _build([_group(0, [0.0, 1.0], [_completion(3, mask=[True, False, True]), _completion(1)])])
    assert built.num_valid_tokens == 3


def test_metrics_leave_missing_rewards_out() -> None:
    groups = [
        _group(0, [0.0, 2.0], [_completion(1), _completion(3, FinishReason.LENGTH)]),
        _group(1, [4.0, None], [_completion(2), _completion(2)]),
    ]
    metrics = {name: metric.value for name, metric in _build(groups).metrics.items()}
    assert metrics == {
        "reward/mean": 2.0,
        "reward/f/mean": 2.0,
        "reward/std": pytest.approx(2**0.5 / 2),
        # -1/sqrt(2), 1/sqrt(2), but for the small number added to the deviation; 0, 0.
        "advantage/mean": 0.0,
        "advantage/std": pytest.approx(0.5, rel=1e-3),
        "advantage/zero_std_fraction": 0.5,
        "completion/length_mean": 2.0,
        "completion/length_max": 3.0,
        "completion/truncated_fraction": 0.25,
    }


def test_an_aborted_completion_is_never_trained_on() -> None:
    group = _group(0, [0.0, 1.0], [_completion(1), _completion(1, FinishReason.ABORT)])
    with pytest.raises(AssertionError, match="group 0"):
        _build([group])


def test_samples_stand_group_by_group_in_the_order_of_the_completions() -> None:
    groups = [_group(7, [0.0, 1.0, 2.0]), _group(3, [5.0, 4.0])]
    built = _build(groups, **REINFORCE)
    assert [(sample.group_id, sample.advantage) for sample in built.samples] == [(7, 0), (7, 1), (7, 2), (3, 5), (3, 4)]


def test_rewards_are_clipped_before_penalties_are_taken_from_them() -> None:
    # Clipped to 2 and -1. At 8 of 10 tokens with a buffer of 4 the penalty is 1/2. 8 * 0.125 and 3 * 0.25 nats.
    groups = [_group(0, [9.0, -9.0], [_completion(8), _completion(3)])]
    rules = RewardRules(max_completion_length=10, beta=1.0)
    options = {**REINFORCE, "reward_clip_range": (-1.0, 2.0), "overlong_buffer_len": 4}
    scores = [_scores(8, 0.125), _scores(3, 0.25)]
    built = _build(groups, rules=rules, scores=scores, **options)
    np.testing.assert_allclose(built.advantages[0], [2.0 - 0.5 - 1.0, -1.0 - 0.75])
    # What is reported is what the functions answered.
    assert built.metrics["reward/mean"].value == 0.0
    assert built.metrics["reward/std"].value == pytest.approx(18 / 2**0.5)


def test_advantages_are_normalised_over_the_groups_of_the_step_where_that_is_asked_for() -> None:
    # 0 2 4 4: mean 2.5, sample variance 11 / 3
    groups = [_group(0, [0.0, 2.0]), _group(1, [4.0, 4.0])]
    built = _build(groups, normalize_advantages=True, **REINFORCE)
    expected = np.array([-2.5, -0.5, 1.5, 1.5]) / ((11 / 3) ** 0.5 + 1e-4)
    np.testing.assert_allclose(np.concatenate(built.advantages), expected)
    assert [sample.advantage for sample in built.samples] == pytest.approx(list(expected))


def test_the_divergence_is_taken_from_the_reward_before_the_baseline_and_reported_per_token() -> None:
    groups = [_group(0, [1.0, None, 1.0], [_completion(2), _completion(4), _completion(4)])]
    scores = [_scores(2, 0.5), _scores(4, 0.0), _scores(4, 1.0)]
    rules = RewardRules(beta=0.1)
    built = _build(groups, rules=rules, scores=scores, advantage_baseline="leave_one_out", scale_rewards="none")
    # 1 - 0.1 * 1 against 1 - 0.1 * 4
    np.testing.assert_allclose(built.advantages[0], [0.3, 0.0, -0.3])
    assert built.metrics["kl/ref"].value == pytest.approx(5 / 10)
    assert built.metrics["advantage/zero_std_fraction"].value == 0.0


def test_a_draft_has_the_samples_of_the_batch_and_knows_no_divergence() -> None:
    groups = [_group(0, [1.0, 2.0], [_completion(2), _completion(4)])]
    draft = _build(groups, rules=RewardRules(beta=0.1), **REINFORCE)
    assert "kl/ref" not in draft.metrics
    np.testing.assert_array_equal(draft.advantages[0], [1.0, 2.0])
    built = _build(groups, rules=RewardRules(beta=0.1), scores=[_scores(2, 1.0), _scores(4, 1.0)], **REINFORCE)
    np.testing.assert_allclose(built.advantages[0], [0.8, 1.6])


def test_a_masked_completion_keeps_its_reward_but_has_no_divergence() -> None:
    groups = [_group(0, [1.0, 1.0], [_completion(2), _completion(2, FinishReason.LENGTH)])]
    scores = [_scores(2, 1.0), _scores(2, 1.0)]
    options = {**REINFORCE, "mask_truncated_completions": True}
    built = _build(groups, rules=RewardRules(beta=0.5), scores=scores, **options)
    np.testing.assert_allclose(built.advantages[0], [0.0, 1.0])
    assert built.metrics["kl/ref"].value == pytest.approx(1.0)


def test_another_estimator_of_the_divergence_may_be_asked_for() -> None:
    groups = [_group(0, [1.0, 1.0], [_completion(1), _completion(1)])]
    rules = RewardRules(beta=1.0, kl_estimator=KLEstimator.K2)
    built = _build(groups, rules=rules, scores=[_scores(1, 1.0), _scores(1, -1.0)], **REINFORCE)
    np.testing.assert_allclose(built.advantages[0], [0.5, 0.5])


def test_a_divergence_that_is_no_number_marks_its_completion_alone() -> None:
    groups = [_group(0, [1.0, 2.0, 4.0], [_completion(1)] * 3)]
    scores = [_scores(1, 0.0), _scores(1, float("nan")), _scores(1, 0.0)]
    options = {"advantage_baseline": "leave_one_out", "scale_rewards": "none"}
    built = _build(groups, rules=RewardRules(beta=1.0), scores=scores, **options)
    np.testing.assert_array_equal(built.advantages[0], [-3.0, np.nan, 3.0])
    assert np.isnan(built.samples[1].advantage)


def test_parts_are_weighted_in_the_order_of_the_functions() -> None:
    # f and g have the same spread and opposite signs; with weights 3 and 1 the sum follows f.
    prompt = _group(0, [0.0, 0.0])
    rewards = (Reward(total=0.0, parts={"f": 0.0, "g": 1.0}), Reward(total=0.0, parts={"f": 1.0, "g": 0.0}))
    group = RolloutGroup(ticket=prompt.ticket, completions=prompt.completions, rewards=rewards, worker="w")
    rules = RewardRules(reward_weights=(3.0, 1.0))
    built = _build([group], rules=rules, multi_objective_aggregation="normalize_then_sum")
    np.testing.assert_allclose(built.advantages[0], [-(0.5**0.5), 0.5**0.5], rtol=1e-3)
    assert built.metrics["advantage/zero_std_fraction"].value == 0.0


def test_the_rules_follow_from_the_configuration() -> None:
    config = RLOOConfig(reward_weights=[1.0, 0.5], max_completion_length=64)
    expected = RewardRules(max_completion_length=64, reward_weights=(1.0, 0.5), beta=0.05, kl_estimator=KLEstimator.K1)
    assert RewardRules.of(config) == expected
    # In the loss it is no business of the reward.
    assert RewardRules.of(GRPOConfig(beta=0.3)).beta == 0.0
    assert RewardRules.of(GRPOConfig(beta=0.3, kl_placement=KLPlacement.REWARD)).beta == 0.3
