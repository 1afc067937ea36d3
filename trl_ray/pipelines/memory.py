"""What actors are expected to hold in memory, for the dry run; activations depend on lengths and are not counted."""

from __future__ import annotations

from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.models.load import count_parameters

GIB = 1 << 30
PROCESS = 0.6 * GIB
"""Python with torch and transformers."""
_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}


def dtype_bytes(dtype: Dtype) -> int:
    """Bytes of one number."""
    return _BYTES[dtype]


def learner_memory(model: ModelConfig, *, has_reference: bool) -> float:
    """Bytes of one rank of the learner that shares nothing.

    Weights and the published copy; of what is trained also gradients and two Adam moments, which ZeRO splits. With an
    adapter the frozen weights are the reference.
    """
    count, weight = count_parameters(model), _BYTES[model.dtype]
    reference = count.base * weight if has_reference and not model.use_peft else 0
    return count.base * weight * 2 + count.trained * weight * 3 + reference + PROCESS
