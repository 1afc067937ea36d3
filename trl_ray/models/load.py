"""Loading policies and tokenizers, and saying plainly why one cannot be used.

ModelConfig --> load_policy --> model with a checked head --> lm_head_of, hidden_states
            --> load_tokenizer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.errors import ModelError

Policy: TypeAlias = PreTrainedModel
_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16}
_WEIGHTS = ("*.safetensors", "*.bin")
# What transformers raises for a model it cannot build: SafetensorError and torch's loader are no OSErrors.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, SafetensorError)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype of a configured one."""
    return _DTYPES[dtype]


def check_model_path(name: str | None) -> str:
    """Check what can be checked of a model's name or folder without loading it.

    Raises:
        ModelError: no name, no such directory, or a directory without config.json or weights.
    """
    if not name:
        raise ModelError("model_name_or_path must name a model, got none. Set it to a local folder or a hub name.")
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            raise ModelError(f"model_name_or_path must exist, but there is no such directory: {name}. Check the path.")
        return name
    if not path.is_dir():
        raise ModelError(f"model_name_or_path must be a directory, but {name} is a file. Give the folder it lies in.")
    if not (path / "config.json").is_file():
        raise ModelError(
            f"a model directory must hold config.json, but {name} does not. Give a folder written by save_pretrained."
        )
    return str(path)


def load_policy(
    model: ModelConfig,
    *,
    path: str | None = None,
    device: torch.device | str = "cpu",
    disable_dropout: bool = True,
    trainable: bool = True,
) -> Policy:
    """Load a causal language model in the dtype whose weights are updated.

    Args:
        model: name or folder, revision, dtype, attention implementation, gradient checkpointing.
        path: a checkpoint to read the weights from instead of the model's own folder.
        device: where its weights live.
        disable_dropout: set every dropout probability to 0.
        trainable: False for a reference: frozen, and in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has a head this package cannot compute log-probs from.
    """
    name = check_model_path(path or model.model_name_or_path)
    if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in _WEIGHTS):
        raise ModelError(f"a model directory must hold weights (*.safetensors), but {name} has none. Save it again.")
    options: dict[str, Any] = {"dtype": torch_dtype(model.dtype), "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if not Path(name).is_dir():
        options["revision"] = model.model_revision
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except _LOAD_ERRORS as error:
        raise ModelError(_why_not(name, error)) from error
    policy, info = cast("tuple[Policy, dict[str, Any]]", loaded)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{name} must hold every weight of its model, but {len(missing)} are missing, first {missing[:3]}; they "
            "would be random. Save the model again or give another."
        )
    policy.config.use_cache = False
    if disable_dropout:
        switch_off_dropout(policy)
    if model.gradient_checkpointing:
        # Reentrant checkpointing would lose gradients, as the embeddings are the first to have one.
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    nn.Module.to(policy, device)
    policy.train(trainable)
    policy.requires_grad_(trainable)
    check_head(policy)
    return policy


def _why_not(name: str, error: BaseException) -> str:
    first_line = str(error).strip().split("\n")[0]
    if Path(name).is_dir():
        damaged = isinstance(error, SafetensorError) or "safetensors" in first_line.lower()
        hint = "A weight file is truncated or damaged: copy the model again." if damaged else "Check its config.json."
        return f"the model in {name} must load, but: {type(error).__name__}: {first_line}. {hint}"
    return (
        f"model_name_or_path must be a local directory or a model on the hub; {name} is no directory here, and the "
        f"hub gave: {type(error).__name__}: {first_line}. Check the name, or that the hub can be reached."
    )


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in modules and where attention keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (modules declare no such attribute)


def lm_head_of(model: Policy) -> tuple[Tensor, Tensor | None]:
    """Weight [V, H] and bias [V] (or None) of the language-model head.

    Raises:
        ModelError: the model has no linear head.
    """
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"the model must end in a linear head, but {type(model).__name__} ends in {type(head).__name__}. "
            "Use a causal language model."
        )
    return head.weight, head.bias


def hidden_states(model: Policy, **inputs: Tensor | None) -> Tensor:
    """Final hidden states [R, T, H], after the last norm and before the head."""
    states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def check_head(model: Policy) -> None:
    """Prove on two tokens that head(hidden states) are the model's logits.

    Some models scale or cap their logits after the head; log-probs computed from the head alone would be wrong.

    Raises:
        ModelError: they differ.
    """
    weight, bias = lm_head_of(model)
    training = model.training
    model.train(False)
    ids = torch.tensor([[1, 2]], device=weight.device)
    expected = model(input_ids=ids, use_cache=False).logits
    actual = torch.nn.functional.linear(hidden_states(model, input_ids=ids), weight, bias)
    model.train(training)
    if not torch.allclose(expected.float(), actual.float(), rtol=1e-2, atol=1e-3):
        raise ModelError(
            f"logits must be the head times the hidden states, but {type(model).__name__} changes them afterwards "
            "(soft-capping or a logit scale). Use a model without it."
        )


def has_plain_attention(model: Policy) -> bool:
    """True when every layer is full causal attention that takes a mask of ours."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        config._attn_implementation in {"sdpa", "eager"}
        and all(kind == "full_attention" for kind in kinds)
        and (window is None or hasattr(config, "layer_types"))
    )


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The model's own configuration, without its weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    name = check_model_path(model.model_name_or_path)
    options = {} if Path(name).is_dir() else {"revision": model.model_revision}
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=model.trust_remote_code, **options
        )
    except _LOAD_ERRORS as error:
        raise ModelError(f"the configuration of {name} must load, but: {_why_not(name, error)}") from error
    return config


def max_positions(model: ModelConfig) -> int | None:
    """Tokens a model allows in prompt plus completion; None where its configuration does not say.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    value = getattr(load_model_config(model).get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the model, counted without allocating them.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            load_model_config(model), trust_remote_code=model.trust_remote_code
        )
    return sum(parameter.numel() for parameter in empty.parameters())


def load_tokenizer(model: ModelConfig, *, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a padding token and, where configured, another chat template.

    Raises:
        ModelError: it cannot be loaded, has no end-of-sequence token, or the template file cannot be read.
    """
    name = check_model_path(path or model.model_name_or_path)
    options = {} if Path(name).is_dir() else {"revision": model.model_revision}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=model.trust_remote_code, **options
        )
    except _LOAD_ERRORS as error:
        raise ModelError(f"the tokenizer of {name} must load, but: {str(error).strip().split(chr(10))[0]}") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {name} must have an end-of-sequence token: completions could not end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"chat_template must be a readable file, got {model.chat_template}: {error}") from error
    return tokenizer
