"""Where vLLM computes otherwise than transformers, and the arguments with which it does not.

    configuration of the model --> changes of it (`hf_overrides`), further arguments --> vLLM computes what learners do

Each was found by comparing both layer by layer with the same files (vLLM 0.32, transformers 5.19); the weight check
watches whether it still holds.
"""

from __future__ import annotations

from typing import Any

_SEES_ONE_MORE = frozenset({"cohere2"})
"""Model types whose sliding layers see `sliding_window` tokens before their own in vLLM, and that many with it in
transformers."""


def config_corrections(config: Any) -> dict[str, Any]:
    """Changes of a model's configuration for vLLM alone."""
    text = config.get_text_config()
    if text.model_type in _SEES_ONE_MORE and text.sliding_window is not None:
        return {"sliding_window": text.sliding_window - 1}
    return {}


def cpu_corrections(config: Any) -> dict[str, Any]:
    """Further arguments on a CPU.

    Latent attention rotates one part of queries and keys, [T, heads, D] and a slice of the latent, in place. vLLM's
    rotary kernel for CPUs takes both for [T, heads x D] without gaps, and rotates something else; its code in torch
    does not.
    """
    if not getattr(config.get_text_config(), "qk_rope_head_dim", None):
        return {}
    return {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
