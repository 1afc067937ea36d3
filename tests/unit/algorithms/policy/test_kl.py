"""Which gradient each estimate of the KL really has, by the exact mean over a vocabulary of three tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.policy.policy_terms import kl_estimate, kl_penalty
from trl_ray.config.losses.policy_options import KLEstimator

LOGITS = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.2, 0.5, 0.4], dtype=torch.float64), 0)
OTHER_SAMPLER = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)


def _mean_gradient(estimator: KLEstimator, *, old: Tensor | None, corrected: bool) -> Tensor:
    """By the logits [3], averaged over tokens drawn from the old policy (None: the policy itself)."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    old = logprobs.detach() if old is None else old
    kl = kl_estimate(logprobs, REFERENCE, estimator)
    if corrected:
        kl = kl_penalty(kl, torch.exp(logprobs - old), estimator)
    return torch.autograd.grad((old.exp() * kl).sum(), logits)[0]


def _true_gradient(*, reverse: bool) -> Tensor:
    """Of KL(policy || reference), or of KL(reference || policy)."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    forward = (REFERENCE.exp() * (REFERENCE - logprobs)).sum()
    return torch.autograd.grad((logprobs.exp() * (logprobs - REFERENCE)).sum() if reverse else forward, logits)[0]


@pytest.mark.parametrize("old", [None, OTHER_SAMPLER], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_with_the_ratio_the_mean_gradient_is_that_of_the_kl_whoever_drew_the_tokens(
    estimator: KLEstimator, old: Tensor | None
) -> None:
    torch.testing.assert_close(
        _mean_gradient(estimator, old=old, corrected=True), _true_gradient(reverse=True), rtol=1e-9, atol=1e-12
    )


def test_without_the_ratio_k2_has_the_gradient_of_the_kl_k1_none_and_k3_that_of_the_other_kl() -> None:
    mean = {estimator: _mean_gradient(estimator, old=None, corrected=False) for estimator in KLEstimator}
    torch.testing.assert_close(mean[KLEstimator.K2], _true_gradient(reverse=True))
    torch.testing.assert_close(mean[KLEstimator.K1], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(mean[KLEstimator.K3], _true_gradient(reverse=False))
    assert not torch.allclose(_true_gradient(reverse=True), _true_gradient(reverse=False), rtol=0.05)


@pytest.mark.parametrize("estimator", [KLEstimator.K1, KLEstimator.K3])
def test_k1_and_k3_are_the_kl_in_the_mean(estimator: KLEstimator) -> None:
    logprobs = torch.log_softmax(LOGITS, 0)
    exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    torch.testing.assert_close((logprobs.exp() * kl_estimate(logprobs, REFERENCE, estimator)).sum(), exact)


def test_k3_of_nearly_equal_log_probs_keeps_its_digits_in_float32() -> None:
    # x^2/2 + x^3/6 + x^4/24; e^x - x - 1 in float32 would be off by a tenth
    x = 3 * 2**-12
    found = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + x]), KLEstimator.K3)
    assert found.item() == pytest.approx(x**2 / 2 + x**3 / 6 + x**4 / 24, rel=1e-3)
