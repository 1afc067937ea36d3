"""AdamW and the learning-rate schedules.

named_parameters --> two groups (decayed, not decayed) --> AdamW <-- LambdaLR(schedule)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from trl_ray.config.sections import Schedule, TrainingConfig


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
    """The schedule as torch's LambdaLR, to be stepped once after each optimizer step."""
    factor = learning_rate_factor(
        training.lr_scheduler_type, warmup_steps=training.warmup_steps, total_steps=total_steps
    )
    return LambdaLR(optimizer, factor)


def learning_rate_factor(schedule: Schedule, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied with, as a function of the optimizer steps done (from 0).

    All but `constant` rise linearly from 0 over the warm-up. Then `linear` falls to 0 at `total_steps`, `cosine`
    does so along half a cosine, and the two constants stay at 1.
    """

    def factor(step: int) -> float:
        if schedule is Schedule.CONSTANT:
            return 1.0
        if step < warmup_steps:
            return step / warmup_steps
        if schedule is Schedule.CONSTANT_WITH_WARMUP:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1.0 - progress if schedule is Schedule.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
