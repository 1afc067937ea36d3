"""AdamW and the learning-rate schedules, which are transformers' own.

named_parameters --> two groups (decayed, not decayed) --> AdamW <-- LambdaLR(schedule)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from trl_ray.config.sections import TrainingConfig
from trl_ray.config.step_counts import steps_of
from trl_ray.errors import ConfigError


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) in its fused form; biases and norms (1-d) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, training: TrainingConfig, *, total_steps: int) -> LambdaLR:
    """The schedule, to be stepped once after each optimizer step.

    Raises:
        ConfigError: `lr_scheduler_kwargs` are not those of this schedule.
    """
    try:
        scheduler: LambdaLR = get_scheduler(
            training.lr_scheduler_type.value,
            optimizer,
            num_warmup_steps=steps_of(training.warmup_steps, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs must be options of lr_scheduler_type={training.lr_scheduler_type.value} in "
            f"transformers, got {training.lr_scheduler_kwargs}: {error}. Correct one of the two."
        ) from error
    return scheduler


def check_schedule(training: TrainingConfig) -> None:
    """Refuse options that the schedule does not have, before anything starts.

    Raises:
        ConfigError: as `build_scheduler`.
    """
    unused = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    build_scheduler(unused, training, total_steps=2)
