"""The trained tokens of several completions in one row, sums over them, and what a loss reports of them.

tokens [N] --sums--> completions [B]            means_of: {name: tensor} --one transfer--> {name: Metric}
TokenMetrics: add, add_by_sample, add_ratio --> sums on the device --metrics(): one transfer--> {name: Metric}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ray.algorithms.metric_merging import token_mean
from trl_ray.types import Metric, Reduce, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequences:
    """Which of B completions each of N trained tokens belongs to; tokens of a completion stand together, in order."""

    sample_index: Tensor
    """[N] int64, from 0 to B - 1; counts up."""
    num_sequences: int
    """B; a completion may have no tokens."""

    def sums(self, values: Tensor) -> Tensor:
        """Sums [B] by completion of token values [N]."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sample_index, values)

    def counts(self) -> Tensor:
        """[B] int64 trained tokens of each completion."""
        # Unlike a bincount it does not wait for the device.
        ones = torch.ones_like(self.sample_index)
        return self.sample_index.new_zeros(self.num_sequences).index_add(0, self.sample_index, ones)

    def positions(self) -> Tensor:
        """[N] int64, which trained token of its completion a token is; the first is 0."""
        counts = self.counts()
        starts = counts.cumsum(0) - counts
        return torch.arange(len(self.sample_index), device=self.sample_index.device) - starts[self.sample_index]

    def means(self, values: Tensor) -> Tensor:
        """Means [B] by completion of token values [N]; 0 where a completion has no tokens."""
        return self.sums(values) / self.counts().clamp(min=1)


def sequence_logprobs(logprobs: Tensor, tokens: TokenSequences, *, ld_alpha: float | None) -> Tensor:
    """Log-probs [B] of completions from those of tokens [N].

    With `ld_alpha`, tokens beyond the length of the pair's shorter completion count that much (LD-DPO,
    https://arxiv.org/abs/2409.06411), lengths being numbers of trained tokens.

    Args:
        logprobs: [N]
        tokens: with `ld_alpha`, of pairs, chosen and rejected in turn.
        ld_alpha: from 0 to 1; None: all tokens count alike.
    """
    if ld_alpha is None:
        return tokens.sums(logprobs)
    shared = tokens.counts().view(-1, 2).amin(dim=1).repeat_interleave(2)
    in_tail = tokens.positions() >= shared[tokens.sample_index]
    return tokens.sums(torch.where(in_tail, ld_alpha * logprobs, logprobs))


def means_of(values: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Means over all entries of tensors of numbers or truths, which leave the device together.

    A tensor without entries gives a mean of weight 0, which joining ignores.
    """
    if not values:
        return {}
    sums = torch.stack([value.detach().double().sum() for value in values.values()]).tolist()
    return {name: token_mean(total, value.numel()) for (name, value), total in zip(values.items(), sums, strict=True)}


class TokenMetrics:
    """Gathers what a loss reports of N tokens::

    metrics = TokenMetrics(tokens)
    metrics.add("entropy", entropy)
    metrics.metrics()  # {"entropy": Metric(value=0.7, weight=N)}
    """

    def __init__(self, tokens: TokenSequences) -> None:
        self._tokens = tokens
        self._means: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._ratios: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, name: str, values: Tensor, *, where: Tensor | None = None) -> None:
        """A mean over tokens [N], or over those that are True in `where` [N]."""
        # Sums stay on the device: asking for a number here would wait for it, once per metric.
        values = values.detach()
        if where is None:
            self._means[name] = (values.sum(), None)
        else:
            self._means[name] = (values.masked_fill(~where, 0).sum(), where.sum())

    def add_by_sample(self, name: str, values: Tensor) -> None:
        """A mean over completions that have tokens, of values [N] that are the same at all tokens of a completion."""
        counts = self._tokens.counts()
        # The value stands at every token of its completion; the shares of all its tokens add up to it once.
        shares = values.detach() / counts[self._tokens.sample_index]
        self._means[name] = (shares.sum(), (counts > 0).sum())

    def add_ratio(self, name: str, ratio: Tensor) -> None:
        """Mean, largest and effective sample size (as a share of the tokens) of importance ratios [N]."""
        wide = ratio.detach().double()  # the square of a large ratio leaves float32
        if wide.numel():
            self._ratios[name] = (wide.sum(), wide.max(), wide.square().sum())

    def metrics(self) -> dict[str, Metric]:
        """Everything that was added; waits for the device once."""
        count = self._tokens.sample_index.shape[0]
        scalars = [part for pair in self._means.values() for part in pair if part is not None]
        scalars += [part for triple in self._ratios.values() for part in triple]
        numbers = iter(torch.stack([scalar.double() for scalar in scalars]).tolist() if scalars else ())
        found: dict[str, Metric] = {}
        for name, (_, weight) in self._means.items():
            total = next(numbers)
            found[name] = token_mean(total, count if weight is None else next(numbers))
        for name in self._ratios:
            total, largest, squares = next(numbers), next(numbers), next(numbers)
            found[f"{name}/mean"] = token_mean(total, count)
            found[f"{name}/max"] = Metric(value=largest, reduce=Reduce.MAX)
            found[f"{name}/ess"] = Metric(value=total**2 / (count * squares) if squares else 0.0, weight=count)
        return found


def trained_tokens(samples: Sequence[TrainingSample]) -> int:
    """How many there are in all."""
    return sum(int(sample.loss_mask.sum()) for sample in samples)
