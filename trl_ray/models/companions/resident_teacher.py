"""A teacher that the learner holds, in the kinds there are.

live       the policy itself, in evaluation mode, without gradient
base       the initial weights: a frozen copy, or the policy without its adapter
ema        a copy that is blended with the policy after steps, or the policy with an averaged adapter in its place
external   another model, frozen
package.module:Class   a copy that follows the policy by a rule from outside
"""

from __future__ import annotations

import torch

from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.config.teacher_options import AdapterAverage, TeacherSource
from trl_ray.errors import ConfigError
from trl_ray.models.adapters.merging import Gather
from trl_ray.models.companions.averaging import FactorAverage, ProductAverage, lora_factors
from trl_ray.models.companions.companion import (
    AdapterlessCompanion,
    AveragedAdapterCompanion,
    AveragedCompanion,
    Companion,
)
from trl_ray.models.companions.teacher_rules import AVERAGE, FOLDER, pace_of, teacher_average
from trl_ray.models.policy_loading import Policy, load_policy
from trl_ray.models.scoring.head import head_module, trains_head_copy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule


def build_resident_teacher(
    source: TeacherSource,
    *,
    model: ModelConfig,
    training: TrainingConfig,
    temperature: float,
    device: torch.device | str,
    policy: Policy,
    scorer: SampleScorer,
    gather: Gather,
) -> Companion:
    """The teacher that the options ask for, at its initial weights; collective.

    Args:
        source: its kind, and how it follows the policy.
        model, training: as for the policy.
        temperature: logits are divided by it.
        device: where a copy lives.
        policy: as `load_policy` gave it (`with_reference` where it trains an adapter on and the teacher is its base).
        scorer: of the policy.
        gather: makes parameters of the policy whole.

    Raises:
        ConfigError: an average of an adapter beside which something else is trained.
        ModelError: a model cannot be loaded.
    """
    external = source.external is not None
    if source.is_policy:
        return Companion(policy, scorer)
    if model.use_peft and not external:
        if source.is_initial:
            _require_frozen_head(policy)
            return AdapterlessCompanion(policy, scorer)
        return _averaged_adapter(source, policy, scorer, gather)
    # Never has gradients, so that there is nothing to recompute for them.
    held = (source.model if external else model).replace(gradient_checkpointing=False)
    copy = load_policy(held, device=device, trainable=False)
    module = ScoringModule(
        copy,
        chunk_size=training.chunk_lm_head_size,
        bf16=bool(held.bf16),
        vocab_size=head_size(policy) if external else None,
    )
    own = SampleScorer(module, share_prompt=training.share_prompt, temperature=temperature)
    if source.keeps_average:
        average = teacher_average(source, dict(copy.named_parameters()))
        return AveragedCompanion(copy, own, module=module, average=average, folder=FOLDER, what=AVERAGE)
    return Companion(copy, own, module=module)


def _require_frozen_head(policy: Policy) -> None:
    """A divergence over the vocabulary reads both sides' states with one head."""
    if trains_head_copy(policy):
        raise ConfigError(
            "lora_modules_to_save must leave the language-model head out where the teacher is the model beneath the "
            "adapter and the learner holds it. Take the head out, or set teacher.placement=actor."
        )


def head_size(policy: Policy) -> int:
    """Entries of a policy's vocabulary, padding included."""
    return int(head_module(policy).out_features)


def _averaged_adapter(
    source: TeacherSource, policy: Policy, scorer: SampleScorer, gather: Gather
) -> AveragedAdapterCompanion:
    assert source.weights is not None, "a teacher that follows the policy is told how"
    kind = FactorAverage if source.weights.teacher_adapter_average is AdapterAverage.FACTORS else ProductAverage
    # Averages take their shapes from factors that are whole.
    with gather([parameter for parameter in policy.parameters() if parameter.requires_grad]):
        factors = lora_factors(policy)
        average = kind(factors, pace_of(source))
        return AveragedAdapterCompanion(policy, scorer, factors=factors, average=average, folder=FOLDER, what=AVERAGE)
