"""The policy that the trained one is compared with, in the kinds there are.

    none          the loss compares with none
    precomputed   its answers are known (models.companions.reference_cache): none is held
    adapter       the policy with its adapter switched off, or with the frozen adapter that training started from
    frozen        a copy of the initial weights
    synchronised  a copy that moves towards the policy (https://arxiv.org/abs/2404.09656, soft update): after every N-th
                  step, ref <- (1 - alpha) ref + alpha policy

It starts from the initial model, also where a run goes on from a checkpoint. What is to be precomputed is asked of the
policy itself, before its first update: a new adapter changes nothing yet, and one that training started from is part of
the reference.
"""

from __future__ import annotations

import enum

import torch

from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.errors import ConfigError, ModelError
from trl_ray.models.adapters.adapter_config import is_adapter_folder
from trl_ray.models.companions.averaging import Pace, WeightAverage
from trl_ray.models.companions.companion import AdapterlessCompanion, AveragedCompanion, Companion
from trl_ray.models.loadable import check_loadable
from trl_ray.models.policy_loading import Policy, find_source, load_model_config, load_policy, load_tokenizer
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.models.vocabulary import missing_rows, num_tokens

_FOLDER = "reference"
"""Below the checkpoint."""


class ReferenceKind(enum.Enum):
    """Where the reference's log-probs come from."""

    NONE = "none"
    PRECOMPUTED = "precomputed"
    ADAPTER = "adapter"
    FROZEN = "frozen"
    SYNCHRONISED = "synchronised"


def reference_kind(model: ModelConfig, loss: LossSection) -> ReferenceKind:
    """The kind that the options ask for.

    Args:
        model: says whether an adapter is trained.
        loss: the options of any loss.

    Raises:
        ConfigError: a synchronised copy of a policy with an adapter.
    """
    if not loss.compares_with_reference:
        return ReferenceKind.NONE
    if loss.precomputes_reference:
        return ReferenceKind.PRECOMPUTED
    moves = loss.reference_sync is not None
    if model.ref_model_name_or_path is not None or not model.use_peft:
        return ReferenceKind.SYNCHRONISED if moves else ReferenceKind.FROZEN
    if moves:
        raise ConfigError(
            "sync_ref_model must be false with use_peft=true, got true: the reference of an adapter is the frozen "
            "model beneath it, of which there is no copy to move. Set sync_ref_model=false, or train the whole model."
        )
    return ReferenceKind.ADAPTER


def check_reference(model: ModelConfig, loss: LossSection) -> None:
    """Refuse a reference of its own where it would not be asked.

    Raises:
        ConfigError: the loss compares with none, or its answers are precomputed by the policy itself.
    """
    name = model.ref_model_name_or_path
    if name is None:
        return
    kind = reference_kind(model, loss)
    if kind is ReferenceKind.NONE:
        raise ConfigError(
            f"ref_model_name_or_path must be left out where the loss compares with no reference, got {name}. Remove it."
        )
    if kind is ReferenceKind.PRECOMPUTED:
        raise ConfigError(
            f"precompute_ref_log_probs must be false with ref_model_name_or_path={name}, got true: the policy itself "
            "is asked before training. Set it to false."
        )
    check_loadable(_initial_model(model))
    _require_vocabulary(name, _rows_when_loaded(_initial_model(model)), num_tokens(load_tokenizer(model)))


def _initial_model(model: ModelConfig) -> ModelConfig:
    """What the reference's weights are loaded by."""
    name = model.ref_model_name_or_path
    if name is None:
        return model.replace(gradient_checkpointing=False)
    shared = (
        "dtype",
        "bf16",
        "attn_implementation",
        "trust_remote_code",
        "use_liger_kernel",
        "model_init_kwargs",
    )
    options = {option: getattr(model, option) for option in shared}
    return ModelConfig(
        model_name_or_path=name, gradient_checkpointing=False, use_peft=is_adapter_folder(name), **options
    )


def _rows_when_loaded(reference: ModelConfig) -> int:
    """With the rows that `load_policy` adds for its own tokenizer; it may come without one."""
    rows = int(load_model_config(reference).get_text_config().vocab_size)
    try:
        tokenizer = load_tokenizer(reference, path=find_source(reference).adapter)
    except ModelError:
        return rows
    return missing_rows(tokenizer, rows) or rows


def _require_vocabulary(name: str, rows: int, tokens: int) -> None:
    """Models of one family pad their vocabularies differently; what counts is a row for each token."""
    if rows < tokens:
        raise ModelError(
            f"ref_model_name_or_path must know all {tokens} tokens of the policy, but {name} has {rows}. Take a model "
            "with the same tokenizer."
        )


def build_reference(
    *,
    model: ModelConfig,
    training: TrainingConfig,
    loss: LossSection,
    temperature: float,
    device: torch.device | str,
    policy: Policy,
    scorer: SampleScorer,
) -> Companion | None:
    """The reference that the options ask for, at the initial weights; None where none is held.

    Args:
        model, training: as for the policy.
        loss: as for `reference_kind`.
        temperature: logits are divided by it.
        device: where a copy lives.
        policy: as `load_policy` gave it (`with_reference` where it trains an adapter on).
        scorer: of the policy; used when the reference is the policy without its adapter.

    Raises:
        ConfigError: a synchronised copy of a policy with an adapter.
        ModelError: the initial model cannot be loaded.
    """
    kind = reference_kind(model, loss)
    if kind in {ReferenceKind.NONE, ReferenceKind.PRECOMPUTED}:
        return None
    if kind is ReferenceKind.ADAPTER:
        return AdapterlessCompanion(policy, scorer)
    # Never has gradients, so that there is nothing to recompute for them.
    copy = load_policy(_initial_model(model), device=device, trainable=False)
    module = ScoringModule(copy, chunk_size=training.chunk_lm_head_size, bf16=bool(model.bf16))
    own = SampleScorer(module, share_prompt=training.share_prompt, temperature=temperature)
    if kind is ReferenceKind.FROZEN:
        return Companion(copy, own, module=module)
    sync = loss.reference_sync
    assert sync is not None, "a synchronised reference says how it moves"
    pace = Pace(rate=sync.mixup_alpha, every=sync.sync_steps)
    average = WeightAverage(dict(copy.named_parameters()), pace, keep_dtype=True)
    return AveragedCompanion(
        copy, own, module=module, average=average, folder=_FOLDER, what="the synchronised reference"
    )
