"""Tiny random reward models in the folders that transformers and PEFT write.

build_reward_model(path, labels=1) -> a sequence classifier      labels=2 -> a token classifier (process reward model)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from tiny_models import MAX_POSITIONS, VOCAB_SIZE, build_tokenizer

CLASSES: Mapping[int, Any] = {1: AutoModelForSequenceClassification, 2: AutoModelForTokenClassification}


def random_reward_model(*, labels: int = 1, seed: int = 0, pad: int | None = 259, num_labels: int | None = None) -> Any:
    """A tiny Qwen2 with a head; leaves the global random state as it was.

    Args:
        labels: 1 for a sequence classifier, 2 for a token classifier.
        seed: of its weights.
        pad: what its configuration takes for padding.
        num_labels: another number of labels than such a model should have.
    """
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=pad,
        num_labels=num_labels or labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = CLASSES[labels].from_config(config)
    return model.float().eval()


def build_reward_model(
    path: str | Path, *, labels: int = 1, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any
) -> str:
    """Save a tiny reward model with its tokenizer; the path as a string."""
    logging.disable_progress_bar()
    random_reward_model(labels=labels, **options).save_pretrained(path)
    (tokenizer or build_tokenizer()).save_pretrained(path)
    return str(path)
