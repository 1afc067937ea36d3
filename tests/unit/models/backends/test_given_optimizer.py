"""Optimizers and schedules given as objects are built again from options, and move weights as the objects would."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import Adafactor, get_scheduler

from trl_ray.config.sections import TrainingConfig
from trl_ray.errors import ConfigError
from trl_ray.models.backends.given_optimizer import optimizer_options
from trl_ray.models.backends.optimizer import build_optimizer, build_scheduler


def groups(model: torch.nn.Linear) -> list[dict[str, Any]]:
    return [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}),
        (torch.optim.AdamW, {"lr": 0.01, "fused": True, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9}),
        (Adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False, "clip_threshold": 0.5}),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts"])
def test_the_options_move_weights_as_the_objects_do(kind: Any, options: dict[str, Any], schedule: str) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Linear(3, 2)
    ours = deepcopy(theirs)
    optimizer = kind(groups(theirs), **options)
    moves = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=6)
    training = TrainingConfig(**optimizer_options((optimizer, moves), None))
    rebuilt = build_optimizer(ours, training)
    again = build_scheduler(rebuilt, training, total_steps=6)
    for _ in range(5):
        gradients = [torch.randn_like(parameter) for parameter in theirs.parameters()]
        for model, moving, rate in ((theirs, optimizer, moves), (ours, rebuilt, again)):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            moving.step()
            rate.step()
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_nothing_given_is_no_option() -> None:
    assert optimizer_options((None, None), None) == optimizer_options(None, None) == {}


def test_a_class_with_its_arguments_is_read_as_an_optimizer() -> None:
    options = optimizer_options(None, (torch.optim.SGD, {"lr": 0.5, "momentum": 0.1}))
    assert options == {"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.0, "optim_args": {"momentum": 0.1}}


def test_what_no_options_stand_for_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=r"got a NAdam.*Set optim, optim_args"):
        optimizer_options((torch.optim.NAdam(model.parameters()), None), None)
    two = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    with pytest.raises(ConfigError, match="groups with different lr"):
        optimizer_options((two, None), None)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="got a StepLR"):
        optimizer_options((sgd, torch.optim.lr_scheduler.StepLR(sgd, step_size=3)), None)
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs"):
        optimizer_options((sgd, None), (torch.optim.SGD, {"lr": 0.1}))
