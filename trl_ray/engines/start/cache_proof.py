"""Whether a model computes with padding on the left and a cache of keys and values what it computes with neither.

    plain     [a b c d e f]   [g h i j]
    batched   [a b c d e] f   [. . g h i] j      positions count tokens; the last token is read with the cache

Models that take no positions, or no mask, give something else without a word; so do those that return no cache.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import DynamicCache

from trl_ray.engines.checkpoint_facts import is_recurrent
from trl_ray.models.scoring.segment_attention import has_alibi, takes_positions

_LOG = logging.getLogger(__name__)
_LENGTHS = (6, 4)
_TOLERANCES = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Mean |difference| of log-probs in nats that rounding explains; what is read at wrong places is far beyond."""
_HALF_TOLERANCE = 0.2
_CANNOT = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError)
"""What models raise that do not take what is given to them."""


@torch.no_grad()
def keeps_cache(model: Any) -> bool:
    """Try it on two short sequences; where it is false, whole sequences must be read anew for every token."""
    if is_recurrent(model) or not _takes_places(model):
        return False
    rows = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(rows, (length,), generator=generator).tolist() for length in _LENGTHS]
    plain = torch.stack([_last(model(input_ids=_tensor(model, [text]), use_cache=False))[0] for text in texts])
    try:
        batched = _batched(model, texts)
    except _CANNOT as error:
        _LOG.info("%s reads whole sequences: %s: %s", type(model).__name__, type(error).__name__, error)
        return False
    difference = float((plain - batched).abs().mean())
    agrees = difference <= _TOLERANCES.get(model.dtype, _HALF_TOLERANCE)
    if not agrees:
        _LOG.warning("%s reads whole sequences: with a cache it is off by %.3g nats", type(model).__name__, difference)
    return agrees


def _takes_places(model: Any) -> bool:
    """Whether positions are given, or taken from the mask: of a few tokens in bfloat16 the numbers may not tell."""
    return takes_positions(model) or has_alibi(model)


def _batched(model: Any, texts: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, texts)) - 1
    padding = [longest - len(text) + 1 for text in texts]
    mask = _tensor(model, [[0] * left + [1] * (longest - left) for left in padding])
    output = model(
        input_ids=_tensor(model, [[0] * left + text[:-1] for left, text in zip(padding, texts, strict=True)]),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_select_indices(_tensor(model, list(range(len(texts)))))
    mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
    return _last(
        model(
            input_ids=_tensor(model, [[text[-1]] for text in texts]),
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
    )


def _last(output: Any) -> torch.Tensor:
    """[B, V] log-probs of the token after the last one."""
    return torch.log_softmax(output.logits[:, -1].float(), dim=-1)


def _tensor(model: Any, values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=model.device)
