"""The options of an adapter: ours, PEFT's, and those in an adapter's folder.

ModelConfig --lora_config--> LoraConfig        LoraConfig --adapter_options--> options of ModelConfig
adapter_config.json --base_of_adapter--> the model it belongs to
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FROM_OPTIONS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Fields of LoraConfig and the options they are set by."""
_FURTHER = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "rank_pattern",
        "target_parameters",
    }
)
"""Fields that `lora_kwargs` may set."""
_BOOKKEEPING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "ensure_weight_tying",
        "runtime_config",
        "task_type",
    }
)
_REFUSED = {
    "trainable_token_indices": "trainable_token_indices must be left out. Set lora_modules_to_save=[embed_tokens, "
    "lm_head], which trains these rows among all.",
    "bias": "bias must be 'none': with biases trained there would be no reference beneath the adapter. Remove it.",
    "lora_bias": "lora_bias must be false: a bias of the adapter has no place in layers without one. Remove it.",
}
"""Fields that recipes hold and cannot be had, and what to do."""
_INITS = (True, False, "gaussian", "orthogonal")
"""Ways to draw A and B that leave the frozen weights alone; those that do not would move the reference."""


def require_peft() -> None:
    """Import PEFT, an optional dependency.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"use_peft=true needs the package peft, which cannot be imported: {error}. pip install trl-ray[peft]"
        ) from error


def is_adapter_folder(path: str | Path | None) -> bool:
    """True for a folder that holds an adapter rather than a whole model."""
    return path is not None and (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def base_of_adapter(folder: str | Path) -> tuple[str, str | None]:
    """Name (or folder) and revision of the model that an adapter was trained on.

    Raises:
        ModelError: its configuration cannot be read or names none.
    """
    file = Path(folder).expanduser() / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} must be an adapter's configuration, but: {error!r}. Copy the adapter again."
        ) from None
    if not name:
        raise ModelError(f"{file} must name its model under base_model_name_or_path, but names none. Add it there.")
    return str(name), revision


def task_of_adapter(folder: str | Path) -> str | None:
    """PEFT's name for what the model with this adapter does: CAUSAL_LM, SEQ_CLS, TOKEN_CLS; None where it is not said.

    Raises:
        ModelError: its configuration cannot be read.
    """
    return _said(folder, "task_type")


def require_lora(folder: str | Path) -> None:
    """Check that an adapter is of a kind that can be trained on.

    Raises:
        ModelError: it is not, or its configuration cannot be read.
    """
    kind = _said(folder, "peft_type")
    if kind != "LORA":
        raise ModelError(f"the adapter in {folder} must be LoRA or DoRA, but is {kind}. Merge it first.")


def _said(folder: str | Path, key: str) -> str | None:
    file = Path(folder).expanduser() / ADAPTER_CONFIG
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file} must be an adapter's configuration, but: {error!r}. Copy the adapter again."
        ) from None
    return None if value is None else str(value)


def adapter_size(folder: str | Path) -> int:
    """Parameters in an adapter's folder.

    Raises:
        ModelError: its weights cannot be read.
    """
    return sum(tensor.numel() for tensor in read_adapter_weights(Path(folder).expanduser()).values())


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Its tensors by PEFT's names.

    Raises:
        ModelError: they cannot be read.
    """
    try:
        weights: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"an adapter folder must hold {ADAPTER_WEIGHTS} as PEFT writes it, but {folder}: {type(error).__name__}: "
            f"{error}. Save the adapter again."
        ) from error
    return weights


def lora_config(model: ModelConfig) -> LoraConfig:
    """PEFT's configuration of a new adapter.

    Raises:
        ModelError: PEFT is missing, or `lora_kwargs` holds what cannot be used.
    """
    require_peft()
    import peft

    unknown = sorted(set(model.lora_kwargs) - _FURTHER)
    _refuse(unknown)
    if unknown:
        raise ModelError(
            f"lora_kwargs may hold {', '.join(sorted(_FURTHER))}, got {', '.join(unknown)}. Remove it; rank, alpha, "
            "dropout and modules have options of their own."
        )
    chosen = {field: getattr(model, option) for field, option in _FROM_OPTIONS.items()}
    if chosen["target_modules"] == ["all-linear"]:
        chosen["target_modules"] = "all-linear"  # PEFT knows the word only outside of a list
    try:
        config: LoraConfig = peft.LoraConfig(task_type="CAUSAL_LM", bias="none", **chosen, **model.lora_kwargs)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the adapter's options must be PEFT's, but: {error}. Check the lora_ options.") from error
    check_lora_config(config)
    return config


def adapter_options(peft_config: object) -> dict[str, Any]:
    """The options of `ModelConfig` that stand for a `peft.LoraConfig`, as TRL's trainers take one.

    Plain values, so that they travel between processes and a resolved configuration loads again to the same run.

    Raises:
        ModelError: it is no LoraConfig, or asks for what is not supported.
    """
    require_peft()
    import peft

    if type(peft_config) is not peft.LoraConfig:  # what builds on it computes something else
        raise ModelError(
            f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}. Other kinds of adapters cannot "
            "be merged into the weights that engines receive."
        )
    check_lora_config(peft_config)
    default = peft.LoraConfig()
    options = {option: _plain(getattr(peft_config, field)) for field, option in _FROM_OPTIONS.items()}
    further = {
        name: _plain(getattr(peft_config, name))
        for name in sorted(_FURTHER)
        if getattr(peft_config, name) != getattr(default, name)
    }
    return {"use_peft": True, **options, "lora_kwargs": further}


def _plain(value: Any) -> Any:
    """Sets, which PEFT makes of lists of names, as sorted lists."""
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value


def _refuse(names: Iterable[str]) -> None:
    for name in names:
        if name in _REFUSED:
            raise ModelError(_REFUSED[name])


def check_lora_config(config: LoraConfig) -> None:
    """Refuse what changes anything but linear layers and parameters of experts, or moves the frozen weights."""
    default = type(config)()
    known = _FROM_OPTIONS.keys() | _FURTHER | _BOOKKEEPING
    odd = [
        f.name for f in fields(config) if f.name not in known and getattr(config, f.name) != getattr(default, f.name)
    ]
    _refuse(odd)
    if odd:
        raise ModelError(
            f"an adapter may set {', '.join(sorted(_FROM_OPTIONS.keys() | _FURTHER))}, got {', '.join(odd)} too. "
            "Remove it: it cannot be merged into the weights that engines receive."
        )
    if config.init_lora_weights not in _INITS:
        raise ModelError(
            f"init_lora_weights must be one of {_INITS}, got {config.init_lora_weights!r}: it changes the frozen "
            "weights, which are the reference. Choose another."
        )
