"""Reward models: the loss of pairs of rewards, the loss of rated steps, and one reward out of those of steps.

    Bradley-Terry   mean(-ln sigma(r_chosen - r_rejected - margin)) + coef mean((r_chosen + r_rejected)^2)
                    https://arxiv.org/abs/2203.02155; margin: https://arxiv.org/abs/2307.09288; centring:
                    https://arxiv.org/abs/2312.09244
    steps           mean over steps of the cross-entropy of (wrong, right)     https://arxiv.org/abs/2305.20050

    step logits [S, 2] --step_rewards--> P(right) [S] --trajectory_rewards: min, product, mean, last--> [B]

Means are over the pairs or steps of the whole optimizer update, so that it does not matter how it is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from trl_ray.algorithms.batches.labels import label_of, pairs_of
from trl_ray.algorithms.batches.sequences import TokenSequences, means_of
from trl_ray.algorithms.loss import FixedLoss, HeadKind, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepAggregation, StepLossConfig
from trl_ray.types import Metric, Reduce, TrainingSample


class PairRewardLoss(FixedLoss):
    """`bradley_terry_loss` as the learner calls it; implements the `Loss` protocol.

    Samples are chosen and rejected texts in turn, each read at one position. Totals: `pairs`.
    """

    def __init__(self, config: RewardLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(head=HeadKind.SEQUENCE, whole_groups=True)

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        return {"pairs": len(pairs_of(samples))}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """A pair without a margin has margin 0."""
        logits = _class_logits(inputs)
        pairs = pairs_of(inputs.samples)
        assert logits.shape == (2 * len(pairs), 1), f"each text has one reward, got logits {tuple(logits.shape)}"
        margins = [None if chosen.label is None else chosen.label.margin for chosen, _ in pairs]
        chosen, rejected = logits.view(-1, 2).unbind(dim=1)
        return bradley_terry_loss(
            chosen,
            rejected,
            self.config,
            margin=None if set(margins) <= {None} else logits.new_tensor([margin or 0.0 for margin in margins]),
            num_pairs=inputs.totals.count("pairs"),
        )


class StepRewardLoss(FixedLoss):
    """`step_loss` as the learner calls it; implements the `Loss` protocol. The trained positions are steps."""

    def __init__(self, config: StepLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(head=HeadKind.STEPS)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        logits = _class_logits(inputs)
        steps = []
        for sample in inputs.samples:
            labels, count = label_of(sample).steps, int(sample.loss_mask.sum())
            assert labels is not None and len(labels) == count, f"{count} steps of example {sample.group_id} are rated"
            steps.append(labels)
        right = torch.from_numpy(np.concatenate(steps)).to(logits.device)
        return step_loss(logits, right, num_steps=inputs.totals.num_valid_tokens)


def _class_logits(inputs: LossInputs) -> Tensor:
    """[N, C]"""
    assert inputs.class_logits is not None, "this loss needs a classifying head"
    return inputs.class_logits


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, config: RewardLossConfig, *, margin: Tensor | None, num_pairs: int
) -> LossOutput:
    """The loss of a micro-batch of pairs.

    Metrics, which TRL calls the same: `accuracy` and `margin` over pairs, `mean_reward`, `min_reward` and `max_reward`
    over both sides; a pair of equal rewards is not won.

    Args:
        chosen: [P] rewards, with gradient.
        rejected: [P]
        config: the options.
        margin: [P] by how much the chosen one should win; None: 0.
        num_pairs: of the whole update, over all micro-batches and ranks.
    """
    difference = chosen - rejected
    losses = -logsigmoid(difference if margin is None else difference - margin)
    if config.center_rewards_coefficient is not None:
        losses = losses + config.center_rewards_coefficient * (chosen + rejected).square()
    rewards = torch.cat((chosen, rejected)).detach()
    metrics = means_of({"accuracy": difference > 0, "margin": difference, "mean_reward": rewards})
    if len(rewards):
        low, high = torch.stack(rewards.aminmax()).tolist()
        metrics["min_reward"] = Metric(value=low, reduce=Reduce.MIN)
        metrics["max_reward"] = Metric(value=high, reduce=Reduce.MAX)
    return LossOutput(loss=losses.sum() / max(num_pairs, 1), metrics=metrics)


def step_loss(logits: Tensor, right: Tensor, *, num_steps: int) -> LossOutput:
    """The loss of a micro-batch of rated steps; the metric `accuracy` is over steps, a tie meaning wrong.

    Args:
        logits: [S, 2] of wrong and right, with gradient, each read at a step's separator token.
        right: [S] bool
        num_steps: of the whole update, over all micro-batches and ranks.
    """
    labels = right.long()
    loss = cross_entropy(logits, labels, reduction="sum") / max(num_steps, 1)
    return LossOutput(loss=loss, metrics=means_of({"accuracy": logits.argmax(dim=-1) == labels}))


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
