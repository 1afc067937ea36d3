"""What answers to held-out prompts amount to, under the names that TRL gives such numbers.

EvaluatedPrompt x prompts --answer_numbers--> {"reward": ..., "rewards/judge/mean": ..., "completions/mean_length": ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from trl_ray.actors.rollout_worker import EvaluatedPrompt, mean_reward
from trl_ray.types import FinishReason

_EQUAL = 1e-6
"""A spread below which the rewards of a group are all alike."""


def answer_numbers(answers: Sequence[EvaluatedPrompt]) -> dict[str, float]:
    """Rewards in total and by function, lengths in tokens, and shares; what nobody measured is left out."""
    return {**_rewards(answers), **_lengths(answers), **_logged(answers)}


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
