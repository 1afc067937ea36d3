"""TRL's `generation_kwargs`: fields of vLLM's SamplingParams and of transformers' GenerationConfig.

{"top_p": 0.9, "presence_penalty": 1} --read_generation_kwargs--> top_p=0.9, generation_kwargs={"presence_penalty": 1}
                                                  what is left --> the engine (engines.logit_rules, engines.vllm)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.config.keywords.json_keywords import held_keywords
from trl_ray.config.messages import nearest

_VLLM, _TRANSFORMERS = "vllm", "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineField:
    """A field that engines take."""

    engines: tuple[str, ...] = (_VLLM, _TRANSFORMERS)
    """Those that know it."""
    reshapes: bool = True
    """Whether tokens are then drawn from another distribution than the learner scores."""
    instead: str = ""
    """What to do with the other engine, as a sentence."""


_ON_VLLM = EngineField(engines=(_VLLM,), instead="Set rollout.engine=vllm, or remove it.")
_ON_TRANSFORMERS = EngineField(engines=(_TRANSFORMERS,), instead="Set rollout.engine=transformers, or remove it.")
ENGINE_FIELDS: Mapping[str, EngineField] = {
    "presence_penalty": EngineField(),
    "frequency_penalty": EngineField(),
    "logit_bias": EngineField(),
    "allowed_token_ids": EngineField(),
    "bad_words": EngineField(),
    "stop_token_ids": EngineField(reshapes=False),
    "structured_outputs": _ON_VLLM,
    "thinking_token_budget": _ON_VLLM,
    "extra_args": _ON_VLLM,
    "repetition_detection": EngineField(engines=(_VLLM,), reshapes=False, instead=_ON_VLLM.instead),
    "skip_reading_prefix_cache": EngineField(engines=(_VLLM,), reshapes=False, instead="Remove it."),
    "no_repeat_ngram_size": _ON_TRANSFORMERS,
    "bad_words_ids": EngineField(engines=(_TRANSFORMERS,), instead="Set bad_words, the texts of these tokens."),
    "suppress_tokens": EngineField(
        engines=(_TRANSFORMERS,), instead="Set logit_bias to -100 for each of them, or rollout.engine=transformers."
    ),
    "begin_suppress_tokens": _ON_TRANSFORMERS,
    "sequence_bias": EngineField(engines=(_TRANSFORMERS,), instead="Set logit_bias, or rollout.engine=transformers."),
    "typical_p": _ON_TRANSFORMERS,
    "epsilon_cutoff": _ON_TRANSFORMERS,
    "eta_cutoff": _ON_TRANSFORMERS,
}
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "min_tokens": "min_tokens",
    "min_new_tokens": "min_tokens",
    "stop": "stop",
    "stop_strings": "stop",
}
"""Fields that options of ours stand for."""
_OTHER_NAMES = {
    "guided_decoding": "structured_outputs",
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_STOP_TOKENS = ("stop_token_ids", "eos_token_id")
_STRUCTURES = frozenset({"json", "regex", "choice", "grammar", "json_object", "structural_tag"})
_STRUCTURE_FIELDS = _STRUCTURES | {
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
}
_HAPPENS: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "n": (1,),
    "num_return_sequences": (1,),
    "detokenize": (True, False),
    "skip_special_tokens": (True,),
    "ignore_eos": (False,),
}
"""Values that ask for what happens anyway."""
_WITHOUT_EFFECT = frozenset(
    {
        "bos_token_id",
        "cache_implementation",
        "disable_compile",
        "include_stop_str_in_output",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "spaces_between_special_tokens",
        "transformers_version",
        "use_cache",
    }
)
"""Of how a library works or what it gives back, not of what is sampled."""
_OTHER = (
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind cache_config "
    "compile_config constraints continuous_batching_config decoder_start_token_id diversity_penalty dola_layers "
    "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty exponential_decay_length_penalty "
    "force_words_ids forced_bos_token_id forced_eos_token_id guidance_scale is_assistant length_penalty low_memory "
    "max_cache_len max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
    "num_beams penalty_alpha prefill_chunk_size prompt_lookup_num_tokens speculation_type target_lookbehind "
    "token_healing top_h use_mtp watermarking watermarking_config"
)
_PRIVATE = (
    "flat_logprobs logprob_token_ids logprobs output_kind output_text_buffer_length prompt_logprob_start "
    "prompt_logprob_token_ids prompt_logprobs routed_experts_prompt_start skip_clone stream_interval "
    "trace_decode_token_ids"
)
_RUNS = "The run asks engines for what it needs. Remove it."
_DECODED = "The run decodes completions itself. Remove it."
_SAMPLES = "Engines here draw single samples, and know no such field. Remove it."
_REFUSED: Mapping[str, str] = {
    "n": "Set num_generations.",
    "num_return_sequences": "Set num_generations.",
    "best_of": "Set num_generations.",
    "seed": "Every completion has a seed of its own, which follows from the option seed. Set that.",
    "max_length": "It counts the prompt, too. Set max_completion_length.",
    "min_length": "It counts the prompt, too. Set min_tokens.",
    "max_time": "Set max_completion_length; rollout.hang_deadline_s bounds the time.",
    "ignore_eos": "Set min_tokens to max_completion_length.",
    "do_sample": "The learner needs samples. Set temperature.",
    **dict.fromkeys(_PRIVATE.split(), _RUNS),
    **dict.fromkeys(("detokenize", "skip_special_tokens"), _DECODED),
    **dict.fromkeys(_OTHER.split(), _SAMPLES),
}


def read_generation_kwargs(values: Any) -> Any:
    """Put what `generation_kwargs` holds where our options are; it wins over them, as in TRL.

    Args:
        values: of a configuration, before they are validated.

    Returns:
        The same, with those fields left in `generation_kwargs` that only engines know.

    Raises:
        ValueError: a field is unknown, or cannot be had.
    """
    held = held_keywords(values, "generation_kwargs")
    if not held:
        return values
    read, left = dict(values), dict[str, Any]()
    for name, value in held.items():
        _read_field(str(name), value, read, left)
    _check_structure(left.get("structured_outputs"))
    read["generation_kwargs"] = left
    return read


def _read_field(name: str, value: Any, read: dict[str, Any], left: dict[str, Any]) -> None:
    if value is None or name in _WITHOUT_EFFECT or any(value is each for each in _HAPPENS.get(name, ())):
        return
    if name in _HAPPENS and not isinstance(value, bool) and value in _HAPPENS[name]:
        return
    if name in _OPTIONS:
        option = _OPTIONS[name]
        value = [value] if option == "stop" and isinstance(value, str) else value
        read[option] = 0 if option == "top_k" and value == -1 else value
    elif name in _STOP_TOKENS:
        # Any of them ends a completion, so those of both names count.
        left["stop_token_ids"] = [*left.get("stop_token_ids", []), *_token_ids(name, value)]
    elif name == "structured_outputs" or name in _OTHER_NAMES:
        other = _OTHER_NAMES.get(name, name)
        _put_structure(left, value if other == "structured_outputs" else {other: value}, name)
    elif name in ENGINE_FIELDS:
        left[name] = value
    else:
        raise ValueError(_why_not(name, value))


def _token_ids(name: str, value: Any) -> list[int]:
    ids = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        raise ValueError(
            f"generation_kwargs.{name} must be a token's id or a list of ids, got {value!r}. Write the numbers; texts "
            "that end a completion are the option stop."
        )
    return list(ids)


def _put_structure(left: dict[str, Any], structure: Any, name: str) -> None:
    if left.setdefault("structured_outputs", structure) != structure:
        raise ValueError(
            f"generation_kwargs must ask for one structure of completions, got {left['structured_outputs']!r} and "
            f"{name}={structure!r}. Remove one of the two."
        )


def _check_structure(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, Mapping) or len(_STRUCTURES & given.keys()) != 1 or not given.keys() <= _STRUCTURE_FIELDS:
        raise ValueError(
            f"generation_kwargs.structured_outputs must be a mapping with one of {', '.join(sorted(_STRUCTURES))}, got "
            f"{given!r}. Correct it."
        )


def _why_not(name: str, value: Any) -> str:
    if name in _REFUSED:
        return f"generation_kwargs cannot hold {name}={value!r}. {_REFUSED[name]}"
    known = [*_OPTIONS, *ENGINE_FIELDS, *_OTHER_NAMES, *_STOP_TOKENS, *_REFUSED, *_HAPPENS, *_WITHOUT_EFFECT]
    guess = nearest(name, known)
    hint = f"Did you mean {guess!r}?" if guess else "Remove it."
    return (
        f"generation_kwargs must hold fields of vLLM's SamplingParams or of transformers' GenerationConfig, got "
        f"{name!r}. {hint}"
    )


def unknown_to(engine: str, fields: Mapping[str, Any]) -> str | None:
    """Why an engine cannot have fields of `generation_kwargs`, and what to do; None where it can."""
    for name in fields:
        known = ENGINE_FIELDS[name]
        if engine not in known.engines:
            return (
                f"generation_kwargs.{name} must be left out with the engine {engine}, which has none. {known.instead}"
            )
    return None


def reshaping(fields: Mapping[str, Any]) -> list[str]:
    """Names of fields under which tokens are drawn from another distribution than the learner scores."""
    return [name for name in fields if ENGINE_FIELDS.get(name, EngineField()).reshapes]
