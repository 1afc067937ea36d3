"""What every run plans from its configuration and its model's: how updates are cut, and how many steps there are."""

from __future__ import annotations

import math
from typing import Any

from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.errors import ConfigError


def cut_rules(
    config: RunConfig, shape: Any, *, max_samples: int | None = None, max_examples: int | None = None
) -> CutRules:
    """How an update becomes micro-batches: by tokens where the configuration says so, else by what may be in one.

    Args:
        config: of the run.
        shape: the model's own text configuration, for weighing its head against its layers.
        max_samples: completions in one micro-batch.
        max_examples: examples in one micro-batch.
    """
    by_tokens = config.max_tokens_per_micro_batch is not None
    return CutRules(
        max_samples=None if by_tokens else max_samples,
        max_examples=None if by_tokens else max_examples,
        max_tokens=config.max_tokens_per_micro_batch,
        ranks=config.runtime.num_learners,
        share=config.share_prompt,
        hidden_size=shape.hidden_size,
        head_share=shape.vocab_size / (9 * shape.hidden_size * shape.num_hidden_layers),
    )


def total_steps(config: RunConfig, units: int, *, per_step: int) -> int:
    """Optimizer steps of the run: `max_steps`, or what the epochs make of `units` in one epoch.

    Raises:
        ConfigError: there are none.
    """
    if config.max_steps > 0:
        return config.max_steps
    if config.max_steps == 0:
        raise ConfigError("max_steps must be at least 1, or -1 for num_train_epochs; got 0.")
    return max(1, math.ceil(config.num_train_epochs * units / per_step))
