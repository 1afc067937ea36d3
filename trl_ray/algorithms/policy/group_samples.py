"""From finished groups to the samples of one step.

    RolloutGroup x P --shape rewards--> --advantages--> TrainingSample x P*G     build_step
                          ^ SampleScores (KL in the reward)
    RolloutGroup x P --what teachers say--------------> TrainingSample x P*G     build_distillation_step

Everything is known before the first forward pass, above all how many tokens the step trains on. The one exception is a
KL in the reward: a draft is built without it, the learner scores the draft's samples, and the step is built again.
`algorithms.micro_batches` cuts the samples for the learner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trl_ray.algorithms.metric_merging import mean_metric, token_mean
from trl_ray.algorithms.policy.advantages import (
    Advantages,
    Parts,
    clip_reward,
    group_advantages,
    group_deviations,
    objective_advantages,
)
from trl_ray.algorithms.policy.reward_shaping import SequenceKL, overlong_penalty, sequence_kls
from trl_ray.config.losses.advantage_options import AdvantageConfig, Aggregation
from trl_ray.config.losses.policy_options import KLEstimator
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.types import (
    Completion,
    FinishReason,
    Metric,
    Reduce,
    RolloutGroup,
    SampleScores,
    TrainingSample,
)

UNKNOWN_VERSION = -1
"""Of a token that no version is known of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRules:
    """What turns the rewards of a step into advantages, beside `AdvantageConfig`."""

    max_completion_length: int | None = None
    """Tokens at which the penalty for length is largest; None where there is no such penalty."""
    reward_weights: tuple[float, ...] | None = None
    """One per part of the reward, in their order; None weighs all 1. Totals are weighted already."""
    beta: float = 0.0
    """Weight of the KL in the reward; 0 where the KL is in the loss."""
    kl_estimator: KLEstimator = KLEstimator.K1

    @classmethod
    def of(cls, config: GRPOConfig) -> RewardRules:
        """What a configuration says."""
        return cls(
            max_completion_length=config.max_completion_length,
            reward_weights=None if config.part_weights is None else tuple(config.part_weights),
            beta=config.beta if config.kl_in_reward else 0.0,
            kl_estimator=config.kl_estimator,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltStep:
    """What a step trains on, with what is worth recording of how it came about."""

    samples: tuple[TrainingSample, ...]
    """[groups * G] group by group, each in the order of its completions."""
    advantages: tuple[NDArray[np.float64], ...]
    """[groups][G]"""
    metrics: dict[str, Metric]

    @property
    def num_valid_tokens(self) -> int:
        """Trained tokens."""
        return sum(int(sample.loss_mask.sum()) for sample in self.samples)


def build_step(
    groups: Sequence[RolloutGroup],
    *,
    config: AdvantageConfig,
    rules: RewardRules | None = None,
    scores: Sequence[SampleScores] | None = None,
) -> BuiltStep:
    """Score groups against themselves.

    Args:
        groups: finished groups, in training order.
        config: how rewards become advantages, and which completions count.
        rules: None is enough where neither length, nor weights, nor a KL enter the advantages.
        scores: [groups * G] of `samples` of a draft, with the reference; takes `rules.beta` times the KL from rewards.

    Raises:
        AssertionError: a group holds an aborted completion, which must have been generated again.
    """
    _check_groups(groups)
    rules = rules if rules is not None else RewardRules()
    # Samples come before their advantages, because the KL in the reward is estimated on their trained tokens.
    plain = _samples(groups, mask_truncated=config.mask_truncated_completions)
    kls = None if scores is None else sequence_kls(plain, scores, rules.kl_estimator)
    advantages = step_advantages(groups, config=config, rules=rules, kls=kls)
    values = np.concatenate(advantages.values) if groups else np.zeros(0)
    samples = tuple(replace(sample, advantage=float(v)) for sample, v in zip(plain, values, strict=True))
    metrics = batch_metrics(groups, advantages) | _kl_metrics(kls)
    return BuiltStep(samples=samples, advantages=advantages.values, metrics=metrics)


def build_distillation_step(groups: Sequence[RolloutGroup]) -> BuiltStep:
    """Samples that learn from teachers alone: their advantages are 0, whatever they were rewarded with.

    Args:
        groups: finished groups, in training order.

    Raises:
        AssertionError: a group holds an aborted completion, or one that is distilled and that no teacher speaks of.
    """
    _check_groups(groups)
    completions = [completion for group in groups for completion in group.completions]
    labels = mean_metric([float(not completion.is_sampled) for completion in completions])
    metrics = _present({**_group_metrics(groups), "distillation/label_fraction": labels})
    return BuiltStep(
        # A teacher judges token by token: of a completion that was cut off it knows as much as of any.
        samples=tuple(_samples(groups, mask_truncated=False)),
        advantages=tuple(np.zeros(len(group.completions)) for group in groups),
        metrics=metrics,
    )


def _check_groups(groups: Sequence[RolloutGroup]) -> None:
    for group in groups:
        name = f"group {group.ticket.group_id}"
        aborted = [i for i, c in enumerate(group.completions) if c.finish_reason is FinishReason.ABORT]
        assert not aborted, f"aborted completions are never trained on: {name}, {aborted}"
        assert len(group.rewards) == len(group.completions), f"one reward each: {name}"
        assert len(group.contexts) in {0, len(group.completions)}, f"one context each: {name}"
        assert len(group.teachings) in {0, len(group.contexts)}, f"one teaching for each context: {name}"


def step_advantages(
    groups: Sequence[RolloutGroup],
    *,
    config: AdvantageConfig,
    rules: RewardRules,
    kls: Sequence[SequenceKL] | None = None,
) -> Advantages:
    """Advantages [groups][G] of the groups of one step.

    Args:
        groups: finished groups.
        config: how.
        rules: the rest of how.
        kls: [groups * G] divergences from the reference.
    """
    # Each function is normalised by itself: there is no total that could be clipped or penalised first.
    if config.multi_objective_aggregation is Aggregation.NORMALIZE_THEN_SUM:
        return objective_advantages(reward_parts(groups), weights=rules.reward_weights)
    return group_advantages(
        shaped_rewards(groups, config=config, rules=rules, kls=kls),
        scale=config.scale_rewards,
        baseline=config.advantage_baseline,
        normalize=config.normalize_advantages,
    )


def shaped_rewards(
    groups: Sequence[RolloutGroup],
    *,
    config: AdvantageConfig,
    rules: RewardRules,
    kls: Sequence[SequenceKL] | None = None,
) -> list[list[float | None]]:
    """Total rewards [groups][G], clipped, less the penalties for length and for leaving the reference."""
    penalties = iter([rules.beta * kl.total for kl in kls] if kls is not None else [])
    shaped: list[list[float | None]] = []
    for group in groups:
        row: list[float | None] = []
        for completion, reward in zip(group.completions, group.rewards, strict=True):
            # Taken even where there is no reward: the KLs stand in the order of completions.
            penalty = next(penalties) if kls is not None else 0.0
            if reward.total is None:
                row.append(None)
                continue
            overlong = _overlong(completion, config, rules)
            row.append(clip_reward(reward.total, config.reward_clip_range) + overlong - penalty)
        shaped.append(row)
    return shaped


def reward_parts(groups: Sequence[RolloutGroup]) -> Parts:
    """Rewards [groups][G][K] by function, in the functions' order."""
    names = next((list(reward.parts) for group in groups for reward in group.rewards), [])
    for group in groups:
        assert all(reward.parts.keys() == set(names) for reward in group.rewards), f"every reward has the parts {names}"
    return [[[reward.parts[name] for name in names] for reward in group.rewards] for group in groups]


def _overlong(completion: Completion, config: AdvantageConfig, rules: RewardRules) -> float:
    if not config.overlong_buffer_len:
        return 0.0
    assert rules.max_completion_length is not None, "a penalty for length needs the length at which it is largest"
    return overlong_penalty(
        len(completion.token_ids),
        max_length=rules.max_completion_length,
        buffer=config.overlong_buffer_len,
        factor=config.overlong_penalty_factor,
    )


def _samples(groups: Sequence[RolloutGroup], *, mask_truncated: bool) -> list[TrainingSample]:
    """[groups * G] without advantages."""
    return [
        _sample(group, index, mask_truncated=mask_truncated)
        for group in groups
        for index in range(len(group.completions))
    ]


def _sample(group: RolloutGroup, index: int, *, mask_truncated: bool) -> TrainingSample:
    """One completion, with what teachers say of it, or with what the learner's teacher is to be shown."""
    completion, prompt_ids = group.completions[index], group.ticket.prompt.token_ids
    context = group.contexts[index] if group.contexts else None
    teacher = group.teachings[index] if group.teachings else None
    shown = None
    if context is not None and not group.teachings and not np.array_equal(context.prompt_ids, prompt_ids):
        shown = context.prompt_ids
    is_distilled = context is None or context.is_distilled
    assert not (group.teachings and is_distilled and teacher is None), (
        f"what is distilled has a teacher: group {group.ticket.group_id}, {index}"
    )
    return TrainingSample(
        group_id=group.ticket.group_id,
        prompt_ids=prompt_ids,
        completion_ids=completion.token_ids,
        loss_mask=_loss_mask(completion, mask_truncated=mask_truncated),
        sampler_logprobs=completion.logprobs,
        advantage=0.0,
        min_version=completion.min_version if completion.versions else group.ticket.admitted_at_version,
        token_versions=_token_versions(completion),
        teacher=teacher,
        teacher_prompt_ids=shown,
        is_distilled=is_distilled,
        is_label=not completion.is_sampled,
    )


def _token_versions(completion: Completion) -> NDArray[np.int32] | None:
    """[L]; None for what was not sampled."""
    if not completion.is_sampled:
        return None
    versions = np.full(len(completion.token_ids), UNKNOWN_VERSION, dtype=np.int32)
    for span in completion.versions:
        versions[span.start : span.end] = span.version
    return versions


def _loss_mask(completion: Completion, *, mask_truncated: bool) -> NDArray[np.bool_]:
    """[L]; a completion cut off at its length says nothing about how it would have ended."""
    if mask_truncated and completion.finish_reason is FinishReason.LENGTH:
        return np.zeros(len(completion.token_ids), dtype=np.bool_)
    if completion.loss_mask is None:
        return np.ones(len(completion.token_ids), dtype=np.bool_)
    return completion.loss_mask


def batch_metrics(groups: Sequence[RolloutGroup], advantages: Advantages) -> dict[str, Metric]:
    """Rewards as they were given (in total and by function), advantages, lengths; nothing where nobody answered."""
    return _present({**_group_metrics(groups), **_advantage_metrics(advantages)})


def _group_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """Rewards and lengths; metrics of weight 0 where nobody answered."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    totals = [[reward.total for reward in group.rewards] for group in groups]
    # Where nobody gives rewards, as in distillation, a spread of 0 would look like rewards that are all alike.
    is_rewarded = any(total is not None for group in totals for total in group)
    lengths = [len(completion.token_ids) for completion in completions]
    metrics = {
        "reward/mean": mean_metric([reward.total for reward in rewards]),
        # Spread within a group, which is what there is to learn from; not the spread between easy and hard prompts.
        "reward/std": mean_metric(list(group_deviations(totals)) if is_rewarded else []),
        "completion/length_mean": mean_metric(lengths),
        "completion/length_max": Metric(value=float(max(lengths, default=0)), reduce=Reduce.MAX),
        "completion/truncated_fraction": mean_metric(
            [float(completion.finish_reason is FinishReason.LENGTH) for completion in completions]
        ),
    }
    for name in dict.fromkeys(name for reward in rewards for name in reward.parts):
        metrics[f"reward/{name}/mean"] = mean_metric([reward.parts.get(name) for reward in rewards])
    for name in dict.fromkeys(name for group in groups for name in group.metrics):
        metrics[name] = mean_metric([group.metrics.get(name) for group in groups])
    return metrics


def _present(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: metric for name, metric in metrics.items() if metric.weight > 0}


def _advantage_metrics(advantages: Advantages) -> dict[str, Metric]:
    """Mean and standard deviation over all completions of the step, and how many groups have nothing to tell."""
    values = [value for group in advantages.values for value in group if np.isfinite(value)]
    deviation = float(np.std(values)) if values else 0.0
    return {
        "advantage/mean": mean_metric(values),
        "advantage/std": Metric(value=deviation, weight=len(values)),
        "advantage/zero_std_fraction": mean_metric([float(flat) for flat in advantages.flat]),
    }


def _kl_metrics(kls: Sequence[SequenceKL] | None) -> dict[str, Metric]:
    """The divergence per token, as TRL's RLOO reports it."""
    tokens = sum(kl.num_tokens for kl in kls or ())
    return {"kl/ref": token_mean(sum(kl.total for kl in kls), tokens)} if kls and tokens else {}
