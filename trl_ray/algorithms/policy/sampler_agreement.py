"""How far sampler and learner are apart on the tokens of an update, by the age of the tokens.

    LossInputs of a micro-batch [N] --add--> sums [ages, what] on the device --metrics: one transfer--> {name: Metric}

x is the learner's log-prob before the first update of the step less the sampler's, of one token. At age 0 both have
the same weights, and x is the difference of two computations of one number; at older ages the policy has moved. Of
each age, as ``agreement/age_<a>/...``:

    tokens     how many                       k3           mean of e^x - x - 1: KL(sampler || learner)
    abs_diff   mean |x|                       ratio        mean of w = e^x, and ratio_square that of w^2
    diff       mean x                         beyond_clip  share of tokens whose w is out of the loss's bounds
    doubt      mean of max(1 - p, 0.05), p the probability that the sampler gave to the token

`doubt` is what |x| is measured by: an error e of the logits moves the log-prob of a token by about e (1 - p), so that
a sure policy shows little of the same error. Beyond age `OLDEST` ages are joined.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.loss import LossInputs
from trl_ray.types import Metric, Reduce

PREFIX = "agreement/age_"
OLDEST = 8
LEAST_DOUBT = 0.05
_LARGEST_LOG_RATIO = 30.0
_MEANS = ("abs_diff", "diff", "k3", "ratio", "ratio_square", "beyond_clip", "doubt")


class SamplerAgreement:
    """Gathers the tokens of one update; those that were not sampled, or by weights of no known version, are left out.

    Args:
        version: of the learner's weights before the step.
        has_moved: whether earlier updates of the step have moved the weights; then only tokens whose log-probs of a
            first pass are known count.
        bounds: importance ratios beyond which a token counts as far off.
        device: of the tensors.
    """

    def __init__(
        self, *, version: int, has_moved: bool, bounds: tuple[float, float], device: torch.device | str
    ) -> None:
        self._version, self._has_moved, self._bounds = version, has_moved, bounds
        # A row more than there are ages: of tokens that do not count.
        self._sums = torch.zeros(OLDEST + 2, len(_MEANS) + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, inputs: LossInputs) -> None:
        """Take the tokens of a micro-batch; nothing where the learner has no log-probs, or the sampler has none."""
        sampler, old = inputs.tokens.sampler_logprobs, inputs.tokens.old_logprobs
        if inputs.scores is None or sampler is None or (self._has_moved and old is None):
            return
        mine = (inputs.logprobs.detach() if old is None else old).double()
        sampler = sampler.double()
        x = mine - sampler
        ratio = x.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
        low, high = self._bounds
        columns = [
            x.abs(),
            x,
            torch.expm1(x.clamp(max=_LARGEST_LOG_RATIO)) - x,
            ratio,
            ratio.square(),
            ((ratio < low) | (ratio > high)).double(),
            (1 - sampler.exp()).clamp(min=LEAST_DOUBT),
            torch.ones_like(x),
        ]
        self._sums.index_add_(0, self._ages(inputs).to(x.device), torch.stack(columns, dim=1))

    def _ages(self, inputs: LossInputs) -> Tensor:
        """[N] int64 rows of the sums."""
        parts = [
            np.full(int(sample.loss_mask.sum()), -1) if versions is None else versions[sample.loss_mask]
            for sample in inputs.samples
            for versions in [None if sample.is_label else sample.token_versions]
        ]
        versions = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        ages = self._version - versions
        counts = (versions >= 0) & (ages >= 0)
        return torch.from_numpy(np.where(counts, np.minimum(ages, OLDEST), OLDEST + 1))

    def metrics(self) -> dict[str, Metric]:
        """Those of every age that has tokens; waits for the device once."""
        found: dict[str, Metric] = {}
        for age, (*sums, count) in enumerate(self._sums[: OLDEST + 1].tolist()):
            if count:
                means = {
                    name: Metric(value=total / count, weight=count) for name, total in zip(_MEANS, sums, strict=True)
                }
                tokens = Metric(value=count, reduce=Reduce.SUM)
                found |= {f"{PREFIX}{age}/{name}": metric for name, metric in {"tokens": tokens, **means}.items()}
        return found
