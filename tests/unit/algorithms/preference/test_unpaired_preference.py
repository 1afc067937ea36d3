"""KTO: both losses at points worked out by hand, and where the estimate of the KL comes from."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossOutput
from trl_ray.algorithms.preference.unpaired_preference import (
    kl_estimate,
    mismatched,
    unpaired_loss,
)
from trl_ray.config.losses.preference_options import UnpairedLossConfig

LN3 = math.log(3)


def loss(desirable: list[bool], *, kl: float | None, num_completions: int = 1, **options: float | str) -> LossOutput:
    """Of completions of two tokens whose log-ratio to the reference is ln 3."""
    count = len(desirable)
    logprobs = torch.full((2 * count,), LN3 / 2 - 2, dtype=torch.float64, requires_grad=True)
    return unpaired_loss(
        TokenSequences(sample_index=torch.arange(count).repeat_interleave(2), num_sequences=count),
        TokenLogprobs(logprobs=logprobs, entropy=torch.zeros_like(logprobs)),
        UnpairedLossConfig(**{"beta": 1.0, **options}),
        reference=torch.full((count,), -4.0, dtype=torch.float64),
        desirable=torch.tensor(desirable),
        num_completions=num_completions,
        kl=kl,
    )


@pytest.mark.parametrize(
    ("kind", "kl", "good", "bad"),
    [
        ("kto", 0.0, 0.25, 0.75),
        ("kto", LN3, 0.5, 0.5),
        ("kto", 2 * LN3, 0.75, 0.25),
        ("apo_zero_unpaired", None, 0.25, 0.75),
    ],
)
def test_good_completions_gain_and_bad_ones_lose_against_the_kl(
    kind: str, kl: float | None, good: float, bad: float
) -> None:
    assert loss([True], kl=kl, loss_type=kind).loss.item() == pytest.approx(good)
    assert loss([False], kl=kl, loss_type=kind).loss.item() == pytest.approx(bad)


def test_weights_scale_each_kind_and_the_denominator_is_that_of_the_update() -> None:
    output = loss([True, False, True], kl=0.0, num_completions=10, desirable_weight=2.0, undesirable_weight=0.5)
    assert output.loss.item() == pytest.approx((2 * 2.0 * 0.25 + 0.5 * 0.75) / 10)


def test_metrics_are_means_over_each_kind() -> None:
    metrics = loss([True, False, True], kl=0.7, beta=0.5).metrics
    assert metrics["rewards/chosen"].value == pytest.approx(LN3 / 2)
    assert (metrics["rewards/chosen"].weight, metrics["rewards/rejected"].weight) == (2, 1)
    assert metrics["logps/rejected"].value == pytest.approx(LN3 - 4)
    assert metrics["kl"].value == 0.7
    only_good = loss([True], kl=None, loss_type="apo_zero_unpaired").metrics
    assert only_good["logps/rejected"].weight == 0
    assert "kl" not in only_good


def test_the_kl_is_the_mean_of_log_ratios_but_not_below_0() -> None:
    reference = torch.tensor([-4.0, -4.0])
    assert kl_estimate(torch.tensor([-3.0, -4.5]), reference) == 0.25
    assert kl_estimate(torch.tensor([-5.0, -3.5]), reference) == 0.0


def test_kto_asks_for_the_kl_of_the_update() -> None:
    with pytest.raises(AssertionError, match="estimate of the KL"):
        loss([True], kl=None)


def test_every_prompt_gets_the_completion_of_its_predecessor() -> None:
    assert mismatched(3) == [2, 0, 1]
    assert mismatched(0) == []
    with pytest.raises(AssertionError, match="another one"):
        mismatched(1)


def test_a_nan_stays_one() -> None:
    output = unpaired_loss(
        TokenSequences(sample_index=torch.tensor([0, 1]), num_sequences=2),
        TokenLogprobs(logprobs=torch.tensor([float("nan"), -1.0]), entropy=torch.zeros(2)),
        UnpairedLossConfig(),
        reference=torch.zeros(2),
        desirable=torch.tensor([True, False]),
        num_completions=2,
        kl=0.0,
    )
    assert math.isnan(output.loss.item())
    assert math.isnan(kl_estimate(torch.tensor([float("nan"), -1.0]), torch.zeros(2)))
