"""What a user should know of the model before a run starts, a sentence each."""

from __future__ import annotations

from typing import Any

from trl_ray.config.sections import ModelConfig
from trl_ray.models.policy_loading import knows_padding_token, load_model_config
from trl_ray.models.vocabulary import vocabulary_warning


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
