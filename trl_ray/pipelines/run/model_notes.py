"""What a user should know of the model before a run starts, a sentence each."""

from __future__ import annotations

from typing import Any

from trl_ray.config.sections import ModelConfig
from trl_ray.models.policy_loading import load_model_config
from trl_ray.models.vocabulary import vocabulary_warning


def model_notes(model: ModelConfig, tokenizer: Any) -> tuple[str, ...]:
    """Of the policy and its tokenizer."""
    rows = int(load_model_config(model).get_text_config().vocab_size)
    note = vocabulary_warning(tokenizer, rows)
    if note is None:
        return ()
    return (f"{note} Beside the adapter they are trained in full." if model.use_peft else note,)
