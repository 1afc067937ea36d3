"""From logits to sampled tokens, with log-probs of what is drawn from, or of the policy at the temperature.

    logits [B, V] -> min_tokens, repetition penalty -> temperature -> min-p, top-k, top-p -> log-softmax -> one draw
           `-------> temperature -> log-softmax -> the drawn token's log-prob with `policy_logprobs`

Every function works on B rows with parameters of their own. Order and meaning are vLLM's, so both engines sample
from the same distribution. B rows, V vocabulary.

*Which log-prob is a drawn token's?* Where sampling is reshaped (top-p, top-k, min-p, penalties, biases, bans, grammars)
tokens come from mu(a) = pi(a) w(a) / Z: pi is softmax(logits / temperature), which the learner scores, w what reshapes
it (0 or 1 of a filter), Z its mean under pi, which of a filter is the mass it keeps. A run whose options reshape asks
for log pi(a) (`policy_logprobs`) and not for log mu(a), as a ratio must compare one policy with itself, and with log mu
even fresh tokens have the ratio Z:

* with log pi the ratio is pi now / pi then. On fresh tokens it is 1, in any number format; Z and w cancel for as long
  as what is reshaped stays what it was. It is as exact over a whole completion as over a token, a token that leaves the
  nucleus has a ratio as any other, and heads of the learner, teachers and references are asked for nothing else than
  without filters. At the ratio 1 the gradient is E_mu[A d log pi] = E_mu[A d log mu] + E_mu[A d log Z]: that of the
  reward of what is sampled, and one that moves mass into what the filter keeps where things went better than expected,
  and out of it where they went worse: the usual price of filters.
* log mu on both sides would leave out the second term, but the learner would have to find the sampler's filter from
  logits of its own: rounding moves tokens over the edge, each with a jump of the ratio, and a drawn token that has left
  the nucleus has no log-prob at all, so that it must be kept against the definition.

TRL compares log mu of vLLM with log pi of the learner. A run that asks for nothing of the kind goes on asking for log
mu, so that sampling which is reshaped behind its back shows in every ratio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trl_ray.config.keywords.generation_fields import reshaping
from trl_ray.errors import DataError
from trl_ray.types import SamplingParams


def sample_seed(seed: int, index: int) -> int:
    """The 63-bit seed of sample `index` of a request: neighbouring requests and samples never share a stream."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_sampling(params: SamplingParams) -> None:
    """Check ranges before an engine sees them.

    Raises:
        DataError: a value is out of its range.
    """
    rules = {
        "max_tokens >= 1": params.max_tokens >= 1,
        "0 <= min_tokens <= max_tokens": 0 <= params.min_tokens <= params.max_tokens,
        "temperature >= 0": params.temperature >= 0,
        "0 < top_p <= 1": 0 < params.top_p <= 1,
        "top_k >= 0": params.top_k >= 0,
        "0 <= min_p <= 1": 0 <= params.min_p <= 1,
        "repetition_penalty > 0": params.repetition_penalty > 0,
        "stop strings are not empty": all(params.stop),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise DataError(f"sampling parameters must satisfy {', '.join(broken)}; given {params}. Change the config.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchSampling:
    """The sampling parameters of B rows, as columns."""

    temperature: torch.Tensor
    """[B, 1] 0 means greedy."""
    top_p: torch.Tensor
    """[B, 1]"""
    top_k: torch.Tensor
    """[B, 1] int64; V keeps all."""
    min_p: torch.Tensor
    """[B, 1]"""
    penalty: torch.Tensor
    """[B, 1] repetition penalty."""
    min_tokens: torch.Tensor
    """[B, 1] int64"""
    filters: bool
    """Whether any row uses top-k, top-p or min-p."""
    penalises: bool
    """Whether any row has a repetition penalty other than 1."""
    of_policy: torch.Tensor | None
    """[B, 1] bool: rows that want the policy's log-probs; None: none does."""

    @staticmethod
    def of(rows: Sequence[SamplingParams], *, vocab_size: int, device: torch.device) -> BatchSampling:
        """Stack the parameters of B rows."""

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return BatchSampling(
            temperature=column([row.temperature for row in rows]),
            top_p=column([row.top_p for row in rows]),
            top_k=column([min(row.top_k or vocab_size, vocab_size) for row in rows], torch.int64),
            min_p=column([row.min_p for row in rows]),
            penalty=column([row.repetition_penalty for row in rows]),
            min_tokens=column([row.min_tokens for row in rows], torch.int64),
            filters=any(row.top_p < 1 or row.top_k > 0 or row.min_p > 0 for row in rows),
            penalises=any(row.repetition_penalty != 1 for row in rows),
            of_policy=column([row.policy_logprobs for row in rows], torch.bool)
            if any(row.policy_logprobs for row in rows)
            else None,
        )


def reshapes(params: SamplingParams) -> bool:
    """Whether tokens are drawn from another distribution than that of logits and temperature."""
    filtered = params.top_p < 1 or params.top_k > 0 or params.min_p > 0
    return filtered or params.repetition_penalty != 1 or params.min_tokens > 0 or bool(reshaping(params.fields))


def policy_logprobs(logits: torch.Tensor, sampling: BatchSampling) -> torch.Tensor:
    """The policy's log-probs at the temperature of each row, whatever else sampling does.

    The operations are those of `processed_logprobs`: where nothing is reshaped these are its bits.

    Args:
        logits: [B, V] raw, any float dtype.
        sampling: parameters of the B rows.

    Returns:
        [B, V] float32 natural log-probs. Greedy rows: at temperature 1.
    """
    return torch.log_softmax(_cooled(logits.to(torch.float32, copy=True), sampling), dim=-1)


def _cooled(scores: torch.Tensor, sampling: BatchSampling) -> torch.Tensor:
    return scores / torch.where(sampling.temperature == 0, 1.0, sampling.temperature)


def processed_logprobs(
    logits: torch.Tensor,
    sampling: BatchSampling,
    *,
    lengths: torch.Tensor,
    stop_ids: torch.Tensor,
    seen: torch.Tensor | None,
    penalties: torch.Tensor | None = None,
    cut_off: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The log-probs a token is drawn from.

    Args:
        logits: [B, V] raw, any float dtype.
        sampling: parameters of the B rows.
        lengths: [B, 1] tokens generated so far.
        stop_ids: [E] end-of-sequence ids, barred until a row has `min_tokens` tokens.
        seen: [B, V] True for tokens of the prompt or the completion so far; needed when a row has a penalty.
        penalties: [B, V] taken from the logits after the repetition penalty.
        cut_off: the last thing done to scores [B, V], unless a row is greedy.

    Returns:
        [B, V] float32 natural log-probs, -inf where a filter removed a token. Greedy rows: at temperature 1.
    """
    scores = logits.to(torch.float32, copy=True)
    barred = (lengths < sampling.min_tokens).expand(-1, stop_ids.numel())
    scores[:, stop_ids] = scores[:, stop_ids].masked_fill(barred, -torch.inf)
    if sampling.penalises:
        assert seen is not None
        punished = torch.where(scores > 0, scores / sampling.penalty, scores * sampling.penalty)
        scores = torch.where(seen, punished, scores)
    if penalties is not None:
        scores = scores - penalties
    greedy = sampling.temperature == 0
    scores = _cooled(scores, sampling)
    if sampling.filters:
        scores = torch.where(greedy, scores, _filtered(scores, sampling))
    if cut_off is not None:
        scores = torch.where(greedy, scores, cut_off(scores))
    return torch.log_softmax(scores, dim=-1)


def _filtered(scores: torch.Tensor, sampling: BatchSampling) -> torch.Tensor:
    """Scores [B, V] with everything outside min-p, then top-k, then top-p set to -inf."""
    probabilities = torch.softmax(scores, dim=-1)
    floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
    scores = scores.masked_fill(probabilities < floor, -torch.inf)
    ordered, order = scores.sort(dim=-1, descending=True)
    smallest = ordered.gather(1, sampling.top_k - 1)
    ordered = ordered.masked_fill(ordered < smallest, -torch.inf)
    mass = torch.softmax(ordered, dim=-1)
    # A token stays when the mass before it is still below top_p, so the best token always stays.
    before = mass.cumsum(dim=-1) - mass
    ordered = ordered.masked_fill((before >= sampling.top_p) & (sampling.top_p < 1), -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ordered)


def draw(logprobs: torch.Tensor, sampling: BatchSampling, uniforms: torch.Tensor) -> torch.Tensor:
    """One token per row by inverting the cumulative distribution; the best token for greedy rows.

    Args:
        logprobs: [B, V] from `processed_logprobs`.
        sampling: parameters of the B rows.
        uniforms: [B, 1] float64 in [0, 1), one per row from the row's own generator.

    Returns:
        [B, 1] int64 ids.
    """
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # right=True skips the zero-width intervals of filtered tokens, which share their left neighbour's bound.
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    best = logprobs.argmax(dim=-1, keepdim=True)
    return torch.where(sampling.temperature == 0, best, drawn.clamp(max=logprobs.shape[-1] - 1))
