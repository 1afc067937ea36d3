"""Tiny random models of many architectures, for proofs that sampler and learner compute the same.

    build_tiny_architecture(path, "mixtral") -> config.json, model.safetensors, tokenizer.json

Sizes are those of `tiny_models`. `ARCHITECTURES` has, by name, the model type of transformers and what its
configuration needs beside them; weights are drawn wide, so that wrong log-probs cannot hide.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tiny_models import MAX_POSITIONS, VOCAB_SIZE, build_tokenizer

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_PAIRED = ["sliding_attention", "full_attention"]
# Tied weights as wide as the others' would make one token certain: nothing to sample, and nothing to learn.
_GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "initializer_range": 0.05}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Sizes of latent attention that no kernel asks for; heads have no common size.
_SMALL_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": None,
    "num_key_value_heads": 4,
}
_HYBRID: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MAMBA: dict[str, Any] = {"state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 16}
# The sizes of DeepSeek's own models: kernels on CPUs know no others.
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
    "num_key_value_heads": 4,
}

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", {**_GEMMA, "sliding_window": 64, "layer_types": _PAIRED}),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window": 64, "layer_types": _PAIRED}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "stablelm": ("stablelm", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 64, "layer_types": _PAIRED}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "cohere": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere2": (
        "cohere2",
        {"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 64, "layer_types": _PAIRED},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "falcon": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 512, "head_dim": None},
    ),
    "gpt2": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}),
    # An option that the model does not have: transformers does not read it, vLLM does.
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "glm4": ("glm4", {"pad_token_id": 259}),
    "exaone4": ("exaone4", {"sliding_window": 64, "layer_types": _PAIRED}),
    "nemotron": ("nemotron", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": _PAIRED,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_EXPERTS,
            **_LATENT,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "glm4_moe": (
        "glm4_moe",
        {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": (
        "qwen3_next",
        {**_EXPERTS, **_LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
    "qwen3_5": ("qwen3_5_text", _LINEAR),
    "mamba": ("mamba", {"state_size": 16, "intermediate_size": 256}),
    "mamba2": ("mamba2", {**_MAMBA, "intermediate_size": 256}),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16},
    ),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 128, "attention_window_size": 64}),
    "deepseek_v2": ("deepseek_v2", {**_EXPERTS, **_LATENT, **_ROUTED, "first_k_dense_replace": 1}),
    "jamba": (
        "jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
        },
    ),
    "bamba": ("bamba", {**_HYBRID, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_HYBRID, **_LOCAL, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **_ROUTED,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "llama4": (
        "llama4_text",
        {**_LOCAL, "intermediate_size_mlp": 128, "attention_chunk_size": 64, "interleave_moe_layer_step": 1},
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **_GEMMA,
            "layer_types": _PAIRED,
            "sliding_window": 64,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **_GEMMA,
            "layer_types": _PAIRED,
            "sliding_window": 64,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 32,
        },
    ),
    "minicpm3": ("minicpm3", _SMALL_LATENT),
    "glm4_moe_lite": ("glm4_moe_lite", {**_EXPERTS, **_ROUTED, **_LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "lfm2_moe": (
        "lfm2_moe",
        {**_EXPERTS, "num_experts": 4, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
    ),
    "apertus": ("apertus", {"rope_parameters": _LLAMA3}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "biogpt": ("biogpt", {}),
    "codegen": ("codegen", {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16}),
    "cwm": ("cwm", {"rope_parameters": _LLAMA3, "sliding_window": 64, "layer_types": _PAIRED}),
    "diffllama": ("diffllama", {}),
    "dots1": (
        "dots1",
        {**_EXPERTS, **_ROUTED, "first_k_dense_replace": 1, "sliding_window": None, "n_shared_experts": 1},
    ),
    "exaone_moe": (
        "exaone_moe",
        {**_EXPERTS, "num_experts": 4, "sliding_window": 64, "layer_types": _PAIRED, "n_group": 1, "topk_group": 1},
    ),
    "falcon_mamba": ("falcon_mamba", {"state_size": 16, "intermediate_size": 256}),
    "falcon-7b": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "head_dim": None},
    ),
    "falcon-alibi": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "alibi": True, "bias": True, "head_dim": None},
    ),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("glm", {"pad_token_id": 259}),
    "gpt_bigcode": (
        "gpt_bigcode",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS, "n_inner": 128},
    ),
    "gptj": ("gptj", {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": MAX_POSITIONS}),
    "granitemoeshared": ("granitemoeshared", {**_LOCAL, "shared_intermediate_size": 64}),
    "helium": ("helium", {}),
    # Its layers are repeated many times: with weights as wide as the others' rounding alone would grow without bound.
    "hrm_text": ("hrm_text", {"initializer_range": 0.02}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("hyperclovax", {}),
    "jetmoe": ("jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 32}),
    "mimo_v2_flash": ("mimo_v2_flash", {**_EXPERTS, **_ROUTED, "sliding_window": 64, "layer_types": _PAIRED}),
    "minimax": ("minimax", {**_LOCAL, "layer_types": ["linear_attention", "full_attention"]}),
    "minimax_m2": ("minimax_m2", _LOCAL),
    "ministral": ("ministral", {"sliding_window": 64, "layer_types": _PAIRED}),
    "ministral3": ("ministral3", {"sliding_window": None}),
    "mpt": ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_POSITIONS}),
    "nanochat": ("nanochat", {}),
    "olmo_hybrid": (
        "olmo_hybrid",
        {**_LINEAR, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    ),
    "persimmon": ("persimmon", {"num_key_value_heads": None}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**_EXPERTS, **_LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "solar_open": ("solar_open", {**_EXPERTS, **_ROUTED, "n_shared_experts": 1}),
    "vaultgemma": ("vaultgemma", {**_GEMMA, "sliding_window": 64, "layer_types": _PAIRED}),
    "xglm": ("xglm", {"d_model": 128, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    "youtu": ("youtu", _LATENT),
    # Variations of options.
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 64}),
    "llama-padded": ("llama", {"vocab_size": 320}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "phi-normed": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "stablelm-normed": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {"num_key_value_heads": None, "use_parallel_residual": False}),
    "cohere-normed": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True, "use_qk_norm": True}),
}
"""By name: transformers' model type, and options beside the common ones; None leaves a common one out."""


def tiny_config(name: str) -> Any:
    """The configuration of an architecture."""
    model_type, options = ARCHITECTURES[name]
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 259,
    }
    dropped = {option for option in common if options.get(option, common[option]) is None}
    given = {option: value for option, value in {**common, **options}.items() if option not in dropped}
    return AutoConfig.for_model(model_type, **given)


def random_architecture(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny float32 causal language model with random weights; leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(name))
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms start at 0 and 1, and experts at whatever a model makes of them.
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.float().eval()


def build_tiny_architecture(path: str | Path, name: str, *, seed: int = 0) -> str:
    """Save a tiny random model with its tokenizer to `path` (made when missing); gives the path back."""
    logging.disable_progress_bar()
    random_architecture(name, seed=seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)
