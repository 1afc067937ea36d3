"""Fields of `generation_kwargs` in the transformers engine: what they do to the logits of one row.

logits [V] --bias, bans--> [repetition penalty] --penalties--> [temperature, top-k, ...] --cut-offs--> log-softmax

Names that vLLM has mean what they mean there; the others are transformers' own processors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TypicalLogitsWarper,
)

_CUT_OFFS: Mapping[str, Any] = {
    "typical_p": lambda value: TypicalLogitsWarper(mass=float(value)),
    "epsilon_cutoff": lambda value: EpsilonLogitsWarper(epsilon=float(value)),
    "eta_cutoff": lambda value: EtaLogitsWarper(epsilon=float(value)),
}


class LogitRules:
    """What the fields of one request do; the same for all of its rows.

    Args:
        fields: of `generation_kwargs`, those that this engine knows.
        tokenizer: reads banned words.
        vocab_size: V.
        device: of the logits.

    Raises:
        ValueError: a field's value is of no use, or names a token that the model has not.
    """

    def __init__(
        self, fields: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device
    ) -> None:
        try:
            self._read(fields, tokenizer=tokenizer, vocab_size=vocab_size, device=device)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"generation_kwargs must hold values that the engine can use, got {dict(fields)}: {error}"
            ) from error

    def _read(
        self, fields: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device
    ) -> None:
        def known(name: str, tokens: Iterable[Any]) -> list[int]:
            return _known_tokens(name, tokens, vocab_size=vocab_size)

        self.stop_ids = frozenset(int(token) for token in fields.get("stop_token_ids", ()))
        # Beyond the vocabulary nothing ever stops, and nothing is to be barred.
        self._barred_stops = [token for token in self.stop_ids if 0 <= token < vocab_size]
        self._bias = torch.zeros(vocab_size, device=device)
        for token, bias in (fields.get("logit_bias") or {}).items():
            self._bias[known("logit_bias", [token])] += float(bias)
        allowed = fields.get("allowed_token_ids")
        if allowed is not None:
            barred = torch.ones(vocab_size, dtype=torch.bool, device=device)
            barred[known("allowed_token_ids", allowed)] = False
            self._bias[barred] = -torch.inf
        self._bias[known("suppress_tokens", fields.get("suppress_tokens", ()))] = -torch.inf
        self._first = known("begin_suppress_tokens", fields.get("begin_suppress_tokens", ()))
        self._presence = float(fields.get("presence_penalty", 0.0))
        self._frequency = float(fields.get("frequency_penalty", 0.0))
        spellings = _spellings(tokenizer, fields.get("bad_words", ()))
        self._words = [ids for ids in spellings if max(ids) < vocab_size]
        self._processors = _processors(fields, vocab_size=vocab_size)
        self._cut_offs = [make(fields[name]) for name, make in _CUT_OFFS.items() if name in fields]

    def before(self, logits: Tensor, *, prompt: Sequence[int], tokens: Sequence[int], min_tokens: int) -> Tensor:
        """Logits [V] with biases and bans, before any penalty."""
        scores = logits.float() + self._bias
        if not tokens and self._first:
            scores[self._first] = -torch.inf
        if len(tokens) < min_tokens and self._barred_stops:
            scores[self._barred_stops] = -torch.inf
        for *beginning, last in self._words:
            if not beginning or list(tokens[-len(beginning) :]) == beginning:
                scores[last] = -torch.inf
        return _run(self._processors, scores, [*prompt, *tokens])

    def penalties(self, tokens: Sequence[int]) -> Tensor:
        """What is taken from the logits [V] for tokens of the completion."""
        taken = torch.zeros_like(self._bias)
        if self._presence or self._frequency:
            for token, count in Counter(tokens).items():
                taken[token] = self._presence + self._frequency * count
        return taken

    def after(self, scores: Tensor, *, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Scores [V] of the distribution that is drawn from, with improbable tokens cut off."""
        return _run(self._cut_offs, scores, [*prompt, *tokens])


def _known_tokens(name: str, tokens: Iterable[Any], *, vocab_size: int) -> list[int]:
    ids = [int(token) for token in tokens]
    unknown = [token for token in ids if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"{name} must hold token ids of the model, 0 to {vocab_size - 1}, but has {unknown[0]}.")
    return ids


def _spellings(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[list[int]]:
    """Words as tokens, at the beginning of a text and after a space where these are as many, as vLLM bars them."""
    found = []
    for word in [words] if isinstance(words, str) else words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False)
        found.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return [ids for ids in found if ids]


def _processors(fields: Mapping[str, Any], *, vocab_size: int) -> list[Any]:
    def sequence(name: str, ids: Iterable[Any]) -> list[int]:
        return _known_tokens(name, ids, vocab_size=vocab_size)

    found: list[Any] = []
    if fields.get("no_repeat_ngram_size"):
        found.append(NoRepeatNGramLogitsProcessor(int(fields["no_repeat_ngram_size"])))
    if fields.get("bad_words_ids"):
        words = [sequence("bad_words_ids", ids) for ids in fields["bad_words_ids"]]
        found.append(NoBadWordsLogitsProcessor(words, eos_token_id=[]))
    if fields.get("sequence_bias"):
        given = fields["sequence_bias"]
        pairs = given.items() if isinstance(given, Mapping) else ((tuple(ids), bias) for ids, bias in given)
        biases: list[list[list[int] | float]] = [[sequence("sequence_bias", ids), float(bias)] for ids, bias in pairs]
        found.append(SequenceBiasLogitsProcessor(biases))
    return found


def _run(processors: Sequence[Any], scores: Tensor, ids: Sequence[int]) -> Tensor:
    if not processors:
        return scores
    history, row = torch.tensor([list(ids)], device=scores.device), scores[None]
    for processor in processors:
        row = processor(history, row)
    result: Tensor = row[0]
    return result
