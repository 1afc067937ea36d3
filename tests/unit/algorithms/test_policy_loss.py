"""The policy objective with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trl_ray.algorithms.loss import LossInputs, SampleTokens, StepTotals, first_non_finite_sample
from trl_ray.algorithms.policy_loss import PolicyLoss
from trl_ray.config.sections import LossConfig

LN2 = math.log(2.0)


def _inputs(
    *,
    advantages: list[float],
    counts: list[int],
    logprobs: list[float] | None = None,
    sampler: list[float] | None = None,
    reference: list[float] | None = None,
    totals: StepTotals | None = None,
) -> LossInputs:
    """Samples of the given token counts; log-probs default to -1 everywhere."""
    n = sum(counts)
    repeats = torch.tensor(counts)
    return LossInputs(
        tokens=SampleTokens(
            sample_index=torch.repeat_interleave(torch.arange(len(counts)), repeats),
            sampler_logprobs=torch.tensor(sampler or [-1.0] * n),
            advantages=torch.repeat_interleave(torch.tensor(advantages), repeats),
            counts=repeats.float(),
        ),
        logprobs=torch.tensor(logprobs or [-1.0] * n, requires_grad=True),
        entropy=torch.full((n,), 0.5),
        reference_logprobs=None if reference is None else torch.tensor(reference),
        micro_batch_tokens=n,
        totals=totals or StepTotals(num_valid_tokens=n, num_samples=len(counts), num_micro_batches=1),
    )


def _loss(**options: Any) -> PolicyLoss:
    return PolicyLoss(config=LossConfig(**options), max_completion_length=10)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # samples of 1 and 3 tokens with advantages 2 and -1: token losses -2 and 1 1 1; the step has 8 tokens in
        # 4 samples and 2 micro-batches
        ("dapo", (-2 + 3) / 8),
        ("grpo", (-2 + 1) / 4),
        ("dr_grpo", (-2 + 3) / (4 * 10)),
        ("bnpo", (-2 + 3) / 4 / 2),
    ],
)
def test_aggregation_divides_by_totals_of_the_whole_step(loss_type: str, expected: float) -> None:
    totals = StepTotals(num_valid_tokens=8, num_samples=4, num_micro_batches=2)
    output = _loss(loss_type=loss_type)(_inputs(advantages=[2.0, -1.0], counts=[1, 3], totals=totals))
    assert output.loss.item() == pytest.approx(expected)


def test_a_masked_sample_counts_in_the_mean_over_samples() -> None:
    output = _loss(loss_type="grpo")(_inputs(advantages=[2.0, 5.0], counts=[2, 0]))
    assert output.loss.item() == pytest.approx(-2.0 / 2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, -1.3, 0.0, "clip/high"),
        (0.5, 1.0, -0.5, -0.5, None),
        (0.5, -1.0, 0.8, 0.0, "clip/low"),
        (1.5, -1.0, 1.5, 1.5, None),
        (1.1, 1.0, -1.1, -1.1, None),
    ],
)
def test_the_ratio_is_clipped_on_the_side_the_advantage_pushes_to(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: str | None
) -> None:
    objective = _loss(old_logprobs="sampler", epsilon=0.2, epsilon_high=0.3)
    inputs = _inputs(advantages=[advantage], counts=[1], logprobs=[-1.0 + math.log(ratio)])
    output = objective(inputs)
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert output.loss.item() == pytest.approx(loss)
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.item() == pytest.approx(gradient)
    assert {name for name in ("clip/low", "clip/high") if output.metrics[name].value} == ({clipped} - {None})


def test_against_the_policy_itself_the_ratio_is_1_and_the_gradient_that_of_the_log_prob() -> None:
    inputs = _inputs(advantages=[3.0], counts=[1], logprobs=[-0.3])
    output = _loss(vllm_importance_sampling_correction=False)(inputs)
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert output.loss.item() == pytest.approx(-3.0)
    assert inputs.logprobs.grad is not None and inputs.logprobs.grad.item() == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("mode", "clip_min", "weights"),
    [
        # ratios to the sampler: 2 4 | 0.5 0.5, products 8 | 0.25, bounds 3 and (in the second half) 0.4
        ("token_truncate", None, [2.0, 3.0, 0.5, 0.5]),
        ("token_mask", None, [2.0, 0.0, 0.5, 0.5]),
        ("sequence_truncate", None, [3.0, 3.0, 0.25, 0.25]),
        ("sequence_mask", None, [0.0, 0.0, 0.25, 0.25]),
        ("token_truncate", 0.6, [2.0, 3.0, 0.6, 0.6]),
        ("token_mask", 0.6, [2.0, 0.0, 0.0, 0.0]),
        ("sequence_truncate", 0.4, [3.0, 3.0, 0.4, 0.4]),
        ("sequence_mask", 0.4, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_importance_correction_weighs_token_losses(mode: str, clip_min: float | None, weights: list[float]) -> None:
    objective = _loss(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=clip_min)
    inputs = _inputs(advantages=[1.0, -2.0], counts=[2, 2], sampler=[-1 - LN2, -1 - 2 * LN2, -1 + LN2, -1 + LN2])
    output = objective(inputs)
    output.loss.backward()  # type: ignore[no-untyped-call]
    expected = torch.tensor(weights) * torch.tensor([-1.0, -1.0, 2.0, 2.0]) / 4
    assert output.loss.item() == pytest.approx(expected.sum().item(), abs=1e-6)
    assert inputs.logprobs.grad is not None
    torch.testing.assert_close(inputs.logprobs.grad, expected)


def test_kl_to_the_reference_adds_its_value_and_the_gradient_of_the_true_divergence() -> None:
    # x = ref - policy = ln 2: k3 = 2 - ln 2 - 1; d/dl (rho k3) = k3 + (1 - 2)
    inputs = _inputs(advantages=[0.0], counts=[1], reference=[-1.0 + LN2])
    output = _loss(beta=0.1)(inputs)
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert output.loss.item() == pytest.approx(0.1 * (1 - LN2))
    assert output.metrics["kl/ref"].value == pytest.approx(1 - LN2)
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.item() == pytest.approx(0.1 * ((1 - LN2) - 1))


def test_metrics_of_the_mismatch_to_the_sampler() -> None:
    # ratios 2 and 1: k3 of log 2 is 2 - ln 2 - 1; effective sample size 3^2 / (2 * 5)
    metrics = _loss()(_inputs(advantages=[1.0], counts=[2], sampler=[-1 - LN2, -1.0])).metrics
    assert metrics["kl/sampler"].value == pytest.approx((1 - LN2) / 2)
    assert metrics["importance/mean"].value == pytest.approx(1.5)
    assert metrics["importance/max"].value == pytest.approx(2.0)
    assert metrics["importance/ess"].value == pytest.approx(0.9)
    assert metrics["entropy"].value == 0.5 and metrics["entropy"].weight == 2


def test_the_sample_that_is_not_finite_is_named() -> None:
    fine = _inputs(advantages=[1.0, 1.0], counts=[1, 2])
    assert first_non_finite_sample(fine) is None
    assert first_non_finite_sample(_inputs(advantages=[1.0, 1.0], counts=[1, 2], sampler=[-1, -1, math.nan])) == 1
    assert first_non_finite_sample(_inputs(advantages=[math.inf, 1.0], counts=[1, 2])) == 0
