"""What every run plans from its configuration and its model's: updates, steps, and the memory it expects to need.

How updates are cut and how many steps there are; what actors are expected to hold, for the dry run: activations depend
on lengths and are not counted.
"""

from __future__ import annotations

import math
from typing import Any

from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.config.optimizer_options import Optim
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.config.teacher_options import TeacherEngine, TeacherSource
from trl_ray.errors import ConfigError
from trl_ray.models.policy_loading import count_parameters


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


GIB = 1 << 30
PROCESS = 0.6 * GIB
"""Python with torch and transformers."""
_KEPT = {"sgd": 0.0, "adafactor": 0.0, "muon": 1.0, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0, "ademamix": 3.0}
"""Moments by part of an optimizer's name; others keep two. Adafactor's rows and columns are next to nothing."""
_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}


def dtype_bytes(dtype: Dtype) -> int:
    """Bytes of one number."""
    return _BYTES[dtype]


def optimizer_copies(optim: Optim) -> float:
    """Numbers that an optimizer keeps for one weight, in sizes of that weight in float32."""
    kept = next((count for part, count in _KEPT.items() if part in optim.value), 2.0)
    return kept / 4 if "8bit" in optim.value else kept


def learner_memory(
    model: ModelConfig,
    *,
    has_reference: bool,
    optim: Optim = Optim.ADAMW_TORCH_FUSED,
    float32_master_weights: bool = True,
) -> float:
    """Bytes of one rank of the learner that shares nothing.

    Weights and the published copy; of what is trained also gradients and what the optimizer keeps (two moments of
    AdamW), which ZeRO splits; of 16-bit weights these are float32, and so are a copy of each and its gradient. With an
    adapter the frozen weights are the reference, and what is trained is float32.
    """
    count, weight = count_parameters(model), _BYTES[model.dtype]
    if model.dtype is not Dtype.FLOAT32 and (float32_master_weights or model.use_peft):
        full = _BYTES[Dtype.FLOAT32]
        copies = 0 if model.use_peft else full
        extra = count.trained * (copies + (full - weight) * (1 + optimizer_copies(optim)))
    else:
        extra = 0.0
    has_copy = has_reference and (model.ref_model_name_or_path is not None or not model.use_peft)
    reference = count.base * weight if has_copy else 0
    trained = count.trained * weight * (1 + optimizer_copies(optim)) + extra
    return count.base * weight * 2 + trained + reference + PROCESS


def teacher_memory(source: TeacherSource) -> float:
    """Bytes of one copy of a teacher's weights; 0 where a server has them.

    An average is accumulated in float32 beside weights of another format.
    """
    if source.model.model_name_or_path is None:
        return 0.0
    count, weight = count_parameters(source.model).base, _BYTES[source.model.dtype]
    sums = _BYTES[Dtype.FLOAT32] if source.keeps_average and weight < _BYTES[Dtype.FLOAT32] else 0
    external, cache = source.external, 0.0
    if external is not None and external.engine is TeacherEngine.VLLM:
        cache = external.kv_cache_memory_gib * GIB
    return count * (weight + sums) + cache
