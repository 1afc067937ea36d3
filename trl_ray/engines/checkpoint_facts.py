"""What an engine must know about a model before it loads one: stop ids, parameter names, the size of its KV cache.

model path -> config, tokenizer, generation config -> CheckpointFacts
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from trl_ray.engines.checkpoint_layout import CheckpointLayout, empty_model
from trl_ray.errors import ModelError
from trl_ray.models.policy_loading import positions_of
from trl_ray.models.scoring.head import body
from trl_ray.models.vocabulary import missing_rows
from trl_ray.models.weight_payload import build_manifest
from trl_ray.types import TensorEntry

_KV_MEMORY_FRACTION = 0.2
"""Of the machine's memory; the rest is for weights, activations and the neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """What both engines read from a model directory."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    """Sorted end-of-sequence ids of tokenizer and generation config."""
    vocab_size: int
    """Rows of the embedding, which may exceed the tokenizer's."""
    grown: bool
    """Whether these are more than the checkpoint has, as the tokenizer that was given needs them."""
    max_positions: int | None
    """Tokens of the longest sequence; None: its configuration does not say, as of state-space models."""
    manifest: tuple[TensorEntry, ...]
    """Names and shapes of all parameters; tied ones once. Dtypes are not binding."""
    kv_bytes_per_token: int
    layout: CheckpointLayout
    base_class: type[Any]
    """Of transformers, without the head."""
    text_section: str | None = None
    """Name of the part of the configuration that states the vocabulary; None where that is the whole."""
    is_recurrent: bool = False
    """Whether layers keep a state of their own (state spaces, linear attention, short convolutions)."""


def is_recurrent(model: Any) -> bool:
    """Whether what a model remembers is more than the keys and values of its tokens."""
    layers = DynamicCache(config=model.config).layers
    return bool(model._is_stateful) or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def stop_ids_of(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and the generation config's."""
    listed: Any = generation.eos_token_id if generation is not None else None
    ids = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    if isinstance(tokenizer.eos_token_id, int):
        ids.append(tokenizer.eos_token_id)
    return tuple(sorted(set(ids)))


def read_stop_ids(model: str, tokenizer: PreTrainedTokenizerBase, *, revision: str | None = None) -> tuple[int, ...]:
    """The same of a path or name, whose generation config is read."""
    try:
        generation = GenerationConfig.from_pretrained(model, **at_revision(revision))
    except OSError:  # Many checkpoints have none.
        generation = None
    return stop_ids_of(tokenizer, generation)


def at_revision(revision: str | None) -> dict[str, Any]:
    """The keyword by which transformers takes a revision; none for the default."""
    return {} if revision is None else {"revision": revision}


def kv_bytes_per_token(config: Any, dtype: str) -> int:
    """Bytes of key and value cache one token needs: 2 x layers x KV heads x head size x element size."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # no attention, and no keys
        return 0
    kv_heads = _largest(text, "num_key_value_heads") or heads
    head_size = _largest(text, "head_dim") or text.hidden_size // heads
    element = 4 if dtype == "float32" else 2
    return int(2 * text.num_hidden_layers * kv_heads * head_size * element)


def _largest(text: Any, name: str) -> int | None:
    """An option that some models state for each layer by itself; None where it is not stated."""
    owners = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    return max((value for owner in owners if (value := getattr(owner, name, None))), default=None)


def read_facts(
    model: str,
    *,
    dtype: str,
    trust_remote_code: bool,
    revision: str | None = None,
    eos_token: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config_changes: Mapping[str, Any] | None = None,
) -> CheckpointFacts:
    """Read config and tokenizer; the parameters are laid out on the meta device, so no weight is read.

    Args:
        model: path or name.
        dtype: of the KV cache.
        trust_remote_code: run code that comes with the model.
        revision: of a name; None is the main one.
        eos_token: ends a completion as well; None adds no token.
        tokenizer: takes the place of the model's own. Where it is longer, the vocabulary grows: only an engine that is
            fed weights may be given one. The model's own changes nothing, however long it is.
        config_changes: of the model's configuration.

    Raises:
        ModelError: the path or name cannot be read, or the tokenizer has no such token.
    """
    try:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **at_revision(revision)}
        config = AutoConfig.from_pretrained(model, **options, **(config_changes or {}))
        rows = None if tokenizer is None else missing_rows(tokenizer, config.get_text_config().vocab_size)
        if tokenizer is None:
            tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model, **options))
        section = _text_section(config)
        if rows is not None:
            config.get_text_config().vocab_size = rows
        skeleton = empty_model(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model must be a directory or hub name with config and tokenizer, but {model!r} cannot be read: {error}"
        ) from None
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ModelError(
                f"eos_token must be a token of the tokenizer of {model}, got {eos_token!r}. Take one of its."
            )
        tokenizer.eos_token = eos_token
    text = config.get_text_config()
    return CheckpointFacts(
        tokenizer=tokenizer,
        stop_ids=read_stop_ids(model, tokenizer, revision=revision),
        vocab_size=text.vocab_size,
        grown=rows is not None,
        max_positions=positions_of(text),
        manifest=build_manifest((name, parameter) for name, parameter in skeleton.named_parameters()),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        layout=CheckpointLayout.of(skeleton),
        base_class=type(body(skeleton)),
        text_section=section,
        is_recurrent=is_recurrent(skeleton),
    )


def _text_section(config: Any) -> str | None:
    text = config.get_text_config()
    return next((name for name, section in vars(config).items() if section is text), None)


def default_kv_bytes(facts: CheckpointFacts, *, max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """KV cache for `max_num_seqs` full-length sequences, at most a share of the memory, at least for one."""
    block_bytes = block_size * facts.kv_bytes_per_token
    blocks = math.ceil(max_model_len / block_size) + 1
    wanted = block_bytes * (blocks * max_num_seqs + 1)
    allowed = int(_KV_MEMORY_FRACTION * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(wanted, allowed), block_bytes * (blocks + 1))
