"""Checkpoints whose weights are stored quantised: what can be trained of them, and how they become plain weights.

config.json, quantization_config ─┬─ fp8, mxfp4         ─► dequantised while loading, saved as plain weights
                                  ├─ bitsandbytes, LoRA ─► frozen beneath an adapter, where bitsandbytes is installed
                                  └─ others             ─► refused
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError

_DEQUANTISED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Methods whose weights transformers turns into plain ones while it loads."""
_BENEATH_ADAPTERS = "bitsandbytes"
"""The method whose layers adapters (models.adapters.lora) stand beside."""


def check_trainable(model: ModelConfig, config: PretrainedConfig, name: str) -> None:
    """Refuse what cannot be trained of a quantised checkpoint.

    Raises:
        ModelError: its weights cannot be dequantised, and are neither frozen nor of bitsandbytes, or that is missing.
    """
    stored = getattr(config, "quantization_config", None)
    method = quantisation_method(config)
    if method is None or method in _DEQUANTISED:
        return
    if method != _BENEATH_ADAPTERS:
        raise ModelError(
            f"{name} must have plain weights, or those of {', '.join(_DEQUANTISED)} or {_BENEATH_ADAPTERS}, and its "
            f"config.json says that they are quantised ({method}), which can neither be trained nor carry an adapter "
            "here. Take the model that is not quantised; load_in_4bit=true makes it as small beneath an adapter."
        )
    if not model.use_peft:
        raise ModelError(
            f"{name} must have plain weights where all of them are trained, and its config.json says that they are "
            f"quantised ({method}). Set use_peft=true to train an adapter beside them, or take the model that is not "
            "quantised."
        )
    try:
        quantizer: Any = cast(Any, AutoHfQuantizer).from_config(stored, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ModelError(
            f"{name} is quantised ({method}), and its weights must be readable here, but: {reason}. Install what it "
            "needs, or take the model that is not quantised."
        ) from error


def quantisation_method(config: PretrainedConfig) -> str | None:
    """How the weights that a configuration stands beside are quantised; None where they are plain."""
    return _method(getattr(config, "quantization_config", None))


def is_dequantised(method: str) -> bool:
    """Whether weights of this kind become plain ones while they are loaded."""
    return method in _DEQUANTISED


def dequantising(name: str, revision: str | None) -> Any:
    """How to load a checkpoint's weights as plain ones; None where they are, or where that cannot be done.

    Args:
        name: folder or hub name.
        revision: of a hub name.
    """
    stored = PretrainedConfig.get_config_dict(name, revision=revision)[0].get("quantization_config")
    kind = _DEQUANTISED.get(_method(stored) or "")
    if kind is None:
        return None
    kept = {key: value for key, value in dict(cast(Any, stored)).items() if key not in ("quant_method", "dequantize")}
    return cast(Any, kind)(**kept, dequantize=True)


def make_plain(policy: PreTrainedModel, dtype: torch.dtype) -> None:
    """Finish a dequantised model: all weights in one dtype, and nothing left that would quantise them again.

    Buffers stay as they are: a model's plain twin holds the frequencies of its positions in float32, too.
    """
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)
    _forget_quantisation(policy)


def _forget_quantisation(policy: PreTrainedModel) -> None:
    """Let a dequantised model be saved as the plain one that it is: transformers would quantise it again."""
    kept: list[Any] = []
    for step in getattr(policy, "_weight_conversions", None) or ():
        operations = getattr(step, "operations", None)
        if operations is None:
            kept.append(step)
            continue
        rest = [operation for operation in operations if not hasattr(operation, "hf_quantizer")]
        if len(rest) == len(operations):
            kept.append(step)
        elif rest:
            sources = [pattern for pattern in step.source_patterns if "scale" not in pattern]
            kept.append(
                WeightConverter(source_patterns=sources, target_patterns=list(step.target_patterns), operations=rest)
            )
    cast(Any, policy)._weight_conversions = kept or None


def _method(stored: Any) -> str | None:
    if stored is None:
        return None
    found = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if found is None and isinstance(stored, dict) and {"load_in_4bit", "load_in_8bit"} & set(stored):
        return "bitsandbytes"
    return None if found is None else str(getattr(found, "value", found))
