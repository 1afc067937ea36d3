"""What a pipeline makes of finished groups: samples, what a first pass adds to them, and the loss they are for.

    groups --build--> BuiltStep --with_scores (first pass)--> samples --Loss--> learner
       '--observe--> metrics and warnings of the step

PolicyObjective          rewards become advantages: grpo, async-grpo, rloo
SelfDistillation         the same, and what the self-teacher says: sdpo
DistillationObjective    what teachers say is all there is: distill
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trl_ray.algorithms.distillation.self_distillation_diagnostics import (
    SelfDistillationDiagnostics,
    self_distillation_group,
    self_distillation_metrics,
)
from trl_ray.algorithms.loss_registry import LossOptions
from trl_ray.algorithms.policy.first_pass import needs_first_pass, with_scores
from trl_ray.algorithms.policy.group_samples import BuiltStep, RewardRules, build_distillation_step, build_step
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.config.losses.distillation_options import DistillationLossConfig, SDPOObjective
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.types import Metric, RolloutGroup, SampleScores, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the groups of a step show beside what they are trained on."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Objective(ABC):
    """What is learnt from groups; it holds no tensors and runs on the driver."""

    needs_first_pass = False
    """Whether the learner scores samples before it trains on them."""
    builds_on_scores = False
    """Whether what the first pass says of the reference enters the samples' advantages."""

    @property
    @abstractmethod
    def loss(self) -> LossOptions:
        """The options of the loss that the learner runs."""

    @abstractmethod
    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        """Samples of the groups of one step; `scores` are those of the samples of a draft."""

    def with_scores(self, samples: Sequence[TrainingSample], scores: Sequence[SampleScores]) -> list[TrainingSample]:
        """Samples with all that the loss takes from a first pass."""
        del scores
        return list(samples)

    def observe(self, groups: Sequence[RolloutGroup]) -> Observed:
        """Look at the groups of one step, once."""
        del groups
        return Observed()

    def state_dict(self) -> dict[str, int]:
        """What `observe` remembers from step to step, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state."""
        del state


class PolicyObjective(Objective):
    """Rewards become advantages."""

    def __init__(self, config: GRPOConfig) -> None:
        self._config, self._policy = config, config.part(LossConfig)
        self._advantages, self._rules = config.part(AdvantageConfig), RewardRules.of(config)
        self.needs_first_pass = needs_first_pass(self._policy, updates_per_step=config.updates_per_step)
        self.builds_on_scores = config.kl_in_reward

    @property
    def loss(self) -> LossOptions:
        return self._policy

    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        return build_step(groups, config=self._advantages, rules=self._rules, scores=scores)

    def with_scores(self, samples: Sequence[TrainingSample], scores: Sequence[SampleScores]) -> list[TrainingSample]:
        return with_scores(samples, scores, loss=self._policy, updates_per_step=self._config.updates_per_step)


class SelfDistillation(PolicyObjective):
    """Rewards become advantages, and successes and feedback what the policy is taught by itself."""

    def __init__(self, config: SDPOConfig) -> None:
        super().__init__(config)
        self._objective = config.part(SDPOObjective)
        self._threshold, self._tolerance = config.success_reward_threshold, config.diagnostics_flat_tolerance
        self._diagnostics = SelfDistillationDiagnostics(
            warning_interval=config.diagnostics_warning_interval, flat_tolerance=self._tolerance
        )

    @property
    def loss(self) -> LossOptions:
        return self._objective

    def observe(self, groups: Sequence[RolloutGroup]) -> Observed:
        facts = [self_distillation_group(group, threshold=self._threshold) for group in groups]
        metrics = self_distillation_metrics(facts, flat_tolerance=self._tolerance)
        warnings = self._diagnostics.observe(metrics)
        return Observed(
            metrics={name: Metric(value=value) for name, value in metrics.items()}, warnings=tuple(warnings)
        )

    def state_dict(self) -> dict[str, int]:
        return self._diagnostics.state()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._diagnostics.restore(state)


class DistillationObjective(Objective):
    """Completions are what teachers are asked about, and nothing else."""

    def __init__(self, config: DistillConfig) -> None:
        self._loss = config.part(DistillationLossConfig)

    @property
    def loss(self) -> LossOptions:
        return self._loss

    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        del scores
        return build_distillation_step(groups)


def objective_of(config: RolloutRunConfig) -> Objective:
    """The objective of a run."""
    match config:
        case SDPOConfig():
            return SelfDistillation(config)
        case GRPOConfig():
            return PolicyObjective(config)
        case DistillConfig():
            return DistillationObjective(config)
    raise AssertionError(f"no pipeline trains with a {type(config).__name__}")


def with_metrics(built: BuiltStep, metrics: Mapping[str, Metric]) -> BuiltStep:
    """A step with more to tell of itself."""
    return dataclasses.replace(built, metrics={**built.metrics, **metrics})
