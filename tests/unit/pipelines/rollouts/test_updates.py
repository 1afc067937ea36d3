"""From groups to updates: the first pass, slices, and several updates told as one step."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fakes import group
from objectives import objective_of
from trl_ray.algorithms.batches.micro_batches import CutRules
from trl_ray.algorithms.loss import StepTotals
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.pipelines.rollouts.updates import AskLearner, Updated, merge_results, prepare_step, train_on
from trl_ray.types import Metric, Reduce, RolloutGroup, SampleScores, StepResult, TrainBatch, TrainingSample


class Learner:
    """Scores every token by its completion's place in its group, and counts updates."""

    def __init__(self) -> None:
        self.scored: list[TrainBatch] = []
        self.steps: list[TrainBatch] = []

    async def ask(self, method: str, batch: TrainBatch) -> Any:
        if method == "score":
            self.scored.append(batch)
            return [self._score(s.group_id) for micro_batch in batch.micro_batches for s in micro_batch]
        self.steps.append(batch)
        return result(len(self.steps))

    def _score(self, group_id: int) -> SampleScores:
        # The policy is `group_id` nats above the reference at each of the two tokens.
        logprobs = np.full(2, -1.0 - group_id, np.float32)
        return SampleScores(
            logprobs=logprobs, entropy=np.array([0.1, 2.0], np.float32), reference_logprobs=logprobs - group_id
        )


def result(number: int, *, skipped: bool = False) -> StepResult:
    return StepResult(
        version=1,
        loss=math.nan if skipped else float(number),
        grad_norm=math.nan if skipped else 2.0 * number,
        lr=0.1 / number,
        skipped=skipped,
        metrics={
            "entropy": Metric(value=float(number), weight=number),
            "tokens/trained": Metric(value=4.0, reduce=Reduce.SUM),
        },
        seconds=1.0,
    )


def one_step(groups: Sequence[RolloutGroup], config: GRPOConfig, cut: CutRules, ask: AskLearner) -> Updated:
    async def updated() -> Updated:
        objective = objective_of(config)
        prepared = await prepare_step(groups, step=5, objective=objective, cut=cut, ask_learner=ask)
        return await train_on(prepared, step=5, config=config, objective=objective, cut=cut, ask_learner=ask)

    return asyncio.run(updated())


def run(learner: Learner, **options: Any) -> Updated:
    values = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **options}
    groups = [group(number, (0.0, 1.0)) for number in (0, 1)]
    cut = CutRules(max_samples=2)
    return one_step(groups, GRPOConfig(**values), cut, learner.ask)


def test_one_update_needs_no_first_pass() -> None:
    learner = Learner()
    updated = run(learner)
    (batch,) = learner.steps
    assert not learner.scored and batch.step == 5 and batch.is_last_update
    assert (batch.num_samples, batch.num_valid_tokens, batch.num_micro_batches) == (4, 8, 2)
    assert updated.result == result(1) and len(updated.built.samples) == 4


def test_a_policy_loss_finds_the_totals_that_it_names_of_each_whole_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: PolicyLoss, samples: Sequence[TrainingSample]) -> dict[str, float]:
        return {"rewarded": float(sum(sample.advantage > 0 for sample in samples))}

    monkeypatch.setattr(PolicyLoss, "totals", own)
    learner = Learner()
    run(learner)
    (batch,) = learner.steps
    # Two groups of one good and one bad completion, in two micro-batches.
    assert batch.num_micro_batches == 2 and StepTotals.of(batch).count("rewarded") == 2
    learner = Learner()
    run(learner, steps_per_generation=4)
    assert [StepTotals.of(batch).count("rewarded") for batch in learner.steps] == [1, 1]


def test_several_updates_get_the_old_policy_of_one_first_pass() -> None:
    learner = Learner()
    run(learner, num_iterations=2, steps_per_generation=4, per_device_train_batch_size=1)
    (draft,) = learner.scored
    assert draft.num_samples == 4
    assert [batch.is_last_update for batch in learner.steps] == [False, False, False, True]
    for batch in learner.steps:
        for sample in (sample for micro_batch in batch.micro_batches for sample in micro_batch):
            assert sample.old_logprobs is not None
            np.testing.assert_array_equal(sample.old_logprobs, [-1.0 - sample.group_id] * 2)


def test_tokens_of_high_entropy_are_chosen_over_the_whole_step() -> None:
    learner = Learner()
    run(learner, top_entropy_quantile=0.5)
    (batch,) = learner.steps
    assert batch.num_valid_tokens == 8 and batch.num_surrogate_tokens == 4
    for sample in (sample for micro_batch in batch.micro_batches for sample in micro_batch):
        assert sample.surrogate_mask is not None and sample.surrogate_mask.tolist() == [False, True]


def test_a_kl_in_the_reward_is_taken_before_advantages_are_formed() -> None:
    learner = Learner()
    # 2 tokens x group_id nats x 0.5: 0 for both of group 0, 1 for both of group 1.
    options = {"kl_placement": "reward", "kl_estimator": "k1", "advantage_baseline": "none", "scale_rewards": "none"}
    updated = run(learner, beta=0.5, **options)
    assert [values.tolist() for values in updated.built.advantages] == [[0.0, 1.0], [-1.0, 0.0]]
    (batch,) = learner.steps
    assert sorted(s.advantage for micro_batch in batch.micro_batches for s in micro_batch) == [-1.0, 0.0, 0.0, 1.0]


def test_scores_find_their_samples_however_the_first_pass_was_cut() -> None:
    class Telling(Learner):
        """The policy is as many nats above the reference as the draft's advantage, which is the reward."""

        async def ask(self, method: str, batch: TrainBatch) -> Any:
            if method == "step":
                return await super().ask(method, batch)
            drafts = [s.advantage for micro_batch in batch.micro_batches for s in micro_batch]
            assert drafts != [0.0, 1.0, 2.0, 0.0, 1.0, 2.0], "cut in twos, groups of three must be torn and mixed"
            zeros = np.zeros(2, np.float32)
            return [SampleScores(logprobs=zeros, entropy=zeros, reference_logprobs=zeros - gap) for gap in drafts]

    config = GRPOConfig(
        num_generations=3,
        per_device_train_batch_size=6,
        beta=0.5,
        kl_placement="reward",
        kl_estimator="k1",
        advantage_baseline="none",
        scale_rewards="none",
    )
    groups = [group(number, (0.0, 1.0, 2.0)) for number in (0, 1)]
    updated = one_step(groups, config, CutRules(max_samples=2), Telling().ask)
    # reward - 0.5 * 2 tokens * reward
    assert [values.tolist() for values in updated.built.advantages] == [[0.0] * 3] * 2


def test_updates_of_one_step_are_told_as_one() -> None:
    merged = merge_results([result(1), result(3), result(2, skipped=True)])
    assert (merged.loss, merged.grad_norm, merged.lr, merged.skipped, merged.seconds) == (2.0, 4.0, 0.05, False, 3.0)
    assert merged.metrics["tokens/trained"].value == 12.0
    assert merged.metrics["entropy"].value == pytest.approx((1 * 1 + 3 * 3 + 2 * 2) / 6)
    assert merge_results([result(1, skipped=True), result(2, skipped=True)]).skipped
