"""KTO: a loss of single completions that were found good or bad, against a reference.

    x                   log-prob policy / reference of a completion, in nats
    kl                  how far the policy is from the reference on completions of other prompts; no gradient

    kto                 good: 1 - sigma(beta (x - kl))     bad: 1 - sigma(beta (kl - x))   https://arxiv.org/abs/2402.01306
    apo_zero_unpaired   good: 1 - sigma(beta x)            bad: sigma(beta x)              https://arxiv.org/abs/2408.06266

    before the update:  all mismatched completions --policy, reference, no gradient--> kl_estimate --> totals: kl

The KL stands in the loss of every completion, and a micro-batch sees only a few of the mismatched ones. So it belongs
to the totals of the update: a first pass without gradient over all micro-batches and ranks, and one number for all.
TRL takes one per micro-batch, over ranks; where the update is one micro-batch, the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trl_ray.algorithms.batches.labels import label_of, reference_logprobs
from trl_ray.algorithms.batches.sequences import TokenSequences, means_of
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.preference_options import UnpairedLossConfig
from trl_ray.types import Metric


class UnpairedLoss(FixedLoss):
    """`unpaired_loss` as the learner calls it; implements the `Loss` protocol.

    Totals: `kl`, the estimate of `kl_estimate` from a first pass; only kto reads it, and no loss can tell it of samples
    alone (`trl_ray.algorithms.batches.example_batches.mismatched_kl`).
    """

    def __init__(self, config: UnpairedLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        """Precomputed references stand in the labels."""
        return LossNeeds(reference=not self.config.precompute_ref_log_probs)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        desirable = [label_of(sample).desirable for sample in inputs.samples]
        assert None not in desirable, "every completion was found good or bad"
        return unpaired_loss(
            inputs.tokens,
            inputs.language,
            self.config,
            reference=reference_logprobs(inputs, ld_alpha=None),
            desirable=torch.tensor(desirable, dtype=torch.bool, device=inputs.logprobs.device),
            num_completions=inputs.totals.num_samples,
            kl=inputs.totals.named.get("kl"),
        )

    def joined(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """`rewards/margins`: the mean reward of good completions less that of bad ones, where there are both."""
        chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
        if chosen is None or rejected is None:
            return {}
        return {"rewards/margins": Metric(value=chosen.value - rejected.value)}


def mismatched(num_completions: int) -> list[int]:
    """Whose completion each of the prompts of an update gets for the estimate of the KL: its predecessor's, in a ring.

    Raises:
        AssertionError: there is only one, which would get its own; an update for KTO has two or more.
    """
    assert num_completions != 1, "a mismatched completion needs another one"
    return [(i - 1) % num_completions for i in range(num_completions)]


def kl_estimate(policy: Tensor, reference: Tensor) -> float:
    """max(0, mean(policy - reference)) in nats, from log-probs [M] of all mismatched completions of an update."""
    assert len(policy) == len(reference) > 0, "the estimate needs a completion, scored by both"
    mean = float((policy.detach().double() - reference.detach().double()).mean())
    return 0.0 if mean < 0 else mean  # and a NaN stays one


def unpaired_loss(
    tokens: TokenSequences,
    scores: TokenLogprobs,
    config: UnpairedLossConfig,
    *,
    reference: Tensor,
    desirable: Tensor,
    num_completions: int,
    kl: float | None,
) -> LossOutput:
    """The loss of a micro-batch of completions, with every option of `UnpairedLossConfig`.

    A NaN stays one, where TRL leaves it out of the mean: the learner must meet it.

    Metrics, which TRL calls the same: `rewards/chosen`, `rewards/rejected` (beta times the log-ratio), `logps/chosen`,
    `logps/rejected`, means over the completions of that kind; `entropy` over trained tokens; `kl` with kto. TRL's
    `rewards/margins` is the difference of two means over different completions; `UnpairedLoss.joined` takes it.

    Args:
        tokens: the N trained tokens of B completions.
        scores: [N] of the policy, with gradient.
        config: the options.
        reference: [B] sums over trained tokens of the reference's log-probs.
        desirable: [B] bool, True where a completion was found good.
        num_completions: of the whole update, over all micro-batches and ranks.
        kl: `kl_estimate` over all mismatched completions of the update, in nats; None only where it is not asked for.
    """
    logps = tokens.sums(scores.logprobs)
    ratios = logps - reference.detach()
    shift = 0.0
    if config.needs_kl:
        assert kl is not None, "kto needs an estimate of the KL"
        shift = kl
    # 1 - sigma(y) is sigma(-y).
    losses = torch.sigmoid(config.beta * torch.where(desirable, shift - ratios, ratios - shift))
    weighted = torch.where(desirable, config.desirable_weight * losses, config.undesirable_weight * losses)
    rewards = config.beta * ratios.detach()
    values = {
        "rewards/chosen": rewards[desirable],
        "rewards/rejected": rewards[~desirable],
        "logps/chosen": logps[desirable],
        "logps/rejected": logps[~desirable],
        "entropy": scores.entropy,
    }
    metrics = means_of(values)
    if config.needs_kl:
        metrics["kl"] = Metric(value=shift)
    return LossOutput(loss=weighted.sum() / max(num_completions, 1), metrics=metrics)
