"""What two ranks do in the tests of the DeepSpeed back end; each rank is a process that runs `run_rank`.

every case: build --> updates, skips, checkpoints --> Outcome; rank 0 writes all of them to one file
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_batches import batch, samples
from trl_ray.actors.learner_passes import Passes
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.sections import Dtype, ModelConfig, SharePrompt, TrainingConfig
from trl_ray.models.backends.deepspeed_backend import DeepSpeedBackend
from trl_ray.models.backends.ranks import Ranks, join_ranks, leave_ranks
from trl_ray.models.backends.torch_backend import TorchBackend
from trl_ray.models.backends.training_backend import TrainingBackend
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.types import TrainBatch

STEPS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """The parts of a learner that a back end works with."""

    module: ScoringModule
    backend: TrainingBackend
    scorer: SampleScorer
    passes: Passes
    ranks: Ranks


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a case came to, the same on every rank unless a field says otherwise."""

    losses: list[float] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    """Per update, of each rank."""
    rates: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    weights: torch.Tensor | None = None
    skipped_norms: list[list[float]] = field(default_factory=list)
    """Per skipped update that was reduced, of each rank."""
    unchanged: list[bool] = field(default_factory=list)
    """Per skipped update: weights and optimizer are the same bits on all ranks."""


def share(step: int, ranks: Ranks, *, size: int) -> TrainBatch:
    """One rank's micro-batches of `size` samples; all ranks have equally many, some of them empty."""
    whole = batch(step, size=size)
    own = list(whole.micro_batches[ranks.rank :: ranks.size])
    own += [()] * (-(-whole.num_micro_batches // ranks.size) - len(own))
    return replace(whole, micro_batches=tuple(own))


def build(
    path: str,
    ranks: Ranks,
    *,
    deepspeed: dict[str, Any] | None = None,
    dtype: Dtype = Dtype.FLOAT32,
    checkpointing: bool = False,
    adam_epsilon: float = 1.0,
    optim: str = "adamw_torch_fused",
) -> Learner:
    """A learner; Adam turns any rounding of a gradient near 0 into a whole step, unless its epsilon is large."""
    training = TrainingConfig(
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        max_grad_norm=0.5,
        adam_epsilon=adam_epsilon,
        optim=optim,
        deepspeed=deepspeed,
    )
    model = ModelConfig(model_name_or_path=path, gradient_checkpointing=checkpointing, dtype=dtype)
    module = ScoringModule(load_policy(model), chunk_size=None)
    kind = TorchBackend if deepspeed is None else DeepSpeedBackend
    backend: TrainingBackend = kind(module, training, total_updates=10, ranks=ranks)
    scorer = SampleScorer(module, share_prompt=SharePrompt.NEVER, temperature=0.9, forward=backend.module)
    passes = Passes(
        scorer=scorer,
        reference=None,
        loss=PolicyLoss(config=LossConfig(entropy_coef=0.01), max_completion_length=9),
        backend=backend,
        ranks=ranks,
        device=torch.device("cpu"),
        on_progress=lambda: None,
    )
    return Learner(module=module, backend=backend, scorer=scorer, passes=passes, ranks=ranks)


def flat(backend: TrainingBackend) -> torch.Tensor:
    """All weights, one after the other."""
    return torch.cat([tensor.detach().flatten().clone() for _, tensor in backend.weights()])


def state_bits(backend: TrainingBackend) -> list[torch.Tensor]:
    """Every number the optimizer keeps on this rank."""
    optimizer: torch.optim.Optimizer = backend._optimizer  # type: ignore[attr-defined]
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


def update(learner: Learner, step: int, outcome: Outcome, *, size: int = 1) -> None:
    """One update, written down."""
    backend, ranks = learner.backend, learner.ranks
    passed = learner.passes.train(share(step, ranks, size=size))
    outcome.losses.append(sum(ranks.gather(passed.loss)))
    outcome.rates.append(backend.learning_rate)
    outcome.norms.append(ranks.gather(backend.reduce()))
    backend.update()


def finish(learner: Learner, outcome: Outcome) -> Outcome:
    """Add the weights as they are."""
    outcome.names = [name for name, _ in learner.backend.weights()]
    outcome.weights = flat(learner.backend)
    return outcome


def train(learner: Learner, *, size: int = 1) -> Outcome:
    """Three updates."""
    outcome = Outcome()
    for step in STEPS:
        update(learner, step, outcome, size=size)
    return finish(learner, outcome)


def train_with_scores(learner: Learner) -> Outcome:
    """Three updates with unequal shares, one of them empty, and passes without gradient before each."""
    outcome = Outcome()
    for step, size in zip(STEPS, (3, 8, 3), strict=True):
        learner.passes.score(share(step, learner.ranks, size=3))
        learner.scorer.sequence_logprobs(np.array([5, 6, 7], dtype=np.int32))
        update(learner, step, outcome, size=size)
    return finish(learner, outcome)


def skip(learner: Learner) -> Outcome:
    """An update, three skipped ones (after `reduce`, with a NaN, and amid the passes), and another update."""
    backend, ranks, outcome = learner.backend, learner.ranks, Outcome()
    update(learner, 1, outcome)
    for poison, reduced in ((False, True), (True, True), (False, False)):
        before, bits = flat(backend), state_bits(backend)
        learner.passes.train(share(2, ranks, size=1))
        logprobs = learner.scorer.logprobs(samples(2)[:1])
        assert logprobs is not None
        factor = float("nan") if poison and ranks.rank == 1 else 1.0
        backend.backward(factor * logprobs.sum(), is_last=reduced)
        if reduced:
            outcome.skipped_norms.append(ranks.gather(backend.reduce()))
        backend.discard()
        same = torch.equal(before, flat(backend)) and all(map(torch.equal, bits, state_bits(backend)))
        outcome.unchanged.append(all(ranks.gather(same)))
    update(learner, 3, outcome)
    return finish(learner, outcome)


def skip_without_passes(learner: Learner) -> Outcome:
    """The same updates; those that are skipped never have gradients."""
    outcome = Outcome()
    update(learner, 1, outcome)
    for _ in range(3):
        learner.backend.discard()
    update(learner, 3, outcome)
    return finish(learner, outcome)


def save(learner: Learner, directory: Path) -> dict[str, Any]:
    """Model and optimizer to a folder, the rest returned, as a checkpoint keeps them."""
    state = learner.backend.save_state(directory)
    whole = {name: tensor.detach().clone() for name, tensor in learner.backend.weights()}
    if learner.ranks.is_first:
        learner.module.policy.save_pretrained(directory, state_dict=whole)
    learner.ranks.gather(None)
    return copy.deepcopy(state)


def resume(make: Callable[..., Learner], path: str, directory: Path) -> tuple[Outcome, Outcome]:
    """Two updates straight, and the second one again from a checkpoint of the first."""
    straight, resumed = Outcome(), Outcome()
    learner = make(path)
    update(learner, 1, straight)
    state = save(learner, directory)
    update(learner, 2, straight)
    finish(learner, straight)
    learner = make(str(directory))
    learner.backend.load_state(directory, state)
    update(learner, 2, resumed)
    return straight, finish(learner, resumed)


def run_case(name: str, options: dict[str, Any], path: str, ranks: Ranks, directory: Path) -> dict[str, Outcome]:
    """Everything one configuration is asked to do."""

    def make(where: str, **more: Any) -> Learner:
        return build(where, ranks, **options | more)

    place = directory / name
    place.mkdir(exist_ok=True)
    found = {"plain": train(make(path))}
    if "deepspeed" in options:
        found |= {"skip": skip(make(path)), "without": skip_without_passes(make(path))}
    if len(options.get("deepspeed", {}).get("zero_optimization", {})) == 1 and "dtype" not in options:
        found["unequal"] = train_with_scores(make(path))
    if name in {"zero-1", "zero-3"}:
        found["checkpointed"] = train(make(path, checkpointing=True))
    straight, resumed = resume(lambda where: make(where, adam_epsilon=1e-8), path, place)
    return found | {"straight": straight, "resumed": resumed}


def run_rank(rank: int, address: str, path: str, directory: str, cases: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """One of two ranks; rank 0 leaves `outcomes.pt` in the directory."""
    torch.set_num_threads(1)
    ranks = join_ranks(rank=rank, size=2, address=address, device=torch.device("cpu"), timeout_s=120.0)
    outcomes = {name: run_case(name, options, path, ranks, Path(directory)) for name, options in cases}
    if ranks.is_first:
        torch.save(outcomes, Path(directory) / "outcomes.pt")
    leave_ranks()
