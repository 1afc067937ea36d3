"""Tells when a chat template ends turns with a token at which generation does not stop."""

from __future__ import annotations

from typing import Any

from trl_ray.config.sections import ModelConfig
from trl_ray.data.chat.training_templates import end_of_turn
from trl_ray.engines.checkpoint_facts import read_stop_ids
from trl_ray.models.policy_loading import find_source


def end_of_turn_warning(model: ModelConfig, tokenizer: Any) -> str | None:
    """What a user should know who trains conversations; None where all is well, or nobody can tell.

    Args:
        model: the policy.
        tokenizer: its, with the end token and the chat template of the configuration.
    """
    token = end_of_turn(tokenizer) if tokenizer.chat_template else None
    if token is None:
        return None
    source = find_source(model)
    if tokenizer.convert_tokens_to_ids(token) in read_stop_ids(source.base, tokenizer, revision=source.revision):
        return None
    return (
        f"The chat template ends a turn with {token!r}, and generation stops at {tokenizer.eos_token!r}, so that the "
        f"model will not stop where it learns to. Set eos_token={token!r}, which checkpoints keep."
    )
