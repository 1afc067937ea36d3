"""Means over tokens or completions of a micro-batch, which leave the device together.

add, add_by_sample, add_ratio --> sums on the device --metrics(): one transfer--> {name: Metric}
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.metric_merging import token_mean
from trl_ray.types import Metric, Reduce


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
        values = values.detach()
        if where is None:
            self._means[name] = (values.sum(), None)
        else:
            self._means[name] = (values.masked_fill(~where, 0).sum(), where.sum())

    def add_by_sample(self, name: str, values: Tensor) -> None:
        """A mean over completions that have tokens, of values [N] that are the same at all tokens of a completion."""
        counts = self._tokens.counts()
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
