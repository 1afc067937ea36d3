"""From finished groups to the batch of one optimizer step.

    RolloutGroup x P --advantages--> TrainingSample x P*G --micro-batches--> TrainBatch

Everything is known before the first forward pass, above all how many tokens the step trains on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trl_ray.algorithms.advantages import Advantages, group_advantages
from trl_ray.algorithms.metrics import token_mean
from trl_ray.config.sections import LossConfig
from trl_ray.types import Completion, FinishReason, Metric, Reduce, RolloutGroup, TrainBatch, TrainingSample

MicroBatch = tuple[TrainingSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltBatch:
    """A batch with what is worth recording of how it came about."""

    batch: TrainBatch
    advantages: tuple[NDArray[np.float64], ...]
    """[groups][G]"""
    metrics: dict[str, Metric]


def build_train_batch(
    groups: Sequence[RolloutGroup], *, step: int, loss: LossConfig, micro_batch_size: int
) -> BuiltBatch:
    """Score groups against themselves and cut them into micro-batches.

    Args:
        groups: finished groups, in training order.
        step: 1-based optimizer step.
        loss: reads `scale_rewards` and `mask_truncated_completions`.
        micro_batch_size: completions in one micro-batch, at most.

    Raises:
        AssertionError: a group holds an aborted completion, which must have been generated again.
    """
    assert micro_batch_size >= 1, "a micro-batch holds at least one completion"
    for group in groups:
        aborted = [i for i, c in enumerate(group.completions) if c.finish_reason is FinishReason.ABORT]
        assert not aborted, f"aborted completions are never trained on: group {group.ticket.group_id}, {aborted}"
        assert len(group.rewards) == len(group.completions), f"one reward each: group {group.ticket.group_id}"
    advantages = group_advantages(
        [[reward.total for reward in group.rewards] for group in groups], scale=loss.scale_rewards
    )
    samples = [
        [
            _sample(group, index, advantage=float(value), mask_truncated=loss.mask_truncated_completions)
            for index, value in enumerate(values)
        ]
        for group, values in zip(groups, advantages.values, strict=True)
    ]
    batch = TrainBatch(
        step=step,
        micro_batches=cut_into_micro_batches(samples, size=micro_batch_size),
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for group in samples for sample in group),
        num_samples=sum(len(group) for group in samples),
    )
    return BuiltBatch(batch=batch, advantages=advantages.values, metrics=batch_metrics(groups, advantages))


def _sample(group: RolloutGroup, index: int, *, advantage: float, mask_truncated: bool) -> TrainingSample:
    completion = group.completions[index]
    return TrainingSample(
        group_id=group.ticket.group_id,
        prompt_ids=group.ticket.prompt.token_ids,
        completion_ids=completion.token_ids,
        loss_mask=_loss_mask(completion, mask_truncated=mask_truncated),
        sampler_logprobs=completion.logprobs,
        advantage=advantage,
        min_version=completion.min_version if completion.versions else group.ticket.admitted_at_version,
    )


def _loss_mask(completion: Completion, *, mask_truncated: bool) -> NDArray[np.bool_]:
    """[L]; a completion cut off at its length says nothing about how it would have ended."""
    if mask_truncated and completion.finish_reason is FinishReason.LENGTH:
        return np.zeros(len(completion.token_ids), dtype=np.bool_)
    if completion.loss_mask is None:
        return np.ones(len(completion.token_ids), dtype=np.bool_)
    return completion.loss_mask


def cut_into_micro_batches(groups: Sequence[Sequence[TrainingSample]], *, size: int) -> tuple[MicroBatch, ...]:
    """Fill micro-batches of at most `size` samples with whole groups; a larger group is cut into even pieces."""
    batches: list[list[TrainingSample]] = []
    for group in groups:
        pieces = -(-len(group) // size)
        for chunk in np.array_split(np.arange(len(group)), pieces) if pieces else []:
            piece = [group[i] for i in chunk]
            if pieces > 1 or not batches or len(batches[-1]) + len(piece) > size:
                batches.append(piece)
            else:
                batches[-1].extend(piece)
    return tuple(tuple(batch) for batch in batches)


def batch_metrics(groups: Sequence[RolloutGroup], advantages: Advantages) -> dict[str, Metric]:
    """Rewards (in total and by function), advantages and lengths; None where a function did not answer."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(completion.token_ids) for completion in completions]
    metrics = {
        "reward/mean": _mean([reward.total for reward in rewards]),
        # Spread within a group, which is what there is to learn from; not the spread between easy and hard prompts.
        "reward/std": _mean(list(advantages.stds)),
        "advantage/zero_std_fraction": _mean([float(flat) for flat in advantages.flat]),
        "completion/length_mean": _mean(lengths),
        "completion/length_max": Metric(value=float(max(lengths, default=0)), reduce=Reduce.MAX),
        "completion/truncated_fraction": _mean(
            [float(completion.finish_reason is FinishReason.LENGTH) for completion in completions]
        ),
    }
    for name in dict.fromkeys(name for reward in rewards for name in reward.parts):
        metrics[f"reward/{name}/mean"] = _mean([reward.parts.get(name) for reward in rewards])
    for name in dict.fromkeys(name for group in groups for name in group.metrics):
        metrics[name] = _mean([group.metrics.get(name) for group in groups])
    return {name: metric for name, metric in metrics.items() if metric.weight > 0}


def _mean(values: Sequence[float | None]) -> Metric:
    known = [float(value) for value in values if value is not None]
    return token_mean(sum(known), len(known))
