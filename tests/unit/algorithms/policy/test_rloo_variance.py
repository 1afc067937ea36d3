"""Leave-one-out against plain REINFORCE on the same samples: both unbiased, and by how much the variance is smaller.

samples of a group --group_advantages--> A_i --> (1/G) sum_i A_i grad log pi(a_i)     the gradient one step would take

The exact problem is a coin. pi(1) = sigmoid(theta) = 1/2, so the score of an action is s = a - 1/2, and its reward is
r = b + a. The gradient of the expected reward is E[r s] = Var(a) = 1/4.

* REINFORCE, one sample: r s is (b + 1) / 2 or -b / 2, so its variance is ((b + 1)^2 + b^2) / 8 - 1/16, which is
  (2b + 1)^2 / 16, and that of the mean of G is (2b + 1)^2 / (16 G).
* Leave-one-out: (1/G) sum_i (r_i - mean of the others) s_i is the sample variance of the G coins. The variance of a
  sample variance is (mu_4 - sigma^4 (G - 3) / (G - 1)) / G, and mu_4 = sigma^4 = 1/16, which gives 1 / (8 G (G - 1)):
  the offset b does not enter.

The quotient is (2b + 1)^2 (G - 1) / 2: 13.5 for b = 1 and G = 4. It is 1/2 for b = 0 and G = 2: a baseline made of one
sibling costs more than it saves where rewards are small already.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tiny_models import random_model
from trl_ray.algorithms.policy.advantages import group_advantages
from trl_ray.config.losses.advantage_options import AdvantageBaseline, ScaleRewards

Reward = Callable[[int], float]


def moments(
    probabilities: np.ndarray, reward: Reward, *, size: int, baseline: AdvantageBaseline
) -> tuple[np.ndarray, float]:
    """Mean [K] and total variance of the estimator of the gradient by the K logits of a softmax, over all groups."""
    outcomes = list(itertools.product(range(len(probabilities)), repeat=size))
    weights = np.array([np.prod(probabilities[list(actions)]) for actions in outcomes])
    advantages = group_advantages(
        [[reward(action) for action in actions] for actions in outcomes], scale=ScaleRewards.NONE, baseline=baseline
    )
    scores = np.eye(len(probabilities)) - probabilities
    estimates = np.array(
        [values @ scores[list(actions)] / size for values, actions in zip(advantages.values, outcomes, strict=True)]
    )
    mean = weights @ estimates
    return mean, float(weights @ ((estimates - mean) ** 2).sum(axis=1))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("offset", [0.0, 1.0, -3.0])
def test_the_variance_of_both_estimators_for_a_coin(size: int, offset: float) -> None:
    coin = np.array([0.5, 0.5])
    # A softmax over two logits has the coin's gradient twice, with opposite signs: twice the variance in all.
    mean, plain = moments(coin, lambda a: offset + a, size=size, baseline=AdvantageBaseline.NONE)
    np.testing.assert_allclose(mean, [-0.25, 0.25], rtol=1e-12)
    assert plain / 2 == pytest.approx((2 * offset + 1) ** 2 / (16 * size), rel=1e-12)
    mean, left_out = moments(coin, lambda a: offset + a, size=size, baseline=AdvantageBaseline.LEAVE_ONE_OUT)
    np.testing.assert_allclose(mean, [-0.25, 0.25], rtol=1e-12)
    assert left_out / 2 == pytest.approx(1 / (8 * size * (size - 1)), rel=1e-12)
    assert plain / left_out == pytest.approx((2 * offset + 1) ** 2 * (size - 1) / 2, rel=1e-12)


def test_the_mean_of_the_whole_group_is_biased_where_leave_one_out_is_not() -> None:
    # 1 - 1/G of the gradient: each reward is a G-th of its own baseline.
    probabilities, rewards = np.array([0.2, 0.5, 0.3]), [1.0, -2.0, 4.0]
    expected = probabilities * (rewards - probabilities @ rewards)
    for baseline, factor in [
        (AdvantageBaseline.NONE, 1.0),
        (AdvantageBaseline.LEAVE_ONE_OUT, 1.0),
        (AdvantageBaseline.GROUP_MEAN, 0.75),
    ]:
        mean, _ = moments(probabilities, rewards.__getitem__, size=4, baseline=baseline)
        np.testing.assert_allclose(mean, factor * expected, rtol=1e-12)


def test_the_gradient_of_a_language_model_varies_less() -> None:
    """By the final norm's scale, from 200 groups of 4 completions of one prompt; rewards are 2 to 3."""
    size, groups, length = 4, 200, 3
    model, generator = random_model().double(), torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, 17, 200, 31]]).repeat(size * groups, 1)
    with torch.no_grad():
        for _ in range(length):
            probabilities = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        hidden = model.model(ids).last_hidden_state[:, -length - 1 : -1]
    sampled = ids[:, -length:]
    # One scale per sample, so that one backward pass gives the gradient of each.
    scale = torch.ones(len(ids), 1, hidden.shape[-1], dtype=torch.float64, requires_grad=True)
    logprobs = model.lm_head(hidden * scale).log_softmax(-1).gather(-1, sampled[..., None]).sum()
    scores = torch.autograd.grad(logprobs, scale)[0][:, 0].numpy().reshape(groups, size, -1)
    rewards = (2.0 + (sampled % 2).double().mean(1)).reshape(groups, size).tolist()

    def spread(baseline: AdvantageBaseline) -> float:
        advantages = np.stack(group_advantages(rewards, scale=ScaleRewards.NONE, baseline=baseline).values)
        return float(np.einsum("ng,ngh->nh", advantages, scores).var(axis=0, ddof=1).sum())

    # E[r^2] over Var(r) (1 + 1/(G - 1)) would be about 6.3 / (1/12 * 4/3) = 57 if rewards and scores had no relation.
    assert spread(AdvantageBaseline.NONE) / spread(AdvantageBaseline.LEAVE_ONE_OUT) > 20
