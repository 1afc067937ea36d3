"""Models and tokenizers that Python gave as objects, as folders that all actors can load: their weights travel once.

model, tokenizer --given_options--> options of the configuration
                 --write_given--> folder: config.json *.safetensors tokenizer*      (a PeftModel: adapter, base/)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_ray.config.sections import Dtype, ModelConfig, QuantType
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import ADAPTER_CONFIG
from trl_ray.models.generation_settings import mend_generation
from trl_ray.models.plain_saving import save_plain
from trl_ray.models.policy_loading import load_tokenizer

_BASE = "base"
_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab.", "merges.", "chat_template")


def is_model(given: object) -> bool:
    """Whether it is a model of transformers', with or without PEFT's wrapping."""
    return isinstance(given, PreTrainedModel) or _adapted(given) is not None


def _adapted(given: object) -> PreTrainedModel | None:
    """The model within a PeftModel; None for anything else."""
    if not hasattr(given, "peft_config") or not hasattr(given, "get_base_model"):
        return None
    base = given.get_base_model()
    return base if isinstance(base, PreTrainedModel) else None


def given_options(model: object) -> dict[str, Any]:
    """What a model as an object says of itself: the format of its weights, and whether it has an adapter.

    Raises:
        ModelError: it is no model that can be written down.
    """
    base = _adapted(model) or model
    if not isinstance(base, PreTrainedModel):
        raise ModelError(
            f"model must be a name, a folder, or a model of transformers or peft, got a {type(model).__name__}."
        )
    if getattr(base, "is_quantized", False):
        raise ModelError(
            "model must have its weights unpacked, got a quantised one. Give its name, with load_in_4bit=true or "
            "load_in_8bit=true and use_peft=true."
        )
    half = base.dtype is torch.bfloat16
    options: dict[str, Any] = {"dtype": Dtype.BFLOAT16 if half else Dtype.FLOAT32}
    return options if base is model else {**options, "use_peft": True}


def quantization_options(given: object) -> dict[str, Any]:
    """Options of `ModelConfig` that a `BitsAndBytesConfig` stands for.

    Raises:
        ModelError: it is none, or asks for what is not computed here.
    """
    if not isinstance(given, BitsAndBytesConfig):
        raise ModelError(
            f"quantization_config must be a transformers.BitsAndBytesConfig, got a {type(given).__name__}. Set "
            "load_in_4bit=true or load_in_8bit=true."
        )
    if given.llm_int8_enable_fp32_cpu_offload or given.llm_int8_skip_modules:
        raise ModelError(
            "quantization_config must leave llm_int8_skip_modules and llm_int8_enable_fp32_cpu_offload alone, got "
            f"{given.llm_int8_skip_modules} and {given.llm_int8_enable_fp32_cpu_offload}. Remove them."
        )
    if given.load_in_4bit and given.bnb_4bit_compute_dtype is torch.float16:
        raise ModelError(
            "quantization_config must have bnb_4bit_compute_dtype bfloat16 or float32, got float16, which is not "
            "trained in here. Set torch.bfloat16."
        )
    return {
        "load_in_4bit": given.load_in_4bit,
        "load_in_8bit": given.load_in_8bit,
        "bnb_4bit_quant_type": QuantType(given.bnb_4bit_quant_type),
        "use_bnb_nested_quant": given.bnb_4bit_use_double_quant,
    }


def write_given(folder: Path, *, model: object, tokenizer: object | None, options: ModelConfig | None = None) -> None:
    """Write what was given to a folder that loads as a model's name would.

    Args:
        folder: made; replaced where it exists.
        model: an object, or a name or folder, whose files are then linked.
        tokenizer: None takes the one that the model came with.
        options: of the model, where it is a name.

    Raises:
        ModelError: a processor or another object instead of a tokenizer, or no tokenizer can be found.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = getattr(tokenizer, "tokenizer", None)
        raise ModelError(
            f"processing_class must be a tokenizer, got a {type(tokenizer).__name__}: models read text alone. "
            + ("Give its tokenizer: processing_class=processor.tokenizer." if inner is not None else "")
        )
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, str):
        _link_files(model, folder, options)
    else:
        _write_model(model, folder)
    found = tokenizer if tokenizer is not None else _tokenizer_of(model)
    found.save_pretrained(folder)
    if (folder / _BASE).is_dir():
        found.save_pretrained(folder / _BASE)


def _write_model(model: Any, folder: Path) -> None:
    base = _adapted(model)
    mend_generation(model if base is None else base)
    if base is None:
        save_plain(model, folder)
        return
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in base.state_dict().items()
        if "lora_" not in name and ".modules_to_save." not in name
    }
    weights = {name.replace(".original_module.", "."): tensor for name, tensor in weights.items()}
    save_plain(base, folder / _BASE, weights=weights)
    save_plain(model, folder)
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": str(folder / _BASE), "revision": None}
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _link_files(name: str, folder: Path, options: ModelConfig | None) -> None:
    """Everything but the tokenizer, without copying."""
    source = Path(name).expanduser()
    if not source.is_dir():
        revision = options.model_revision if options is not None else None
        try:
            source = Path(snapshot_download(name, revision=revision))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            raise ModelError(f"the model {name} must be there, but: {str(error).splitlines()[0]}") from error
    for file in source.iterdir():
        target = folder / file.name
        if not file.name.startswith(_TOKENIZER_FILES) and not target.exists():
            os.symlink(file.resolve(), target)


def _tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the place a model was loaded from, as TRL takes it."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ModelError(
            "processing_class must be given with a model that was not loaded from a folder or the hub. Pass the "
            "tokenizer as processing_class."
        )
    return load_tokenizer(ModelConfig(model_name_or_path=name))
