"""Schedules with hand-computed values, and which weights decay."""

from __future__ import annotations

import pytest
import torch

from trl_ray.config.sections import Schedule, TrainingConfig
from trl_ray.models.backends.optimizer import build_optimizer, build_scheduler, learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.LINEAR, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Schedule.COSINE, [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466, 0.0, 0.0]),
        (Schedule.CONSTANT_WITH_WARMUP, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule.CONSTANT, [1.0] * 8),
    ],
)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    factor = learning_rate_factor(schedule, warmup_steps=2, total_steps=6)
    assert [factor(step) for step in range(8)] == pytest.approx(expected, abs=1e-7)


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
