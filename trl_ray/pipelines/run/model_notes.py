"""What a user should know of the model before a run starts, a sentence each."""

from __future__ import annotations

from typing import Any

from trl_ray.config.sections import ModelConfig
from trl_ray.models.policy_loading import load_model_config
from trl_ray.models.vocabulary import vocabulary_warning


def model_notes(model: ModelConfig, tokenizer: Any) -> tuple[str, ...]:
    """Of the policy and its tokenizer."""
    rows = int(load_model_config(model).get_text_config().vocab_size)
    notes = (vocabulary_warning(tokenizer, rows),)
    return tuple(note for note in notes if note is not None)
