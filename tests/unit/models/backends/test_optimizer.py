"""Schedules with hand-computed values, and which weights decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SchedulerType

from trl_ray.config.sections import Schedule, TrainingConfig
from trl_ray.errors import ConfigError
from trl_ray.models.backends.optimizer import build_optimizer, build_scheduler, check_schedule


def rates(**options: Any) -> list[float]:
    """The learning rate before each of eight steps, with six in the run."""
    training = TrainingConfig(learning_rate=1.0, **options)
    optimizer = build_optimizer(torch.nn.Linear(3, 2), training)
    scheduler = build_scheduler(optimizer, training, total_steps=6)
    found = []
    for _ in range(8):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("linear", {}, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("cosine", {}, [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466, 0.0]),
        ("constant_with_warmup", {}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant", {}, [1.0] * 8),
        # 0.2 + 0.8 of the cosine
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, [0.0, 0.5, 1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
        # Two cosines of two steps each: whole, half, whole, half.
        ("cosine_with_restarts", {"num_cycles": 2}, [0.0, 0.5, 1.0, 0.5, 1.0, 0.5, 0.0]),
        # 0.1 + 0.9 (1 - k/4)^2
        ("polynomial", {"power": 2.0, "lr_end": 0.1}, [0.0, 0.5, 1.0, 0.60625, 0.325, 0.15625, 0.1]),
        # sqrt(2 / step)
        ("inverse_sqrt", {}, [0.0, 0.5, 1.0, 0.8164966, 0.7071068, 0.6324555, 0.5773503]),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear"}, [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_schedules(schedule: str, options: dict[str, Any], expected: list[float]) -> None:
    found = rates(lr_scheduler_type=schedule, lr_scheduler_kwargs=options, warmup_steps=2)
    assert found[: len(expected)] == pytest.approx(expected, abs=1e-7)


def test_every_schedule_is_one_of_transformers() -> None:
    others = {"reduce_lr_on_plateau", "greedy"}  # they wait for a metric
    assert {each.value for each in SchedulerType} - others == {each.value for each in Schedule}


@pytest.mark.parametrize(
    ("schedule", "options"), [("linear", {"min_lr": 0.1}), ("cosine_with_min_lr", {}), ("polynomial", {"lr_end": 2.0})]
)
def test_options_that_a_schedule_does_not_have_are_told_before_anything_starts(
    schedule: str, options: dict[str, Any]
) -> None:
    check_schedule(TrainingConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.0}))
    with pytest.raises(ConfigError, match=f"options of lr_scheduler_type={schedule}"):
        check_schedule(TrainingConfig(learning_rate=1.0, lr_scheduler_type=schedule, lr_scheduler_kwargs=options))


def test_only_matrices_decay_and_the_schedule_moves_the_learning_rate() -> None:
    model = torch.nn.Linear(3, 2)
    training = TrainingConfig(weight_decay=0.1, learning_rate=1e-2)
    optimizer = build_optimizer(model, training)
    decay = {p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0} and optimizer.defaults["fused"]
    scheduler = build_scheduler(optimizer, training, total_steps=4)
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.75e-2)
