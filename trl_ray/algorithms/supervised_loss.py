"""Supervised fine-tuning: a loss of tokens.

    nll   -log pi                                       with label smoothing e:  -(1 - e) log pi - e mean_v log pi_v
    dft   -sg(pi) log pi                                https://arxiv.org/abs/2508.05629      sg: without gradient

    loss = sum over tokens / trained tokens of the whole optimizer update

Every trained token has the same weight, in whatever micro-batch and on whichever rank it is. A mean of the
micro-batches' means would weigh tokens of short ones more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trl_ray.algorithms.batches.sequences import means_of
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.supervised_options import SupervisedLossConfig, SupervisedLossType


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupervisedInputs:
    """The N trained tokens of a micro-batch; whose they are does not matter."""

    logprobs: Tensor
    """[N] of the policy, with gradient, in nats."""
    num_valid_tokens: int
    """Trained tokens of the whole update, over all micro-batches and ranks."""
    mean_logprobs: Tensor | None = None
    """[N] mean over the vocabulary of the log-probs at each token, with gradient; only label smoothing asks for it."""
    entropy: Tensor | None = None
    """[N] nats; None: it is not reported."""
    top1: Tensor | None = None
    """[N] bool, whether the token is the most probable one; None: accuracy is not reported."""


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
        scores = inputs.language
        given = SupervisedInputs(
            logprobs=scores.logprobs,
            num_valid_tokens=inputs.totals.num_valid_tokens,
            mean_logprobs=scores.mean_logprobs,
            entropy=scores.entropy,
            top1=scores.top1,
        )
        return supervised_loss(given, self.config)


def supervised_loss(inputs: SupervisedInputs, config: SupervisedLossConfig) -> LossOutput:
    """The loss of a micro-batch of tokens, with every option of `SupervisedLossConfig`.

    A micro-batch without trained tokens has loss 0, with a gradient of 0.

    Metrics, means over trained tokens: `nll`, the plain negative log-likelihood, whatever the loss is; `entropy` and
    `mean_token_accuracy`, where they are given.
    """
    values = {"nll": -inputs.logprobs}
    if inputs.entropy is not None:
        values["entropy"] = inputs.entropy
    if inputs.top1 is not None:
        values["mean_token_accuracy"] = inputs.top1
    loss = _token_losses(inputs, config).sum() / max(inputs.num_valid_tokens, 1)
    return LossOutput(loss=loss, metrics=means_of(values))


def _token_losses(inputs: SupervisedInputs, config: SupervisedLossConfig) -> Tensor:
    """[N]"""
    if config.loss_type is SupervisedLossType.DFT:
        return -inputs.logprobs.detach().exp() * inputs.logprobs
    smoothing = config.label_smoothing_factor
    if not smoothing:
        return -inputs.logprobs
    assert inputs.mean_logprobs is not None, "label smoothing needs mean log-probs over the vocabulary"
    return -(1 - smoothing) * inputs.logprobs - smoothing * inputs.mean_logprobs
