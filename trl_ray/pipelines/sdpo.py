"""Self-distillation policy optimisation (SDPO): the policy, told more, is its own teacher.

    group --siblings that succeeded, feedback--> the teacher's prompts --Teacher.score--> contexts, teachings [G]
          --SelfDistillation--> samples with advantages and teachings --SDPOLoss--> learner

The teacher is an average of the policy, the policy itself or what it started from (`teacher_model_kind`). Where nothing
can be told, a completion is not distilled; the policy loss may train on it all the same (`distillation_weight`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trl_ray.algorithms.distillation.self_distillation_diagnostics import (
    SelfDistillationDiagnostics,
    self_distillation_group,
    self_distillation_metrics,
)
from trl_ray.config.losses.distillation_options import DistillationMode, RepromptConfig, SDPOObjective
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.data.prompts.prompt_source import PromptSource
from trl_ray.data.prompts.reprompts import require_user_turn
from trl_ray.errors import ConfigError
from trl_ray.models.policy_loading import max_positions
from trl_ray.pipelines.grpo import PolicyObjective
from trl_ray.pipelines.rollouts.objective import Objective, Observed
from trl_ray.pipelines.rollouts.rollout_pipeline import RolloutPipeline
from trl_ray.types import Metric, RolloutGroup, TeacherQuestion


class SelfDistillation(PolicyObjective[SDPOConfig]):
    """Rewards become advantages, and successes and feedback what the policy is taught by itself."""

    def __init__(self, config: SDPOConfig) -> None:
        super().__init__(config)
        self._threshold, self._tolerance = config.success_reward_threshold, config.diagnostics_flat_tolerance
        self._diagnostics = SelfDistillationDiagnostics(
            warning_interval=config.diagnostics_warning_interval, flat_tolerance=self._tolerance
        )

    @property
    def loss(self) -> LossSection:
        return self.config.part(SDPOObjective)

    def observe(self, groups: Sequence[RolloutGroup]) -> Observed:
        facts = [self_distillation_group(group, threshold=self._threshold) for group in groups]
        metrics = self_distillation_metrics(facts, flat_tolerance=self._tolerance)
        warnings = self._diagnostics.observe(metrics)
        own = {name: Metric(value=value) for name, value in metrics.items()}
        return Observed(metrics={**super().observe(groups).metrics, **own}, warnings=tuple(warnings))

    def check_prompts(self, prompts: PromptSource) -> None:
        if self.config.distils:
            for ordinal in range(len(prompts)):
                require_user_turn(prompts.prompt(ordinal))

    def teacher_question(self, *, vocab_size: int) -> TeacherQuestion:
        config = self.config
        top_k = config.distillation_topk if config.distillation_mode is DistillationMode.TOPK_LOGITS else None
        return TeacherQuestion(
            vocab_size=vocab_size,
            temperature=config.temperature,
            top_k=top_k or 0,
            tail=config.distillation_add_tail,
        )

    def reprompting(self) -> RepromptConfig:
        """Prompts no longer than what the model, or the engine that stands in for it, can read."""
        config, options = self.config, self.config.part(RepromptConfig)
        limits = [max_positions(config.part(ModelConfig))]
        if config.use_teacher_server:
            limits.append(config.rollout.max_model_len)
        room = min((limit for limit in limits if limit is not None), default=None)
        if room is None:
            return options
        # An engine that scores samples one token more.
        left = room - config.max_completion_length - 1
        if left < 1:
            raise ConfigError(
                f"max_completion_length must leave the teacher room for a prompt within {room} tokens, got "
                f"{config.max_completion_length}. Lower it."
            )
        return options.replace(max_reprompt_len=min(options.max_reprompt_len, left))

    def state_dict(self) -> dict[str, int]:
        return self._diagnostics.state()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._diagnostics.restore(state)


class SDPOPipeline(RolloutPipeline):
    """Distils what the policy says when it is shown a success or feedback; with max_staleness > 0 asynchronously."""

    config_class: ClassVar[type[RunConfig]] = SDPOConfig
    objective_class: ClassVar[type[Objective[Any]]] = SelfDistillation
    name: ClassVar[str] = "sdpo"
