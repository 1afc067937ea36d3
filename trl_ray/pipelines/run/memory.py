"""What actors are expected to hold in memory, for the dry run; activations depend on lengths and are not counted."""

from __future__ import annotations

from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.config.teacher_options import TeacherEngine, TeacherKind, TeacherSource
from trl_ray.models.policy_loading import count_parameters

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


def teacher_memory(source: TeacherSource) -> float:
    """Bytes of one copy of a teacher's weights; 0 where a server has them.

    An average is accumulated in float32 beside weights of another format.
    """
    if source.model.model_name_or_path is None:
        return 0.0
    count, weight = count_parameters(source.model).base, _BYTES[source.model.dtype]
    sums = _BYTES[Dtype.FLOAT32] if source.kind is TeacherKind.EMA and weight < _BYTES[Dtype.FLOAT32] else 0
    external, cache = source.external, 0.0
    if external is not None and external.engine is TeacherEngine.VLLM:
        cache = external.kv_cache_memory_gib * GIB
    return count * (weight + sums) + cache
