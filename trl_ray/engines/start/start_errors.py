"""Why an engine cannot start, in the names of the options that say so.

    what vLLM or torch raise, arguments --> which option, what was given, what to do --> ConfigError | ResourceError
                                            nothing that is known                    --> EngineError, on one line

What is wrong with options or memory is wrong at the next start, too: these are errors of the input, and end the run at
once. Messages have one line, as an actor's last line is what its run is told.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from trl_ray.config.messages import nearest
from trl_ray.errors import ConfigError, EngineError, ResourceError, TrlRayError

START_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)
"""What engines raise that do not start."""
OPTIONS: Mapping[str, str] = {
    "model": "model_name_or_path",
    "revision": "model_revision",
    "tokenizer_revision": "model_revision",
    "hf_overrides": "model_init_kwargs",
    "trust_remote_code": "trust_remote_code",
    "dtype": "rollout.dtype",
    "max_model_len": "rollout.max_model_len",
    "max_num_seqs": "rollout.max_num_seqs",
    "kv_cache_memory_bytes": "rollout.kv_cache_memory_gib",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "enforce_eager": "rollout.enforce_eager",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
}
"""Of ours, by the argument of vLLM that it becomes."""
_SPOKEN: Mapping[str, str] = {
    "tensor parallel size": "rollout.tensor_parallel_size",
    "model's max seq len": "rollout.max_model_len",
}
"""Options that vLLM's messages paraphrase."""
_TOO_LITTLE_CACHE = ("to serve at least one request", "no available memory for the cache blocks")
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "less than requested memory",
    "is less than desired gpu memory utilization",
    "larger than the total memory",
    "bad_alloc",
)
_UNEXPECTED = re.compile(r"EngineArgs\.__init__\(\) got an unexpected keyword argument '(\w+)'")
_LONGEST = re.compile(r"estimated maximum model length is (\d+)")
_GIB = 1 << 30


def start_error(
    name: str, error: BaseException, *, arguments: Mapping[str, Any] | None = None, given: Mapping[str, Any] = {}
) -> TrlRayError:
    """The error to raise in the place of another.

    Args:
        name: of the engine.
        error: what was raised.
        arguments: of vLLM; None for another engine.
        given: those of them that `rollout.engine_kwargs` states.
    """
    if isinstance(error, TrlRayError):
        return error
    text = _one_line(error)
    if arguments is not None:
        if (unexpected := _UNEXPECTED.search(text)) is not None:
            return _unknown_argument(unexpected.group(1))
        if any(sign in text.lower() for sign in _TOO_LITTLE_CACHE):
            return _too_little_cache(text, arguments, given)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        return _no_memory(name, text)
    if arguments is not None and isinstance(error, ValidationError):
        return _wrong_argument(error, given)
    if arguments is not None and (named := [key for key, value in given.items() if _is_about(text, key, value)]):
        return _unusable(named[0], given, text)
    return EngineError(f"{name} cannot start: {type(error).__name__}: {text}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(". ")


def _unknown_argument(name: str) -> ConfigError:
    from vllm.engine.arg_utils import EngineArgs

    guess = nearest(name, [field.name for field in dataclasses.fields(EngineArgs)])
    hint = f"Did you mean {guess!r}?" if guess else "Remove it."
    return ConfigError(f"rollout.engine_kwargs must hold arguments of vLLM's EngineArgs, got {name!r}. {hint}")


def _too_little_cache(text: str, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> ResourceError:
    found = _LONGEST.search(text)
    # One position of vLLM's is kept free.
    room = "none" if found is None else f"{max(int(found.group(1)) - 1, 0)} tokens"
    kept = arguments.get("kv_cache_memory_bytes")
    if kept is None:
        option, stated = "rollout.gpu_memory_utilization", f"{arguments.get('gpu_memory_utilization')}"
    elif "kv_cache_memory_bytes" in given:
        option, stated = "rollout.engine_kwargs.kv_cache_memory_bytes", f"{kept}"
    else:
        option, stated = OPTIONS["kv_cache_memory_bytes"], f"{kept / _GIB:.3g}"
    return ResourceError(
        f"the KV cache must hold one sequence of rollout.max_model_len={int(arguments['max_model_len']) - 1} tokens, "
        f"but has room for {room} with {option}={stated}. Raise {option}, or lower rollout.max_model_len."
    )


def _no_memory(name: str, text: str) -> ResourceError:
    return ResourceError(
        f"{name} must have memory for weights and KV cache, but: {text}. Lower rollout.kv_cache_memory_gib (on a CPU) "
        "or rollout.gpu_memory_utilization (on a GPU), rollout.max_num_seqs or rollout.max_model_len, set "
        "rollout.dtype=bfloat16, or end what else uses the memory."
    )


def _wrong_argument(error: ValidationError, given: Mapping[str, Any]) -> ConfigError:
    """The first problem that pydantic found in one of vLLM's configurations."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    what = " ".join(first["msg"].removeprefix("Value error, ").split()).rstrip(". ")
    if not place and not any(_is_spoken(what, value) for value in given.values()):
        return ConfigError(f"vLLM must accept its options, but: {_in_our_names(what, given)}. Correct them.")
    if not place:
        return _unusable(next(name for name, value in given.items() if _is_spoken(what, value)), given, what)
    return ConfigError(
        f"{_option(place, given)} must be what vLLM accepts, got {first['input']!r}: {what[:1].lower()}{what[1:]}. "
        "Correct it."
    )


def _unusable(name: str, given: Mapping[str, Any], text: str) -> ConfigError:
    return ConfigError(
        f"rollout.engine_kwargs.{name} must be what vLLM can start with, got {given[name]!r}: {text}. Correct it."
    )


def _option(argument: str, given: Mapping[str, Any]) -> str:
    inside = [name for name, value in given.items() if isinstance(value, Mapping) and argument in value]
    if argument not in given and inside:
        return f"rollout.engine_kwargs.{inside[0]}.{argument}"
    if argument in given or argument not in OPTIONS:
        return f"rollout.engine_kwargs.{argument}"
    return OPTIONS[argument]


def _in_our_names(text: str, given: Mapping[str, Any]) -> str:
    names = {name: _option(name, given) for name in (*OPTIONS, *given) if "_" in name}
    for word, option in (names | dict(_SPOKEN)).items():
        text = re.sub(rf"(?<![\w.]){re.escape(word)}(?!\w)", option, text)
    return text


def _is_spoken(text: str, value: Any) -> bool:
    return isinstance(value, str) and len(value) > 1 and value.lower() in text.lower()


def _is_about(text: str, name: str, value: Any) -> bool:
    """Whether a message speaks of an option, or of what it was set to."""
    return _is_spoken(text, value) or name in text or name.replace("_", " ") in text.lower()
