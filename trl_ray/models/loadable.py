"""Whether a learner could load a model, found without loading it: before a run directory or an actor is made.

ModelConfig --> folder, weight files, libraries --> the architecture on no device (torch's meta) --> head
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import require_lora
from trl_ray.models.adapters.lora import attach_adapter
from trl_ray.models.policy_loading import (
    LOAD_ERRORS,
    find_source,
    load_model_config,
    require_weights,
    torch_dtype,
)
from trl_ray.models.quantised_checkpoints import check_trainable
from trl_ray.models.scoring.classifier import AUTO_CLASSES, has_class_head
from trl_ray.models.scoring.head import head_module, logit_transform
from trl_ray.models.weight_files import check_shapes, read_shapes

_ENCODERS = frozenset({*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"})
"""Model types that see what comes after, unless their configuration says that they are decoders."""


def check_loadable(model: ModelConfig, *, num_labels: int | None = None) -> None:
    """Refuse what `load_policy` or `load_classifier` would refuse, as far as that is known without weights.

    Args:
        model: as for them.
        num_labels: of a classifier; None for a language model.

    Raises:
        ModelError: files are missing or damaged, a library is missing, or transformers has no such model.
    """
    source, config = find_source(model), load_model_config(model)
    require_weights(source.base)
    if source.adapter is not None:
        require_lora(source.adapter)
    shapes = read_shapes(source.base)
    _check_libraries(model)
    check_trainable(model, config, source.base)
    if num_labels is None:
        _check_decoder(source.base, config)
        auto: Any = AutoModelForCausalLM
    else:
        auto = AUTO_CLASSES[num_labels]
        has_class_head(source.base, config, num_labels)
    options: dict[str, Any] = {"dtype": torch_dtype(model.dtype), "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    with torch.device("meta"):
        try:
            empty = auto.from_config(config, **options)
        except LOAD_ERRORS as error:
            raise ModelError(_why_not(model, source.base, config, error)) from error
    if num_labels is None:
        head_module(empty)
        logit_transform(empty)
        if shapes is not None and getattr(config, "quantization_config", None) is None:
            check_shapes(source.base, shapes, empty)
    if model.use_peft and source.adapter is None:
        with torch.device("meta"):
            attach_adapter(empty, model, seed=0)


def _check_decoder(name: str, config: Any) -> None:
    """Tokens of a language model see what is before them, and nothing else."""
    written = getattr(config, "architectures", None) or ()
    is_encoder = config.model_type in _ENCODERS or any(each.endswith("ForMaskedLM") for each in written)
    # The flag alone does not tell: some decoders have it, and leave it false.
    is_decoder = getattr(config, "is_decoder", getattr(config, "causal", False))
    sees_all = is_encoder and not is_decoder and not config.is_encoder_decoder
    if config.is_encoder_decoder or sees_all:
        kind = "an encoder, which sees what comes after" if sees_all else "an encoder and a decoder"
        raise ModelError(
            f"model_name_or_path must name a decoder, got {name} of the type {config.model_type}, which is {kind}. "
            "Take a causal language model."
        )


def _check_libraries(model: ModelConfig) -> None:
    wanted = {
        "load_in_4bit=true": ("bitsandbytes", model.load_in_4bit),
        "load_in_8bit=true": ("bitsandbytes", model.load_in_8bit),
        "use_liger_kernel=true": ("liger_kernel", model.use_liger_kernel),
    }
    for option, (package, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ModelError(
                f"{option} needs the package {package.replace('_', '-')}, which is not installed. pip install "
                f"{package.replace('_', '-')}, or set it to false."
            )


def _why_not(model: ModelConfig, name: str, config: Any, error: BaseException) -> str:
    first_line = str(error).strip().split("\n")[0]
    if model.attn_implementation is not None and (isinstance(error, ImportError) or "attn" in first_line):
        return (
            f"attn_implementation={model.attn_implementation} must be there for {config.model_type}, but: "
            f"{first_line.rstrip('.')}. Install what it needs, or set attn_implementation=sdpa."
        )
    if hasattr(config, "vision_config"):
        return (
            f"model_name_or_path must name a model that reads text alone, got {name} of the type {config.model_type}, "
            "which reads images, too. Take its text model."
        )
    return f"the model {name} must be one that transformers can build, but: {type(error).__name__}: {first_line}"
