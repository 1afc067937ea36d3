"""Pieces of the chunked head's results: the most probable tokens over tiles, token tiles joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ray.algorithms.head.head_problem import HeadProblem, HeadResult, KeptTile


class TopTokens:
    """The K largest logits seen so far."""

    def __init__(self, problem: HeadProblem, top_k: int) -> None:
        self._k = min(top_k, problem.weight.shape[0])
        self.logits: Tensor | None = None
        """[C, K] in the unit they were given in, largest first."""
        self.ids: Tensor | None = None
        """[C, K]"""

    def fold(self, tile: Tensor, columns: slice) -> None:
        """Take in the logits [C, T] of one vocabulary tile."""
        logits, ids = tile.topk(min(self._k, tile.shape[1]), dim=-1)
        ids = ids + columns.start
        if self.logits is not None and self.ids is not None:
            logits, order = torch.cat((self.logits, logits), dim=-1).topk(
                min(self._k, self.logits.shape[1] + logits.shape[1]), dim=-1
            )
            ids = torch.cat((self.ids, ids), dim=-1).gather(1, order)
        self.logits, self.ids = logits, ids


def joined(parts: Sequence[HeadResult], kept: dict[tuple[int, int], KeptTile]) -> HeadResult:
    """The results of all token tiles as one."""

    def wanted(values: Sequence[Tensor | None]) -> Tensor | None:
        found = [value for value in values if value is not None]
        return None if not found else found[0] if len(found) == 1 else torch.cat(found)

    def whole(values: Sequence[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.cat(list(values))

    return HeadResult(
        logprobs=whole([part.logprobs for part in parts]),
        entropy=whole([part.entropy for part in parts]),
        log_total=whole([part.log_total for part in parts]),
        sum_squared_probs=wanted([part.sum_squared_probs for part in parts]),
        top1=wanted([part.top1 for part in parts]),
        top_ids=wanted([part.top_ids for part in parts]),
        top_logprobs=wanted([part.top_logprobs for part in parts]),
        mean_logprobs=wanted([part.mean_logprobs for part in parts]),
        support_logprobs=wanted([part.support_logprobs for part in parts]),
        kept=kept,
    )
