"""Attention over a row that holds many sequences: each prompt with the completions that go on from it, no padding.

    row      [ p p p | a a | b b b | q q | d d ]       linear layers see one row of all tokens
    prompt   p -> p causal          q -> q causal
    body     a -> p a    b -> p b   d -> q d           keys of the prompt are used again, not computed again

It stands in for `sdpa`: calls without segments are passed on to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_ray.algorithms.batches.layout import AttentionKind, Segment

SEGMENT_ATTENTION = "trl_ray_segments"
"""The name of this attention in transformers' registry."""
QUERY_CHUNK = 256
"""Queries under one mask: the keys after the last of them are not looked at."""

_ALIBI = ("build_alibi_tensor", "build_mpt_alibi_tensor")
"""Methods of models that take distances from a mask of two axes, and no positions (Bloom, MPT)."""


def attention_kind(model: PreTrainedModel) -> AttentionKind:
    """What the model's attention, as far as its configuration says, can be told."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # Layers with a window see less than our masks and segments would let them.
    if any(kind != "full_attention" for kind in kinds) or (window is not None and not hasattr(config, "layer_types")):
        return AttentionKind.CAUSAL
    if has_alibi(model) or not takes_positions(model):
        return AttentionKind.CAUSAL
    implementation = str(config._attn_implementation)
    if implementation in {"sdpa", SEGMENT_ATTENTION} and getattr(model, "_supports_attention_backend", False):
        return AttentionKind.SEGMENTS
    if implementation in {"sdpa", "eager"}:
        return AttentionKind.MASKED
    return AttentionKind.RESTARTS if implementation.startswith("flash_attention") else AttentionKind.CAUSAL


def has_alibi(model: PreTrainedModel) -> bool:
    """Whether distances between tokens are counted in the mask."""
    base = getattr(model, "base_model", None)
    return bool(getattr(model.config.get_text_config(), "alibi", False)) or any(hasattr(base, name) for name in _ALIBI)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the places of tokens can be given: decoders of translation models count them by themselves (BART)."""
    unwrap = getattr(model, "get_base_model", None)  # of a model with an adapter, whose own arguments have no names
    forward = getattr(type(unwrap() if callable(unwrap) else model), "forward", None)
    return forward is None or "position_ids" in inspect.signature(forward).parameters


def heed_soft_cap(model: PreTrainedModel) -> None:
    """Have attention scores capped where the configuration says so: `sdpa` leaves the cap out, engines do not."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and str(config._attn_implementation) == "sdpa":
        model.set_attn_implementation("eager")


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' signature; query [1, heads, T, D], key and value [1, key heads, T, D].

    Returns:
        [1, T, heads, D]
    """
    if segments is None:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return output, None
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    attend = _attend_by_chunks if query.device.type == "cpu" else _attend_plainly
    # One split has one backward; a slice per segment would fill a gradient of the whole row for each of them.
    lengths = [length for segment in segments for length in (segment.prompt, *segment.bodies)]
    queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    outputs: list[Tensor] = []
    for segment in segments:
        first = len(outputs)
        prompt = queries[first], keys[first], values[first]
        outputs.append(scaled_dot_product_attention(*prompt, is_causal=True, **options))
        for place in range(first + 1, first + 1 + len(segment.bodies)):
            # Copying the prompt's keys is cheap beside computing them once per completion in every layer.
            known = torch.cat([prompt[1], keys[place]], dim=2), torch.cat([prompt[2], values[place]], dim=2)
            outputs.append(attend(prompt[0], queries[place], *known, options))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend_by_chunks(prompt: Tensor, body: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> Tensor:
    """A completion's queries under masks of their own; the CPU's fused kernel takes masks."""
    outputs, before = [], prompt.shape[2]
    for chunk in torch.split(body, QUERY_CHUNK, dim=2):
        end = before + chunk.shape[2]
        mask = torch.ones(chunk.shape[2], end, dtype=torch.bool, device=body.device).tril_(before)
        outputs.append(
            scaled_dot_product_attention(chunk, keys[:, :, :end], values[:, :, :end], attn_mask=mask, **options)
        )
        before = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend_plainly(prompt: Tensor, body: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> Tensor:
    """The prompt's queries once more before the completion's: fused kernels on GPUs are causal but take no masks."""
    queries = torch.cat([prompt, body], dim=2)
    output = scaled_dot_product_attention(queries, keys, values, is_causal=True, **options)
    return output[:, :, prompt.shape[2] :]


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
