"""TRL's options that hold keyword arguments for a library: taken apart into the options that stand for them here.

model_init_kwargs={"dtype": "bfloat16"} --spread--> dtype="bfloat16"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class KeywordOptions:
    """What one such option may hold."""

    options: Mapping[str, str]
    """Our option by the library's name."""
    otherwise: str
    """What to do about any other name, as a sentence."""


MODEL_INIT_KWARGS = KeywordOptions(
    options=MappingProxyType(
        {
            "dtype": "dtype",
            "torch_dtype": "dtype",
            "attn_implementation": "attn_implementation",
            "revision": "model_revision",
            "trust_remote_code": "trust_remote_code",
        }
    ),
    otherwise="The run places the model itself (runtime), and quantises it by load_in_4bit or load_in_8bit. Remove it.",
)
GENERATION_KWARGS = KeywordOptions(
    options=MappingProxyType(
        {"min_tokens": "min_tokens", "min_new_tokens": "min_tokens", "stop": "stop", "stop_strings": "stop"}
    ),
    otherwise="temperature, top_p, top_k, min_p, repetition_penalty, max_completion_length and num_generations are "
    "options of their own; engines sample by nothing else. Remove it.",
)


def spread(values: Any, name: str, keywords: KeywordOptions) -> Any:
    """Put what a keyword option holds where our options are.

    Args:
        values: of a configuration, before they are validated.
        name: of the keyword option.
        keywords: what it may hold.

    Raises:
        ValueError: it holds an unknown name, or what another option says otherwise.
    """
    held = values.get(name) if isinstance(values, Mapping) else None
    if not held or not isinstance(held, Mapping):
        return values
    options = {key: value for key, value in values.items() if key != name}
    for key, value in held.items():
        option = keywords.options.get(key)
        if option is None:
            raise ValueError(
                f"{name} must hold nothing but {', '.join(keywords.options)}, got {key!r}. {keywords.otherwise}"
            )
        value = _as_option(option, value)
        if options.setdefault(option, value) != value:
            raise ValueError(
                f"{option} must be given once, got {options[option]!r} and {name}[{key!r}]={value!r}. Remove one of "
                "the two."
            )
    return options


def _as_option(option: str, value: Any) -> Any:
    """The libraries take one string for a list, and torch's number formats beside their names."""
    if option == "stop" and isinstance(value, str):
        return [value]
    return str(value).removeprefix("torch.") if option == "dtype" else value
