"""What two ranks do in the tests of learners with a teacher; each rank is a process that runs `run_rank`.

every case: join --> updates, an evaluation, a teacher's NaN, a checkpoint and going on --> Outcome; rank 0 writes all
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taught_batches import TEMPERATURE, batch_of, said, taught_samples
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.algorithms.batches.micro_batches import shard
from trl_ray.config.losses.distillation_options import DistillationLossConfig, DistillationMode, SDPOObjective, Support
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.config.teacher_options import (
    AdapterAverage,
    TeacherConfig,
    TeacherKind,
    TeacherOptions,
    TeacherSource,
    TeacherWeights,
)
from trl_ray.models.policy_loading import load_policy
from trl_ray.types import Evaluation, StepResult, TrainBatch, TrainingSample

STEPS = (1, 2, 3)
OBJECTIVES: dict[str, LossSection] = {
    "sampled": SDPOObjective(),
    "full": SDPOObjective(distillation_mode=DistillationMode.FULL_LOGITS, distillation_alpha=0.5),
    "topk": SDPOObjective(
        distillation_mode=DistillationMode.TOPK_LOGITS, distillation_topk=5, distillation_add_tail=True
    ),
    "blend": SDPOObjective(
        distillation_mode=DistillationMode.FULL_LOGITS, distillation_weight=0.5, beta=0.05, entropy_coef=0.01
    ),
    "union": DistillationLossConfig(beta=0.5, loss_support=Support.UNION),
    "said": DistillationLossConfig(beta=0.5, loss_top_k=4),
    "sdpo said": SDPOObjective(distillation_mode=DistillationMode.TOPK_LOGITS, distillation_topk=4),
}


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a case came to on rank 0."""

    results: list[StepResult] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: StepResult | None = None
    unchanged: bool = False
    weights: Tensor | None = None
    resumed: list[StepResult] = field(default_factory=list)
    resumed_weights: Tensor | None = None


def arguments(
    path: str,
    objective: str,
    *,
    kind: str | None = None,
    other: str,
    average: str = "factors",
    deepspeed: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Of a learner; Adam turns any rounding of a gradient near 0 into a whole step, unless its epsilon is large."""
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1.0, "deepspeed": deepspeed}
    return {
        "model": ModelConfig(model_name_or_path=path, gradient_checkpointing=False, **(model or {})),
        "training": TrainingConfig(**training),
        "loss": OBJECTIVES[objective],
        "temperature": TEMPERATURE,
        "total_updates": 10,
        "teacher": None if kind is None else _source(TeacherKind(kind), other, average),
    }


def _source(kind: TeacherKind, other: str, average: str) -> TeacherSource:
    weights = TeacherWeights(
        teacher_model_kind=kind, teacher_update_rate=0.3, teacher_adapter_average=AdapterAverage(average)
    )
    return TeacherSource(
        name="t",
        kind=kind,
        model=ModelConfig(model_name_or_path=other),
        options=TeacherOptions(model_name_or_path=other) if kind is TeacherKind.EXTERNAL else TeacherConfig(),
        weights=None if kind is TeacherKind.EXTERNAL else weights,
    )


def update(objective: str, step: int, *, size: int, other: str, spoilt: bool = False) -> TrainBatch:
    """Eight samples, cut into micro-batches of `size`; some of these may have nothing that is distilled."""
    samples: Sequence[TrainingSample] = taught_samples(step)
    if "said" in objective:
        teacher = load_policy(ModelConfig(model_name_or_path=other), trainable=False)
        samples = said(teacher, samples, top_k=4, tail=True)
    if "sdpo" not in objective and isinstance(OBJECTIVES[objective], DistillationLossConfig):
        samples = [sample for sample in samples if sample.is_distilled]
    if spoilt:
        samples = [*samples[:-1], _spoilt(samples[-1])]
    return batch_of(samples, step=step, size=size)


def _spoilt(sample: TrainingSample) -> TrainingSample:
    assert sample.teacher is not None, "a teacher has scored it"
    return replace(sample, teacher=replace(sample.teacher, logprobs=np.full_like(sample.teacher.logprobs, math.nan)))


def flat(learner: PolicyLearner) -> Tensor:
    """All weights; collective."""
    return torch.cat([weight.detach().flatten().clone() for _, weight in learner._backend.weights()])


def tell(options: dict[str, Any], *, place: dict[str, Any], addresses: list[str], folder: Path) -> Outcome:
    """One case, on one of the ranks."""
    objective, path, other = options.pop("objective"), options.pop("path"), options.pop("other")
    rank, equal = place["rank"], options.get("deepspeed") is not None
    outcome = Outcome()

    def share(step: int, size: int, *, spoilt: bool = False) -> TrainBatch:
        return shard(update(objective, step, size=size, other=other, spoilt=spoilt), ranks=2, equal=equal)[rank]

    def start(checkpoint: str | None, address: str) -> PolicyLearner:
        told = arguments(path, objective, other=other, **options)
        learner = PolicyLearner(**told, **place, checkpoint=checkpoint)
        learner.join(address)
        return learner

    learner = start(None, addresses[0])
    for step, size in zip(STEPS, (1, 3, 8), strict=True):  # eight, three and one micro-batches: one rank may have none
        outcome.results.append(learner.step(share(step, size)))
        outcome.evaluations.append(learner.evaluate(share(9, size)))
    outcome.weights = flat(learner)
    step = len(STEPS) + 1
    if objective == "said":
        outcome.skipped = learner.step(share(step, 2, spoilt=True))
        outcome.unchanged = torch.equal(flat(learner), outcome.weights)
        step += 1
    saved = learner.save(str(folder), step=step - 1, extra={})
    straight = learner.step(share(step, 1))
    straight_weights = flat(learner)
    learner.close()
    learner = start(saved, addresses[1])
    outcome.resumed = [straight, learner.step(share(step, 1))]
    outcome.resumed_weights = torch.stack([straight_weights, flat(learner)])
    learner.close()
    return outcome


def run_rank(
    rank: int,
    path: str,
    other: str,
    directory: str,
    cases: dict[str, dict[str, Any]],
    addresses: list[tuple[str, str]],
) -> None:
    """All cases, one after the other."""
    torch.set_num_threads(1)
    place = {"rank": rank, "num_ranks": 2, "collective_timeout_s": 60.0}
    found = {
        name: tell(
            {**options, "path": path, "other": other},
            place=place,
            addresses=list(meeting),
            folder=Path(directory, name.replace(" ", "-")),
        )
        for (name, options), meeting in zip(cases.items(), addresses, strict=True)
    }
    if rank == 0:
        torch.save(found, Path(directory, "outcomes.pt"))
