"""A policy with an adapter as the plain model that engines know: W + scale B A, under the names of W.

W, A, B [, magnitude] --per layer--> merged W' (a new tensor; nothing that is trained is touched) --> engine, export
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import base_of_adapter, is_adapter_folder, task_of_adapter
from trl_ray.models.adapters.lora import TRAINED, has_adapter, lora_layers
from trl_ray.models.dropout import stated_dropout
from trl_ray.models.plain_saving import save_plain
from trl_ray.models.policy_loading import ends_with, load_policy, load_tokenizer, set_end_token
from trl_ray.models.scoring.classifier import load_classifier, load_classifier_tokenizer

Gather: TypeAlias = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes parameters whole while it is open, where they are split over ranks."""
_QUANTISED = frozenset({"Params4bit", "Int8Params"})
"""Parameters of bitsandbytes, which hold packed numbers."""

_NUM_LABELS = {"SEQ_CLS": 1, "TOKEN_CLS": 2}
"""Classes of models with an adapter, by PEFT's name of what they do."""


def _whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    del parameters
    return nullcontext()


@torch.no_grad()
def merged_weights(policy: PreTrainedModel, *, gather: Gather = _whole) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the plain model that computes what the policy computes.

    Names, shapes, dtypes and order are those of the plain model's `named_parameters`; tied ones appear once. Without an
    adapter these are the parameters themselves. LoRA (https://arxiv.org/abs/2106.09685): W' = W + s B A with
    s = alpha / r, or alpha / sqrt(r) in rsLoRA (https://arxiv.org/abs/2312.03732). DoRA
    (https://arxiv.org/abs/2402.09353): each row of W' is then scaled to the length in its magnitude. Quantised
    weights are dequantised first. Sums are made in float32 or better and rounded to the dtype of W.

    Args:
        policy: with or without an adapter.
        gather: opened around the parameters that one result needs.

    Yields:
        Name and tensor; the tensor is valid until the next one is asked for.
    """
    layers = lora_layers(policy) if has_adapter(policy) else {}
    for name, parameter in policy.named_parameters():
        owner, wrapped, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if wrapped and isinstance(layers[owner].get_base_layer(), nn.Linear | Conv1D) and leaf == "weight":
            layer = layers[owner]
            with gather(_factors(layer)):
                yield f"{owner}.{leaf}", _merge(layer)
        elif wrapped:
            adapter = _wrapper_of(leaf, owner, layers)
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            with gather([parameter] if adapter is None else [parameter, *_low_rank(adapter)]):
                yield plain, parameter.detach() if adapter is None else _merge_parameter(parameter, adapter)
        elif ".original_module." in name:
            owner, _, leaf = name.partition(".original_module.")
            wrapper: Any = policy.get_submodule(owner)
            trained: nn.Module = wrapper.modules_to_save[TRAINED]
            with gather([trained.get_parameter(leaf)]):
                yield f"{owner}.{leaf}", trained.get_parameter(leaf).detach()
        elif not _is_adapter(name, layers):
            with gather([parameter]):
                yield name, _plain(policy.get_submodule(name.rpartition(".")[0]), parameter)


def _wrapper_of(leaf: str, owner: str, layers: dict[str, Any]) -> Any | None:
    """The adapter of one parameter of a module; those of several are nested in each other."""
    found = [layers[owner]]
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
        found.append(layers[owner])
    return next((each for each in found if getattr(each, "parameter_name", None) == leaf), None)


def _low_rank(layer: Any) -> list[nn.Parameter]:
    return [layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight]


def _merge_parameter(parameter: nn.Parameter, wrapper: Any) -> Tensor:
    sums = torch.promote_types(parameter.dtype, torch.float32)
    merged: Tensor = parameter.detach().to(sums) + wrapper.get_delta_weight(TRAINED).to(sums)
    return merged.to(parameter.dtype)


def _is_adapter(name: str, layers: dict[str, Any]) -> bool:
    """A, B and magnitudes, and the copies of layers trained in full."""
    parts = name.split(".")
    return "modules_to_save" in parts or any(".".join(parts[:end]) in layers for end in range(1, len(parts)))


def _factors(layer: Any) -> list[nn.Parameter]:
    factors = [layer.get_base_layer().weight, *_low_rank(layer)]
    if TRAINED in layer.lora_magnitude_vector:
        factors.append(layer.lora_magnitude_vector[TRAINED].weight)
    return factors


def _plain(module: nn.Module, parameter: nn.Parameter) -> Tensor:
    """A frozen weight as it is, or about as it was before it was quantised."""
    if type(parameter).__name__ not in _QUANTISED:
        return parameter.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    weight: Tensor = dequantize_bnb_weight(parameter, state=getattr(module, "state", None))
    return weight.detach()


def _merge(layer: Any) -> Tensor:
    base = _plain(layer.get_base_layer(), layer.get_base_layer().weight)
    sums = torch.promote_types(base.dtype, torch.float32)
    merged: Tensor = base.to(sums) + layer.get_delta_weight(TRAINED).to(sums)
    if TRAINED in layer.lora_magnitude_vector:
        # Conv1D keeps its weight [in, out]; magnitudes are per output either way.
        inputs = 0 if getattr(layer, "fan_in_fan_out", False) else 1
        lengths = torch.linalg.norm(merged, dim=inputs, keepdim=True)
        magnitude = layer.lora_magnitude_vector[TRAINED].weight.to(sums)
        merged *= magnitude.reshape(lengths.shape) / lengths
    return merged.to(base.dtype)


def export_merged(adapter: str | Path, out: str | Path, *, model: ModelConfig | None = None) -> str:
    """Write an adapter's checkpoint as a plain model, for vLLM and for `from_pretrained`, tokenizer included.

    An adapter of a reward model or process reward model becomes a plain classifier.

    Args:
        adapter: a folder with adapter_config.json, e.g. ``step-N``.
        out: the folder to write to; made when missing.
        model: how to load the base model (dtype, remote code); None takes float32.

    Returns:
        `out`.

    Raises:
        ModelError: adapter or base model cannot be loaded, or `out` cannot be written.
    """
    if not is_adapter_folder(adapter):
        raise ModelError(
            f"an adapter folder must hold adapter_config.json, but {adapter} does not. Give a step-N folder."
        )
    base, revision = base_of_adapter(adapter)
    changes = {"model_name_or_path": base, "model_revision": revision or "main", "use_peft": True}
    config = (model or ModelConfig()).replace(**changes, gradient_checkpointing=False)
    num_labels = _NUM_LABELS.get(task_of_adapter(adapter) or "")
    if num_labels is None:
        policy = load_policy(config, path=str(adapter), trainable=False)
        tokenizer = load_tokenizer(config, path=str(adapter))
    else:
        policy = load_classifier(config, num_labels=num_labels, path=str(adapter), trainable=False)
        tokenizer = load_classifier_tokenizer(config, path=str(adapter))
    try:
        # Clones, because parameters that were not merged are still the policy's own.
        weights = {name: tensor.clone() for name, tensor in merged_weights(policy)}
        end = tokenizer.eos_token_id
        # An adapter may have been trained with another end of turns than its base model has.
        if isinstance(end, int) and not ends_with(policy, end):
            set_end_token(policy, end)
        with stated_dropout(policy):
            save_plain(policy, out, weights=weights)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise ModelError(
            f"the merged model must be written to {out}, but: {error}. Check space and permissions."
        ) from error
    return str(out)
