"""Rows of embeddings and head for every token of the tokenizer, as TRL's `clone_chat_template` makes them.

tokenizer [of chat_template] --adopt_template--> template, its tokens, its end token
tokenizer --missing_rows--> rows to have, a multiple of 64 --add_rows--> embeddings, head [V', H]

New rows are drawn as transformers does, from the distribution of the old ones, with a seed of their own: all who load
the model get the same.
"""

from __future__ import annotations

import logging as levels
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from trl_ray.config.object_paths import is_template_text
from trl_ray.errors import ModelError

_MULTIPLE = 64
_SEED = 0
_GROWN = "_trl_ray_new_rows"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that its ids need: one more than the largest."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def missing_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> int | None:
    """How many rows an embedding with `rows` of them must get to have one for each token; None where it has."""
    needed = num_tokens(tokenizer)
    return None if needed <= rows else -(-needed // _MULTIPLE) * _MULTIPLE


def add_rows(model: PreTrainedModel, rows: int) -> None:
    """Make embeddings and head, and the vocabulary that the configuration states, `rows` long."""
    level = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)  # it explains how rows are drawn, once per model
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model.resize_token_embeddings(rows)
    finally:
        logging.set_verbosity(level)
    setattr(model, _GROWN, True)


def has_new_rows(model: PreTrainedModel) -> bool:
    """Whether embeddings and head got rows when the model was loaded, which nothing has trained yet."""
    return bool(getattr(model, _GROWN, False))


def vocabulary_warning(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """What to tell of a tokenizer that is longer than the embedding; None where it is not."""
    wanted = missing_rows(tokenizer, rows)
    if wanted is None:
        return None
    return (
        f"The tokenizer has ids up to {num_tokens(tokenizer) - 1}, the model {rows} rows: embeddings and head get "
        f"{wanted} (new ones from the distribution of the old), in checkpoints, too."
    )


def names_tokenizer(chat_template: str) -> bool:
    """Whether `chat_template` names a tokenizer, by folder or by name, rather than a template's file."""
    if is_template_text(chat_template):
        return False
    path = Path(chat_template).expanduser()
    if path.is_dir() or path.exists() or path.suffix in (".jinja", ".j2", ".txt"):
        return path.is_dir()
    return _HUB_NAME.fullmatch(chat_template) is not None


def template_text(chat_template: str) -> str:
    """The template that `chat_template` is, or that stands in the file that it names.

    Raises:
        ModelError: the file cannot be read.
    """
    if is_template_text(chat_template):
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat_template must be a template, a readable file or a tokenizer, got {chat_template}: {error}"
        ) from error


def adopt_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer the chat template of another, the tokens it was added, and its end token.

    Raises:
        ModelError: there is no such tokenizer, or it has no template.
    """
    loader: Any = AutoTokenizer
    try:
        other = loader.from_pretrained(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name)
        template = other.get_chat_template()
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"chat_template must be a template's file, or a tokenizer that has a template, got {name}: {first_line}"
        ) from error
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in other.added_tokens_decoder.values() if token.content not in known])
    tokenizer.chat_template = template
    if other.eos_token is not None:
        tokenizer.eos_token = other.eos_token
