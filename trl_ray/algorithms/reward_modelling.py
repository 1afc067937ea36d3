"""Reward models: the loss of pairs of rewards, the loss of rated steps, and one reward out of those of steps.

    Bradley-Terry   mean(-ln sigma(r_chosen - r_rejected - margin)) + coef mean((r_chosen + r_rejected)^2)
                    https://arxiv.org/abs/2203.02155; margin: https://arxiv.org/abs/2307.09288; centring:
                    https://arxiv.org/abs/2312.09244
    steps           mean over steps of the cross-entropy of (wrong, right)     https://arxiv.org/abs/2305.20050

    step logits [S, 2] --step_rewards--> P(right) [S] --trajectory_rewards: min, product, mean, last--> [B]

Means are over the pairs or steps of the whole optimizer update, so that it does not matter how it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from trl_ray.algorithms.loss import LossOutput
from trl_ray.algorithms.sequences import TokenSequences, means_of
from trl_ray.config.reward_modelling import RewardLossConfig, StepAggregation
from trl_ray.types import Metric, Reduce


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewardPairs:
    """P pairs of a micro-batch."""

    chosen: Tensor
    """[P] rewards, with gradient."""
    rejected: Tensor
    """[P]"""
    margin: Tensor | None = None
    """[P] by how much the chosen one should win; None: 0."""
    num_pairs: int
    """Of the whole update, over all micro-batches and ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RatedSteps:
    """S steps of solutions of a micro-batch, each read at its separator token."""

    logits: Tensor
    """[S, 2] of wrong and right, with gradient."""
    right: Tensor
    """[S] bool"""
    num_steps: int
    """Of the whole update, over all micro-batches and ranks."""


def bradley_terry_loss(pairs: RewardPairs, config: RewardLossConfig) -> LossOutput:
    """The loss of a micro-batch of pairs.

    Metrics, which TRL calls the same: `accuracy` and `margin` over pairs, `mean_reward`, `min_reward` and `max_reward`
    over both sides; a pair of equal rewards is not won.
    """
    difference = pairs.chosen - pairs.rejected
    losses = -logsigmoid(difference if pairs.margin is None else difference - pairs.margin)
    if config.center_rewards_coefficient is not None:
        losses = losses + config.center_rewards_coefficient * (pairs.chosen + pairs.rejected).square()
    rewards = torch.cat((pairs.chosen, pairs.rejected)).detach()
    metrics = means_of({"accuracy": difference > 0, "margin": difference, "mean_reward": rewards})
    if len(rewards):
        low, high = torch.stack(rewards.aminmax()).tolist()
        metrics["min_reward"] = Metric(value=low, reduce=Reduce.MIN)
        metrics["max_reward"] = Metric(value=high, reduce=Reduce.MAX)
    return LossOutput(loss=losses.sum() / max(pairs.num_pairs, 1), metrics=metrics)


def step_loss(steps: RatedSteps) -> LossOutput:
    """The loss of a micro-batch of rated steps; the metric `accuracy` is over steps, a tie meaning wrong."""
    labels = steps.right.long()
    loss = cross_entropy(steps.logits, labels, reduction="sum") / max(steps.num_steps, 1)
    right = steps.logits.argmax(dim=-1) == labels
    return LossOutput(loss=loss, metrics=means_of({"accuracy": right}))


def step_rewards(logits: Tensor) -> Tensor:
    """The probability [S] that a step is right, from logits [S, 2] of wrong and right."""
    return logits.softmax(dim=-1)[:, 1]


def trajectory_rewards(rewards: Tensor, steps: TokenSequences, how: StepAggregation) -> Tensor:
    """One reward [B] for each trajectory, from those of its steps.

    min asks whether any step is wrong, product whether all are right if they fail independently (and so falls with
    their number), mean forgives, last trusts a model that rates what it has read so far.

    Args:
        rewards: [S] of steps, in order; for product they should be probabilities, as from `step_rewards`.
        steps: which of the B trajectories each step belongs to.
        how: the rule.

    Returns:
        [B]; NaN for a trajectory without steps, which has no reward.
    """
    counts = steps.counts()
    match how:
        case StepAggregation.MIN:
            joined = _reduced(rewards, steps, "amin")
        case StepAggregation.PRODUCT:
            joined = _reduced(rewards, steps, "prod")
        case StepAggregation.MEAN:
            joined = steps.means(rewards)
        case StepAggregation.LAST:
            joined = rewards.new_zeros(steps.num_sequences)
            joined[counts > 0] = rewards[(counts.cumsum(0) - 1)[counts > 0]]
    return joined.masked_fill(counts == 0, float("nan"))


def _reduced(rewards: Tensor, steps: TokenSequences, reduce: str) -> Tensor:
    start = rewards.new_ones(steps.num_sequences)
    return start.scatter_reduce(0, steps.sample_index, rewards, reduce=reduce, include_self=False)
