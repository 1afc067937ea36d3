"""From groups to micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.batching import build_train_batch
from trl_ray.config.sections import LossConfig
from trl_ray.types import Completion, FinishReason, GroupTicket, Prompt, Reward, RolloutGroup, VersionSpan


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


def _build(groups: list[RolloutGroup], *, size: int, **options: Any) -> Any:
    return build_train_batch(groups, step=3, loss=LossConfig(**options), micro_batch_size=size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (8, [[0, 0, 0, 0, 1, 1, 1, 1]]),
        (4, [[0] * 4, [1] * 4]),
        (6, [[0] * 4, [1] * 4]),
        (3, [[0] * 2, [0] * 2] + [[1] * 2] * 2),
    ],
)
def test_groups_stay_together_where_they_fit(size: int, expected: list[list[int]]) -> None:
    batch = _build([_group(0, [0, 1, 0, 1]), _group(1, [1, 0, 0, 0])], size=size).batch
    assert [[sample.group_id for sample in micro] for micro in batch.micro_batches] == expected
    assert batch.num_samples == 8 and batch.num_valid_tokens == 16 and batch.step == 3


def test_truncated_completions_are_masked_but_count_in_the_statistics_of_their_group() -> None:
    completions = [_completion(3), _completion(5, FinishReason.LENGTH)]
    built = _build([_group(0, [0.0, 2.0], completions)], size=2, mask_truncated_completions=True)
    (micro,) = built.batch.micro_batches
    assert built.batch.num_valid_tokens == 3 and built.batch.num_samples == 2
    assert not micro[1].loss_mask.any() and micro[0].advantage < 0 < micro[1].advantage
    assert _build([_group(0, [0.0, 2.0], completions)], size=2).batch.num_valid_tokens == 8


def test_tokens_the_policy_did_not_sample_are_not_counted() -> None:
    built = _build([_group(0, [0.0, 1.0], [_completion(3, mask=[True, False, True]), _completion(1)])], size=2)
    assert built.batch.num_valid_tokens == 3


def test_metrics_leave_missing_rewards_out() -> None:
    groups = [
        _group(0, [0.0, 2.0], [_completion(1), _completion(3, FinishReason.LENGTH)]),
        _group(1, [4.0, None], [_completion(2), _completion(2)]),
    ]
    metrics = {name: metric.value for name, metric in _build(groups, size=4).metrics.items()}
    assert metrics == {
        "reward/mean": 2.0,
        "reward/f/mean": 2.0,
        "reward/std": pytest.approx(2**0.5 / 2),
        "advantage/zero_std_fraction": 0.5,
        "completion/length_mean": 2.0,
        "completion/length_max": 3.0,
        "completion/truncated_fraction": 0.25,
    }


def test_an_aborted_completion_is_never_trained_on() -> None:
    group = _group(0, [0.0, 1.0], [_completion(1), _completion(1, FinishReason.ABORT)])
    with pytest.raises(AssertionError, match="group 0"):
        _build([group], size=2)
