"""GRPO: completions of one prompt are compared with each other, and their rewards become advantages.

    rewards of G completions --PolicyObjective--> advantages [G] --PolicyLoss--> learner

Synchronous here: the loop with `max_staleness` 0, so every step trains on completions of the weights it starts from.
`async_grpo`, `rloo` and `sdpo` share the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from trl_ray.algorithms.policy.first_pass import needs_first_pass, with_scores
from trl_ray.algorithms.policy.group_samples import BuiltStep, RewardRules, build_step
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.policy_options import LossConfig, OldLogprobs
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.pipelines.rollouts.objective import Objective
from trl_ray.pipelines.rollouts.rollout_pipeline import RolloutPipeline
from trl_ray.types import RolloutGroup, SampleScores, TrainingSample

ConfigT = TypeVar("ConfigT", bound=GRPOConfig)


class PolicyObjective(Objective[ConfigT]):
    """Rewards become advantages."""

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self._policy = config.part(LossConfig)
        self._advantages, self._rules = config.part(AdvantageConfig), RewardRules.of(config)
        self.needs_first_pass = needs_first_pass(self._policy, updates_per_step=config.updates_per_step)
        self.builds_on_scores = config.kl_in_reward
        self.compares_with_sampler = config.old_logprobs is OldLogprobs.SAMPLER

    @property
    def loss(self) -> LossSection:
        return self._policy

    @property
    def max_prompt_length(self) -> int | None:
        return self.config.max_prompt_length

    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        return build_step(groups, config=self._advantages, rules=self._rules, scores=scores)

    def with_scores(self, samples: Sequence[TrainingSample], scores: Sequence[SampleScores]) -> list[TrainingSample]:
        return with_scores(samples, scores, loss=self._policy, updates_per_step=self.config.updates_per_step)


class GRPOPipeline(RolloutPipeline):
    """Generates, scores and trains in turn (Shao et al. 2024, arXiv 2402.03300)."""

    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    objective_class: ClassVar[type[Objective[Any]]] = PolicyObjective
    name: ClassVar[str] = "grpo"
