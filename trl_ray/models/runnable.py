"""Which architectures sampler and learner compute alike: proved ones, and why others are refused before a run starts.

    ModelConfig --> model type --> proved | refused, with a sentence | not proved yet: told, and watched at every step

`benchmarks/agreement_matrix.py` is the proof, with tiny random models: mean |difference| of sampled tokens at version
0 and after three updates, float32 and bfloat16, both engines.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from trl_ray.config.sections import EngineChoice, ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.policy_loading import load_model_config
from trl_ray.models.quantised_checkpoints import is_dequantised, quantisation_method

PROVED = frozenset(
    {
        "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm", "olmo",
        "olmo2", "olmo3", "granite", "cohere", "cohere2", "smollm3", "starcoder2", "falcon", "gpt2", "gpt_neox", "opt",
        "bloom", "glm4", "exaone4", "nemotron", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3",
        "granitemoe", "glm4_moe", "lfm2", "qwen3_next", "qwen3_5_text", "mamba", "mamba2", "falcon_h1",
        "recurrent_gemma", "deepseek_v2",
    }
)  # fmt: skip
"""Model types whose sampler and learner were seen to agree, on the engines that run them."""
PROVED_WITH_TRANSFORMERS = frozenset(
    {
        "apertus", "arcee", "bamba", "biogpt", "bitnet", "codegen", "cwm", "diffllama", "dots1", "ernie4_5",
        "ernie4_5_moe", "exaone_moe", "falcon_mamba", "flex_olmo", "gemma3n_text", "gemma4_text", "glm",
        "glm4_moe_lite", "gpt_bigcode", "gptj", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense",
        "hunyuan_v1_moe", "hyperclovax", "jamba", "jetmoe", "lfm2_moe", "llama4_text", "mimo_v2_flash", "minicpm3",
        "minimax", "minimax_m2", "ministral", "ministral3", "mpt", "nanochat", "nemotron_h", "olmo_hybrid",
        "persimmon", "qwen3_5_moe_text", "seed_oss", "solar_open", "vaultgemma", "xglm", "youtu",
    }
)  # fmt: skip
"""Those that were seen to agree on the transformers engine; on vLLM they have not been tried."""
_REFUSED: Mapping[str, str] = {
    "phimoe": "its routers draw experts by lot in training, so that what is trained is never what sampled",
    "cpmant": "the prompt embeddings that it sets before every text depend on what else is in the row",
    "hrm_text": "it repeats its layers so often that rounding alone makes them two policies",
    "moshi": "it is a model of speech, and its text decoder alone attends otherwise in rows of several sequences",
}
_FLOAT32_ALONE = frozenset({"deepseek_v4", "hy_v4", "xlstm"})
"""Model types that mix number formats in transformers, and cannot be computed in another than float32."""
_REFUSED_BY_VLLM: Mapping[str, str] = {
    "lfm2": "vLLM reads an option of its configuration (conv_dim) that transformers 5 does not write",
    "recurrent_gemma": "vLLM has no such model",
}
_REFUSED_BY_VLLM_ON_CPU: Mapping[str, str] = {
    "mamba": "vLLM has no kernel for its scan on a CPU",
}
_BF16_ON_CPU = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Model types whose linear attention vLLM computes in bfloat16 alone, on a CPU."""
_TIED = frozenset({"cohere", "cohere2"})
"""Model types whose head vLLM takes for the embedding, whatever the configuration says."""
_NEEDS_TORCHVISION = frozenset({"qwen3_5_text", "qwen3_5_moe_text"})
"""Model types whose module of vLLM reads images, too."""
_USE = "Set rollout.engine=transformers, or take another model."


def check_runnable(model: ModelConfig, engine: EngineChoice | str, *, on_gpu: bool = False, dtype: str = "") -> None:
    """Refuse a model that this engine and the learner are known to compute differently, or that it cannot run.

    Args:
        model: the policy.
        engine: vllm or transformers.
        on_gpu: whether the engine has one.
        dtype: of the engine.

    Raises:
        ModelError: why.
    """
    whole = load_model_config(model)
    config: Any = whole.get_text_config()
    kind = EngineChoice(engine)
    why = _why_quantised(quantisation_method(whole), kind)
    why = why or _why_not(config, kind, on_gpu=on_gpu, dtype=dtype or model.dtype.value)
    if why is not None:
        raise ModelError(f"sampler and learner must be one policy, but with a {config.model_type} {why}")


def unproved_notes(model: ModelConfig, engine: EngineChoice | str) -> tuple[str, ...]:
    """What to know of an architecture that nobody has proved on an engine."""
    kind, where = load_model_config(model).get_text_config().model_type, EngineChoice(engine)
    if kind in PROVED or (kind in PROVED_WITH_TRANSFORMERS and where is EngineChoice.TRANSFORMERS):
        return ()
    return (
        f"that sampler and learner compute the same is not proved for a {kind} on {where.value}; weight check and "
        "agreement check watch it. benchmarks/agreement_matrix.py is how it is proved.",
    )


def _why_quantised(method: str | None, engine: EngineChoice) -> str | None:
    if method is None:
        return None
    if not is_dequantised(method):
        return (
            f"the engine would keep the quantised weights of the files ({method}) and be sent plain ones. Take the "
            "model that is not quantised; load_in_4bit=true quantises it for the learner."
        )
    if engine is not EngineChoice.VLLM:
        return None
    return (
        f"vLLM would keep the quantised weights of the files ({method}) and be sent plain ones. Save the model once "
        "with plain weights: from_pretrained(..., quantization_config=...Config(dequantize=True)), or set "
        "rollout.engine=transformers."
    )


def _why_not(config: Any, engine: EngineChoice, *, on_gpu: bool, dtype: str) -> str | None:
    kind = config.model_type
    if kind in _REFUSED:
        return f"they are not: {_REFUSED[kind]}. Take another model."
    if kind in _FLOAT32_ALONE and dtype != "float32":
        return f"they cannot be computed in {dtype}, as it mixes number formats. Set dtype=float32."
    if engine is not EngineChoice.VLLM:
        return None
    if kind in _REFUSED_BY_VLLM:
        return f"they are not: {_REFUSED_BY_VLLM[kind]}. {_USE}"
    if kind in _NEEDS_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        return "vLLM needs torchvision, which is not installed. Install it, or set rollout.engine=transformers."
    if kind in _TIED and not config.tie_word_embeddings:
        return f"vLLM takes the embedding for the head, which is another here (tie_word_embeddings=false). {_USE}"
    if on_gpu:
        return None
    if kind in _REFUSED_BY_VLLM_ON_CPU:
        return f"they are not: {_REFUSED_BY_VLLM_ON_CPU[kind]}. {_USE}"
    if kind in _BF16_ON_CPU and dtype != "bfloat16":
        return f"vLLM needs bfloat16 on a CPU, got {dtype}. Set rollout.dtype=bfloat16, or rollout.engine=transformers."
    return None
