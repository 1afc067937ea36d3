"""What scores of a first pass put into samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
from trl_ray.algorithms.loss import sample_tokens
from trl_ray.algorithms.policy.first_pass import high_entropy_masks, needs_first_pass, with_scores
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.types import SampleScores, TrainingSample


def _sample(trained: list[int]) -> TrainingSample:
    mask = np.array(trained, dtype=bool)
    return TrainingSample(
        group_id=0,
        prompt_ids=np.array([1], dtype=np.int32),
        completion_ids=np.arange(len(mask), dtype=np.int32),
        loss_mask=mask,
        sampler_logprobs=np.full(len(mask), -2.0, dtype=np.float32),
        advantage=1.0,
        min_version=0,
    )


def _scores(entropy: list[float], *, reference: bool = False) -> SampleScores:
    array = np.array(entropy, dtype=np.float32)
    return SampleScores(logprobs=-array, entropy=array, reference_logprobs=-2 * array if reference else None)


@pytest.mark.parametrize(
    ("options", "updates", "expected"),
    [
        ({}, 1, False),
        ({}, 2, True),
        ({"old_logprobs": "sampler"}, 2, False),
        ({"top_entropy_quantile": 0.5}, 1, True),
        ({"beta": 0.1}, 1, False),
        ({"beta": 0.1, "kl_placement": "reward"}, 1, True),
        ({"beta": 0.0, "kl_placement": "reward"}, 1, False),
        ({"loss_type": "vespo", "off_policy_mask_threshold": 0.1, "entropy_coef": 0.1}, 1, False),
    ],
)
def test_a_first_pass_is_made_only_for_what_the_training_pass_cannot_know(
    options: dict[str, Any], updates: int, expected: bool
) -> None:
    assert needs_first_pass(LossConfig(**options), updates_per_step=updates) is expected


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        # trained entropies 1 2 3 4 5; the quantile of 0.4 is 2.6, of 0.75 is 4, of 1 is 5, of 0 is 1
        (0.6, [3.0, 4.0, 5.0]),
        (0.25, [4.0, 5.0]),
        (0.0, [5.0]),
        (0.999, [2.0, 3.0, 4.0, 5.0]),
    ],
)
def test_the_tokens_of_highest_entropy_over_all_samples_are_kept(share: float, kept: list[float]) -> None:
    samples = [_sample([1, 1, 0]), _sample([1, 1, 1])]
    scores = [_scores([5.0, 1.0, 9.0]), _scores([2.0, 4.0, 3.0])]  # 9 is not trained on
    masks = high_entropy_masks(samples, scores, share=share)
    found = [value for mask, score in zip(masks, scores, strict=True) for value in score.entropy[mask]]
    assert sorted(found) == kept


@pytest.mark.parametrize("count", [6, 11, 21, 101])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
def test_a_threshold_that_falls_on_a_token_keeps_that_token(share: float, count: int) -> None:
    entropy = (np.arange(count) * np.float32(0.1) + np.float32(0.3)).astype(np.float32)
    (mask,) = high_entropy_masks([_sample([1] * count)], [_scores(entropy.tolist())], share=share)
    steps = round(share * 10) * (count - 1)
    expected = steps // 10 + 1  # of (count - 1) intervals this share, and the token at its lower end
    assert mask is not None and int(mask.sum()) == expected


def test_tokens_of_equal_entropy_are_kept_together() -> None:
    (mask,) = high_entropy_masks([_sample([1, 1, 1, 0])], [_scores([0.5, 0.5, 0.5, 0.0])], share=0.1)
    assert mask is not None and mask.tolist() == [True, True, True, False]


def test_without_trained_tokens_no_token_is_kept() -> None:
    assert [
        mask.tolist() for mask in high_entropy_masks([_sample([0])], [_scores([0.0])], share=0.5) if mask is not None
    ] == [[False]]


def test_samples_carry_the_old_log_probs_only_if_several_updates_are_made_on_them() -> None:
    samples, scores = [_sample([1, 0])], [_scores([0.5, 0.0], reference=True)]
    (once,) = with_scores(samples, scores, loss=LossConfig(beta=0.1), updates_per_step=1)
    (twice,) = with_scores(samples, scores, loss=LossConfig(beta=0.1), updates_per_step=2)
    (lagging,) = with_scores(samples, scores, loss=LossConfig(old_logprobs="sampler"), updates_per_step=2)
    assert once.old_logprobs is None and lagging.old_logprobs is None
    assert twice.old_logprobs is not None and twice.old_logprobs.tolist() == [-0.5, 0.0]
    assert once.reference_logprobs is not None and once.reference_logprobs.tolist() == [-1.0, 0.0]
    assert once.surrogate_mask is None


def test_the_update_counts_the_tokens_its_masks_keep() -> None:
    loss = LossConfig(top_entropy_quantile=0.5)
    samples = with_scores(
        [_sample([1, 1, 0]), _sample([1, 0, 0])],
        [_scores([5.0, 1.0, 9.0]), _scores([2.0, 8.0, 8.0])],
        loss=loss,
        updates_per_step=1,
    )
    batch = train_batch(samples, step=1, rules=CutRules(max_samples=1))
    assert (batch.num_valid_tokens, batch.num_surrogate_tokens) == (3, 2)
    mask = sample_tokens(samples).surrogate_mask
    assert mask is not None and mask.tolist() == [True, False, True]
    assert train_batch([_sample([1])], step=1, rules=CutRules()).num_surrogate_tokens is None


def test_a_sample_without_scores_is_a_broken_promise() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        with_scores([_sample([1])], [], loss=LossConfig(), updates_per_step=2)
