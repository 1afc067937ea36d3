"""Supervised fine-tuning: losses of tokens by hand, and one weight for every token of the update."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.supervised_loss import supervised_loss
from trl_ray.config.losses.supervised_options import SupervisedLossConfig


def tokens(probabilities: list[float], *, mean_logprobs: float | None = None) -> TokenLogprobs:
    logprobs = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
    return TokenLogprobs(
        logprobs=logprobs,
        entropy=torch.zeros_like(logprobs),
        mean_logprobs=None if mean_logprobs is None else torch.full_like(logprobs, mean_logprobs),
    )


def test_the_likelihood_is_divided_by_the_tokens_of_the_update() -> None:
    loss = supervised_loss(tokens([0.5, 0.25]), SupervisedLossConfig(), num_valid_tokens=6).loss
    assert loss.item() == pytest.approx(3 * math.log(2) / 6)


def test_uneven_micro_batches_add_up_to_the_mean_over_all_tokens() -> None:
    config = SupervisedLossConfig()
    parts = [[0.5, 0.25, 0.125], [0.5]]
    loss = sum(supervised_loss(tokens(part), config, num_valid_tokens=4).loss.item() for part in parts)
    assert loss == pytest.approx(7 * math.log(2) / 4)  # a mean of means would be 1.5 ln 2


def test_dft_weighs_a_token_by_its_probability_without_gradient() -> None:
    scores = tokens([0.5, 0.25])
    loss = supervised_loss(scores, SupervisedLossConfig(loss_type="dft"), num_valid_tokens=2).loss
    assert loss.item() == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(4)) / 2)
    assert torch.autograd.grad(loss, scores.logprobs)[0].tolist() == pytest.approx([-0.25, -0.125])


def test_smoothing_spreads_a_share_of_the_label_over_the_vocabulary() -> None:
    config = SupervisedLossConfig(label_smoothing_factor=0.1)
    loss = supervised_loss(tokens([0.5], mean_logprobs=-3.0), config, num_valid_tokens=1).loss
    assert loss.item() == pytest.approx(0.9 * math.log(2) + 0.1 * 3.0)
    with pytest.raises(AssertionError, match="mean log-probs"):
        supervised_loss(tokens([0.5]), config, num_valid_tokens=1)


def test_nothing_trained_is_a_loss_of_0_with_a_gradient() -> None:
    output = supervised_loss(tokens([]), SupervisedLossConfig(), num_valid_tokens=0)
    output.loss.backward()
    assert output.loss.item() == 0
    assert output.metrics["nll"].weight == 0


def test_metrics_are_means_over_tokens_whatever_the_loss_is() -> None:
    scores = TokenLogprobs(
        logprobs=torch.tensor([0.5, 0.25]).log(),
        entropy=torch.tensor([1.0, 3.0]),
        top1=torch.tensor([True, False]),
    )
    metrics = supervised_loss(scores, SupervisedLossConfig(loss_type="dft"), num_valid_tokens=9).metrics
    assert metrics["nll"].value == pytest.approx(1.5 * math.log(2))
    assert (metrics["entropy"].value, metrics["entropy"].weight) == (2.0, 2)
    assert metrics["mean_token_accuracy"].value == 0.5
