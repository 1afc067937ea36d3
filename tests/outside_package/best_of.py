"""A reinforcement-learning pipeline from outside the package: its options, its objective, its class, in one file.

trl-ray outside_package.best_of:BestOfPipeline --config FILE
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from trl_ray.algorithms.policy.group_samples import BuiltStep
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.pipelines.grpo import PolicyObjective
from trl_ray.pipelines.rollouts.objective import Objective, Observed
from trl_ray.pipelines.rollouts.rollout_pipeline import RolloutPipeline
from trl_ray.types import Metric, RolloutGroup, SampleScores


class BestOfConfig(GRPOConfig):
    """GRPO that learns from the best completions of a prompt only."""

    pipeline: str = "outside_package.best_of:BestOfPipeline"
    keep: int = 1
    """Completions of each group that are learnt from."""


class BestOf(PolicyObjective[BestOfConfig]):
    """Advantages of all but the best are 0."""

    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        """Samples of the groups of one step."""
        built = super().build(groups, scores=scores)
        best: set[int] = set()
        for group in groups:
            own = [place for place, sample in enumerate(built.samples) if sample.group_id == group.ticket.group_id]
            best |= set(sorted(own, key=lambda place: -built.samples[place].advantage)[: self.config.keep])
        samples = [
            sample if place in best else dataclasses.replace(sample, advantage=0.0)
            for place, sample in enumerate(built.samples)
        ]
        return dataclasses.replace(built, samples=samples)

    def observe(self, groups: Sequence[RolloutGroup]) -> Observed:
        """How many are learnt from."""
        return Observed(metrics={"best_of/kept": Metric(value=float(len(groups) * self.config.keep))})


class BestOfPipeline(RolloutPipeline):
    """Learns from the best of each group."""

    config_class: ClassVar[type[GRPOConfig]] = BestOfConfig
    objective_class: ClassVar[type[Objective[Any]]] = BestOf
    name: ClassVar[str] = "best-of"
