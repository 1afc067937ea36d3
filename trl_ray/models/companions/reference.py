"""The policy that the trained one is compared with, in the kinds there are.

    none          the loss compares with none
    precomputed   its answers are known (models.reference_cache): none is held
    adapter       the policy with its adapter switched off, or with the frozen adapter that training started from
    frozen        a copy of the initial weights
    synchronised  a copy that moves towards the policy: after every N-th step, ref <- (1 - alpha) ref + alpha policy

samples --logprobs--> [N] or None        weights of the policy --after_step--> synchronised copy --save/load--> step-N/

Every rank holds a reference of its own. It starts from the initial model, also where a run goes on from a checkpoint.
What is to be precomputed is asked of the policy itself, before its first update (`initial_reference`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.adapters.lora import as_reference
from trl_ray.models.policy_loading import Policy, load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.types import TrainingSample

_FOLDER = "reference"
"""Below the checkpoint: engines read every weight file of the folder itself."""
_WEIGHTS = "weights.safetensors"


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
    if not model.use_peft:
        return ReferenceKind.SYNCHRONISED if moves else ReferenceKind.FROZEN
    if moves:
        raise ConfigError(
            "sync_ref_model must be false with use_peft=true, got true: the reference of an adapter is the frozen "
            "model beneath it, of which there is no copy to move. Set sync_ref_model=false, or train the whole model."
        )
    return ReferenceKind.ADAPTER


class Reference:
    """No reference: scores nothing, and nothing is to be kept of it. The base of those that do."""

    kind = ReferenceKind.NONE

    def logprobs(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Log-probs [N] of the trained tokens, in sample order, without gradient; None without reference or tokens."""
        del samples
        return None

    def is_due(self, step: int) -> bool:
        """Whether the reference moves after this optimizer step, counted from 1."""
        del step
        return False

    def after_step(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the policy.

        Args:
            step: one that `is_due`.
            weights: all parameters of the policy, whole, by name; tied ones once.
        """
        del weights
        raise AssertionError(f"a reference of kind {self.kind.value} does not move, but was asked to after step {step}")

    def save(self, directory: str | Path) -> None:
        """Write into a checkpoint's folder what cannot be loaded from the initial model; on one rank.

        Raises:
            CheckpointError: it cannot be written.
        """

    def load(self, directory: str | Path) -> None:
        """Go on from what `save` wrote; on every rank.

        Raises:
            CheckpointError: it is missing or does not fit.
        """


class PrecomputedReference(Reference):
    """No reference is held, because its answers were written down."""

    kind = ReferenceKind.PRECOMPUTED


class InitialReference(Reference):
    """The policy as it was loaded, which before its first update is its own reference: no copy is made.

    Args:
        policy: at version 0, with or without an adapter; a new adapter changes nothing yet, and one that training
            started from is part of the reference.
        scorer: the policy's own.
    """

    kind = ReferenceKind.PRECOMPUTED

    def __init__(self, policy: Policy, scorer: SampleScorer) -> None:
        self._policy, self._scorer = policy, scorer

    def logprobs(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Only before the first update."""
        return _score(self._policy, self._scorer, samples)


def initial_reference(policy: Policy, scorer: SampleScorer) -> Reference:
    """What precomputes the reference's log-probs; valid until the policy's first update and not after it."""
    return InitialReference(policy, scorer)


class AdapterReference(Reference):
    """The policy's own frozen weights: what it computes without its adapter, or with the one it started from.

    Args:
        policy: with an adapter.
        scorer: the policy's own, because a model's head must not be wrapped twice.
    """

    kind = ReferenceKind.ADAPTER

    def __init__(self, policy: Policy, scorer: SampleScorer) -> None:
        self._policy, self._scorer = policy, scorer

    def logprobs(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        with as_reference(self._policy):
            return _score(self._policy, self._scorer, samples)


class FrozenReference(Reference):
    """A copy of the initial weights.

    Args:
        policy: the copy, frozen; nothing else computes with it.
        scorer: of the copy.
    """

    kind = ReferenceKind.FROZEN

    def __init__(self, policy: Policy, scorer: SampleScorer) -> None:
        self._policy, self._scorer = policy, scorer

    def logprobs(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        return _score(self._policy, self._scorer, samples)


class SynchronisedReference(FrozenReference):
    """A copy that follows the policy (https://arxiv.org/abs/2404.09656, soft update): parameters only, no buffers.

    Args:
        policy: the copy, at the initial weights.
        scorer: of the copy.
        alpha: share of the policy in each mix, in (0, 1].
        every: optimizer steps between two mixes.
    """

    kind = ReferenceKind.SYNCHRONISED

    def __init__(self, policy: Policy, scorer: SampleScorer, *, alpha: float, every: int) -> None:
        super().__init__(policy, scorer)
        self._alpha, self._every = alpha, every

    def is_due(self, step: int) -> bool:
        return step % self._every == 0

    @torch.no_grad()
    def after_step(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert self.is_due(step), f"the reference moves every {self._every} steps, but was asked to after step {step}"
        waiting = dict(self._policy.named_parameters())
        for name, weight in weights:
            own = waiting.pop(name, None)
            assert own is not None, f"the policy's weight {name} is not one of the reference, or came twice"
            own.mul_(1.0 - self._alpha).add_(weight.to(device=own.device, dtype=own.dtype), alpha=self._alpha)
        assert not waiting, f"the policy must send all weights to its reference, but did not send {sorted(waiting)[:3]}"

    def save(self, directory: str | Path) -> None:
        folder = Path(directory) / _FOLDER
        weights = {name: own.detach().cpu().contiguous() for name, own in self._policy.named_parameters()}
        try:
            folder.mkdir(exist_ok=True)
            save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the synchronised reference must be written to {folder}, but: {error}. Free space or check "
                "permissions; earlier checkpoints are untouched."
            ) from error

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        file = Path(directory) / _FOLDER / _WEIGHTS
        try:
            with safe_open(file, framework="pt") as kept:
                for name, own in self._policy.named_parameters():
                    weight = kept.get_tensor(name)
                    if weight.shape != own.shape or weight.dtype != own.dtype:
                        raise CheckpointError(
                            f"{name} in {file} must be {tuple(own.shape)} {own.dtype}, but is {tuple(weight.shape)} "
                            f"{weight.dtype}. Resume with the configuration of the run that wrote it."
                        )
                    own.copy_(weight)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} must hold the synchronised reference, but: {error}. Resume with the configuration of the run "
                "that wrote it, or use another checkpoint."
            ) from error


def build_reference(
    *,
    model: ModelConfig,
    training: TrainingConfig,
    loss: LossSection,
    temperature: float,
    device: torch.device | str,
    policy: Policy,
    scorer: SampleScorer,
) -> Reference:
    """The reference that the options ask for, at the initial weights.

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
    if kind is ReferenceKind.NONE:
        return Reference()
    if kind is ReferenceKind.PRECOMPUTED:
        return PrecomputedReference()
    if kind is ReferenceKind.ADAPTER:
        return AdapterReference(policy, scorer)
    # Never has gradients, so that there is nothing to recompute for them.
    frozen = load_policy(model.replace(gradient_checkpointing=False), device=device, trainable=False)
    module = ScoringModule(frozen, chunk_size=training.chunk_lm_head_size, bf16=model.bf16)
    own = SampleScorer(module, share_prompt=training.share_prompt, temperature=temperature)
    if kind is ReferenceKind.FROZEN:
        return FrozenReference(frozen, own)
    sync = loss.reference_sync
    assert sync is not None, "a synchronised reference says how it moves"
    return SynchronisedReference(frozen, own, alpha=sync.mixup_alpha, every=sync.sync_steps)


@torch.no_grad()
def _score(policy: Policy, scorer: SampleScorer, samples: Sequence[TrainingSample]) -> Tensor | None:
    training = policy.training
    policy.train(False)
    try:
        return scorer.logprobs(samples)
    finally:
        policy.train(training)
