"""What a user should know of the model before a run starts, a sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ray.config.keywords.generation_fields import reshaping, unknown_to
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.sections import Dtype, EngineChoice, GenerationConfig, ModelConfig, RolloutConfig
from trl_ray.engines.factory import resolve_engine_kind
from trl_ray.errors import ConfigError
from trl_ray.models.policy_loading import knows_padding_token, load_model_config
from trl_ray.models.vocabulary import vocabulary_warning

_LOGPROBS_MODE = "processed_logprobs"


def model_notes(model: ModelConfig, tokenizer: Any) -> tuple[str, ...]:
    """Of the policy and its tokenizer."""
    return (*_of_padding(model, tokenizer), *_of_rows(model, tokenizer))


def _of_padding(model: ModelConfig, tokenizer: Any) -> tuple[str, ...]:
    if model.pad_token is None or knows_padding_token(tokenizer, model):
        return ()
    return (
        f"pad_token={model.pad_token!r} is no token of the tokenizer, which keeps {tokenizer.pad_token!r}: nothing is "
        "padded in training, and checkpoints have that one.",
    )


def _of_rows(model: ModelConfig, tokenizer: Any) -> tuple[str, ...]:
    rows = int(load_model_config(model).get_text_config().vocab_size)
    note = vocabulary_warning(tokenizer, rows)
    if note is None:
        return ()
    return (f"{note} Beside the adapter they are trained in full." if model.use_peft else note,)


def sampling_notes(generation: GenerationConfig, rollout: RolloutConfig) -> tuple[str, ...]:
    """Of what completions are drawn from.

    Raises:
        ConfigError: the engine of the run does not know a field of `generation_kwargs`, or cannot give log-probs that
            the learner computes.
    """
    fields = generation.engine_fields
    kind = resolve_engine_kind(rollout.engine)
    wrong = unknown_to(kind.value, fields) if fields else None
    if wrong is not None:
        raise ConfigError(wrong)
    options = reshaping_options(generation)
    if kind is EngineChoice.VLLM:
        if rollout.engine_kwargs.get("logits_processors"):
            options = (*options, "rollout.engine_kwargs.logits_processors")
        _check_engine_kwargs(rollout.engine_kwargs, options)
    if not options:
        return ()
    return (
        f"{', '.join(options)}: completions are drawn from another distribution than the policy's at this temperature, "
        "whose log-probs they bear: ratios of fresh tokens are 1, and of what sampling leaves out nothing is learnt.",
    )


def _check_engine_kwargs(engine_kwargs: Mapping[str, Any], reshaping: Sequence[str]) -> None:
    """Refuse what keeps vLLM from giving the log-probs that the learner computes.

    Raises:
        ConfigError: another kind of log-probs is asked for, or drafts are sampled whose log-probs are reshaped.
    """
    mode = engine_kwargs.get("logprobs_mode", _LOGPROBS_MODE)
    if mode != _LOGPROBS_MODE:
        raise ConfigError(
            f"rollout.engine_kwargs.logprobs_mode must be {_LOGPROBS_MODE}, got {mode}: others leave the temperature "
            "out, or are no log-probs, and ratios would compare two distributions. Remove it."
        )
    if reshaping and engine_kwargs.get("speculative_config"):
        raise ConfigError(
            f"rollout.engine_kwargs.speculative_config must be left out with {', '.join(reshaping)}, got "
            f"{engine_kwargs['speculative_config']}: vLLM gives log-probs of drafted tokens after these alone, which "
            "no learner computes. Remove one of the two."
        )


def reshaping_options(config: GenerationConfig) -> tuple[str, ...]:
    """The options, numbers as ``name=value``, under which sampling is not that of the temperature alone."""
    asked = {
        "top_p": config.top_p < 1,
        "top_k": config.top_k > 0,
        "min_p": config.min_p > 0,
        "repetition_penalty": config.repetition_penalty != 1,
        "min_tokens": config.min_tokens > 0,
    }
    options = [f"{name}={getattr(config, name):g}" for name, is_asked in asked.items() if is_asked]
    return (*options, *reshaping(config.engine_fields))


def precision_notes(config: RolloutRunConfig) -> tuple[str, ...]:
    """Of number formats that differ between learner and engines, as bf16 alone leaves the weights, which engines have,
    in float32."""
    if not config.bf16 or config.dtype is not Dtype.FLOAT32 or config.rollout.dtype is not None:
        return ()
    return (
        "bf16 is of the learner's products alone: engines have the weights in float32, and compute in it. Set "
        "rollout.dtype=bfloat16 for half the memory and more speed, or rollout.dtype=float32 to keep it.",
    )
