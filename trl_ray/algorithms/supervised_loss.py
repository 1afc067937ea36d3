"""Supervised fine-tuning: a loss of tokens.

    nll   -log pi                                       with label smoothing e:  -(1 - e) log pi - e mean_v log pi_v
    dft   -sg(pi) log pi                                https://arxiv.org/abs/2508.05629      sg: without gradient

    loss = sum over tokens / trained tokens of the whole optimizer update

Every trained token has the same weight, in whatever micro-batch and on whichever rank it is. A mean of the
micro-batches' means would weigh tokens of short ones more.
"""

from __future__ import annotations

from torch import Tensor

from trl_ray.algorithms.batches.sequences import means_of
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.supervised_options import SupervisedLossConfig, SupervisedLossType


class SupervisedLoss(FixedLoss):
    """`supervised_loss` as the learner calls it; implements the `Loss` protocol."""

    def __init__(self, config: SupervisedLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        config = self.config
        return LossNeeds(
            top1=True, mean_logprobs=config.needs_mean_logprobs, embedding_noise=config.neftune_noise_alpha
        )

    def __call__(self, inputs: LossInputs) -> LossOutput:
        return supervised_loss(inputs.language, self.config, num_valid_tokens=inputs.totals.num_valid_tokens)


def supervised_loss(scores: TokenLogprobs, config: SupervisedLossConfig, *, num_valid_tokens: int) -> LossOutput:
    """The loss of a micro-batch of tokens, with every option of `SupervisedLossConfig`.

    A micro-batch without trained tokens has loss 0, with a gradient of 0.

    Metrics, means over trained tokens: `nll`, the plain negative log-likelihood, whatever the loss is; `entropy`; and
    `mean_token_accuracy`, where `top1` is given.

    Args:
        scores: [N] of the trained tokens, with gradient; whose they are does not matter. Label smoothing needs
            `mean_logprobs`.
        config: the options.
        num_valid_tokens: of the whole update, over all micro-batches and ranks.
    """
    values = {"nll": -scores.logprobs, "entropy": scores.entropy}
    if scores.top1 is not None:
        values["mean_token_accuracy"] = scores.top1
    loss = _token_losses(scores, config).sum() / max(num_valid_tokens, 1)
    return LossOutput(loss=loss, metrics=means_of(values))


def _token_losses(scores: TokenLogprobs, config: SupervisedLossConfig) -> Tensor:
    """[N]"""
    if config.loss_type is SupervisedLossType.DFT:
        return -scores.logprobs.detach().exp() * scores.logprobs
    smoothing = config.label_smoothing_factor
    if not smoothing:
        return -scores.logprobs
    assert scores.mean_logprobs is not None, "label smoothing needs mean log-probs over the vocabulary"
    return -(1 - smoothing) * scores.logprobs - smoothing * scores.mean_logprobs
