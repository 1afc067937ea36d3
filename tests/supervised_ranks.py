"""What two ranks do in the tests of supervised learners; each rank is a process that runs `run_rank`.

every case: join --> updates, an evaluation, a first pass, NaN, a checkpoint and going on --> Outcome; rank 0 writes all
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supervised_batches import batch_of, pairs, rated, reward_pairs, solutions, texts
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.algorithms.batches.example_batches import with_references
from trl_ray.algorithms.batches.micro_batches import shard
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.preference_options import PreferenceLossConfig, UnpairedLossConfig
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.types import Evaluation, Example, StepResult, TrainBatch

STEPS = (1, 2, 3)
OBJECTIVES: dict[str, tuple[LossSection, Any, dict[str, float]]] = {
    "sft": (SupervisedLossConfig(), texts, {}),
    "dpo": (PreferenceLossConfig(beta=0.5), pairs, {}),
    "dpo-precomputed": (
        PreferenceLossConfig(beta=0.5, precompute_ref_log_probs=True),
        lambda seed: [with_references(pair, [-20.0, -21.5]) for pair in pairs(seed)],
        {},
    ),
    "kto": (UnpairedLossConfig(), rated, {"kl": 0.2}),
    "reward": (RewardLossConfig(), reward_pairs, {}),
    "prm": (StepLossConfig(), solutions, {}),
}


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a case came to on rank 0."""

    results: list[StepResult] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: StepResult | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    unchanged: bool = False
    weights: Tensor | None = None
    resumed: list[StepResult] = field(default_factory=list)
    resumed_weights: Tensor | None = None


def arguments(
    path: str, objective: str, *, deepspeed: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Of a learner; Adam turns any rounding of a gradient near 0 into a whole step, unless its epsilon is large."""
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1.0, "deepspeed": deepspeed}
    return {
        "model": ModelConfig(model_name_or_path=path, gradient_checkpointing=False, **(model or {})),
        "training": TrainingConfig(**training),
        "loss": OBJECTIVES[objective][0],
        "total_updates": 10,
    }


def update(objective: str, step: int, *, size: int, examples: list[Example] | None = None) -> TrainBatch:
    loss, make, more = OBJECTIVES[objective]
    return batch_of(loss, make(step) if examples is None else examples, step=step, size=size, **more)


def flat(learner: PolicyLearner) -> Tensor:
    """All weights; collective."""
    return torch.cat([weight.detach().flatten().clone() for _, weight in learner._backend.weights()])


def poisoned(objective: str, step: int) -> TrainBatch:
    """The reference's log-prob of the last row's second completion is not a number."""
    examples = OBJECTIVES[objective][1](step)
    examples = [with_references(example, [-1.0] * len(example.samples)) for example in examples]
    examples[-1] = with_references(examples[-1], [-1.0, math.nan])
    return update(objective, step, size=1, examples=examples)


def tell(options: dict[str, Any], *, place: dict[str, Any], addresses: list[str], folder: Path) -> Outcome:
    """One case, on one of the ranks."""
    objective = options.pop("objective")
    path = options.pop("path")
    rank, equal = place["rank"], options.get("deepspeed") is not None
    outcome = Outcome()

    def share(batch: TrainBatch) -> TrainBatch:
        return shard(batch, ranks=2, equal=equal)[rank]

    learner = PolicyLearner(**arguments(path, objective, **options), **place)
    learner.join(addresses[0])
    for step, size in zip(STEPS, (1, 3, 8), strict=True):  # eight, three and one micro-batches: one rank may have none
        outcome.results.append(learner.step(share(update(objective, step, size=size))))
        outcome.evaluations.append(learner.evaluate(share(update(objective, 9, size=size))))
    outcome.weights = flat(learner)
    step = len(STEPS) + 1
    if "dpo" in objective:
        outcome.skipped = learner.step(share(poisoned(objective, step)))
        outcome.warnings = [dict(event.detail) for event in learner.drain().events]
        outcome.unchanged = torch.equal(flat(learner), outcome.weights)
        step += 1
    saved = learner.save(str(folder), step=step - 1, extra={})
    straight = [learner.step(share(update(objective, step, size=1)))]
    straight_weights = flat(learner)
    learner.close()
    learner = PolicyLearner(**arguments(path, objective, **options), **place, checkpoint=saved)
    learner.join(addresses[1])
    outcome.resumed = [*straight, learner.step(share(update(objective, step, size=1)))]
    outcome.resumed_weights = torch.stack([straight_weights, flat(learner)])
    learner.close()
    return outcome


def run_rank(
    rank: int, path: str, directory: str, cases: dict[str, dict[str, Any]], addresses: list[tuple[str, str]]
) -> None:
    """All cases, one after the other."""
    torch.set_num_threads(1)
    place = {"rank": rank, "num_ranks": 2, "collective_timeout_s": 60.0}
    found = {
        name: tell(
            {**options, "path": path},
            place=place,
            addresses=list(meeting),
            folder=Path(directory, name.replace(" ", "-")),
        )
        for (name, options), meeting in zip(cases.items(), addresses, strict=True)
    }
    if rank == 0:
        torch.save(found, Path(directory, "outcomes.pt"))
