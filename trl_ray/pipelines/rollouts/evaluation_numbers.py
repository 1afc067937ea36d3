"""What answers to held-out prompts amount to, under the names that TRL gives such numbers.

EvaluatedPrompt x prompts --answer_numbers--> {"reward": ..., "rewards/judge/mean": ..., "completions/mean_length": ...}
                          --prediction_of--> RolloutPrediction --compute_metrics--> the user's own numbers
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from trl_ray.actors.rollout_worker import EvaluatedPrompt, mean_reward
from trl_ray.models.scoring.rollout_prediction import RolloutPrediction
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import FinishReason

_EQUAL = 1e-6
"""A spread below which the rewards of a group are all alike."""


def answer_numbers(answers: Sequence[EvaluatedPrompt]) -> dict[str, float]:
    """Rewards in total and by function, lengths in tokens, shares, the sampler's entropy; what nobody measured is
    left out."""
    return {**_rewards(answers), **_lengths(answers), **_entropy(answers), **_logged(answers)}


def prediction_of(answers: Sequence[EvaluatedPrompt]) -> RolloutPrediction:
    """The same answers as `compute_metrics` is given them: prompts, completions and columns as reward functions are."""
    told = [GroupInput.of(answer.prompt, answer.completions).arguments() for answer in answers]
    completions = [completion for answer in answers for completion in answer.completions]
    sizes = [len(answer.completions) for answer in answers]
    # Nobody may have been asked: each completion has a place all the same.
    rewards = [reward for number, answer in enumerate(answers) for reward in answer.as_group(number).rewards]
    parts = dict.fromkeys(name for reward in rewards for name in reward.parts)
    columns = dict.fromkeys(name for answer in answers for name in answer.prompt.columns)
    return RolloutPrediction(
        prompts=[prompt for group in told for prompt in group["prompts"]],
        completions=[completion for group in told for completion in group["completions"]],
        prompt_ids=[answer.prompt.token_ids for answer, size in zip(answers, sizes, strict=True) for _ in range(size)],
        completion_ids=[completion.token_ids for completion in completions],
        prompt_indices=np.repeat(np.arange(len(answers), dtype=np.int32), sizes),
        rewards=_numbers(reward.total for reward in rewards),
        reward_parts={name: _numbers(reward.parts.get(name) for reward in rewards) for name in parts},
        columns={
            name: [value for group, size in zip(told, sizes, strict=True) for value in group.get(name, [None] * size)]
            for name in columns
        },
        is_truncated=np.array(
            [completion.finish_reason is FinishReason.LENGTH for completion in completions], np.bool_
        ),
        logprobs=[completion.logprobs for completion in completions],
    )


def _numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _rewards(answers: Sequence[EvaluatedPrompt]) -> dict[str, float]:
    """The mean is one over prompts, each of which counts alike."""
    groups = [[one.total for one in answer.scored.rewards if one.total is not None] for answer in answers]
    means = [mean for answer in answers if (mean := mean_reward(answer.scored.rewards)) is not None]
    if not means:
        return {}
    alike = [max(group) - min(group) < _EQUAL for group in groups if len(group) > 1]
    numbers = {"reward": fmean(means), **_spread("reward_std", [total for group in groups for total in group])}
    if alike:
        numbers["frac_reward_zero_std"] = fmean(map(float, alike))
    parts: dict[str, list[float]] = {}
    for answer in answers:
        for reward in answer.scored.rewards:
            for name, value in reward.parts.items():
                parts.setdefault(name, []).extend([] if value is None else [value])
    for name, values in parts.items():
        if values:
            numbers |= {f"rewards/{name}/mean": fmean(values), **_spread(f"rewards/{name}/std", values)}
    return numbers


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The sample's standard deviation, as TRL has it; nothing of a single value."""
    return {name: stdev(values)} if len(values) > 1 else {}


def _lengths(answers: Sequence[EvaluatedPrompt]) -> dict[str, float]:
    completions = [completion for answer in answers for completion in answer.completions]
    if not completions:
        return {}
    cut = [completion.finish_reason is FinishReason.LENGTH for completion in completions]
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [length for length, was_cut in zip(lengths, cut, strict=True) if not was_cut]
    return {
        **_course("completions/{}_length", lengths),
        **_course("completions/{}_terminated_length", ended or [0]),
        "completions/clipped_ratio": fmean(map(float, cut)),
    }


def _entropy(answers: Sequence[EvaluatedPrompt]) -> dict[str, float]:
    """The sampler's entropy in nats, as a mean over the tokens that it drew.

    A token's own -log p is an estimate without bias, as engines tell held-out log-probs of the distribution they draw
    from; where the most probable token is taken, it is 0. With `distillation_objective=iw_opd`, whose loss reads them,
    and options that reshape sampling they are the policy's: this is its cross-entropy with the sampler then.
    """
    drawn = [completion for answer in answers for completion in answer.completions if completion.is_sampled]
    tokens = sum(len(completion.logprobs) for completion in drawn)
    total = sum(float(np.sum(completion.logprobs, dtype=np.float64)) for completion in drawn)
    return {"entropy": (0.0 - total) / tokens} if tokens else {}


def _course(template: str, values: Iterable[int]) -> dict[str, float]:
    found = list(values)
    return {
        template.format("mean"): fmean(found),
        template.format("min"): float(min(found)),
        template.format("max"): float(max(found)),
    }


def _logged(answers: Sequence[EvaluatedPrompt]) -> dict[str, float]:
    """What reward functions logged with `log_metric`, averaged over the prompts."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.scored.metrics.items():
            values.setdefault(name, []).append(float(value))
    return {name: fmean(found) for name, found in values.items()}
