"""The policy objective with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossInputs, LossOutput, SampleTokens, StepTotals, first_non_finite_sample
from trl_ray.algorithms.policy.policy_loss import _SURROGATES, PolicyLoss
from trl_ray.config.losses.policy_options import LossConfig, LossType
from trl_ray.types import Metric, TrainingSample

LN2 = math.log(2.0)


def _inputs(
    *,
    advantages: list[float],
    counts: list[int],
    logprobs: list[float] | None = None,
    sampler: list[float] | None = None,
    reference: list[float] | None = None,
    totals: StepTotals | None = None,
    old: list[float] | None = None,
    kept: list[bool] | None = None,
    entropy: list[float] | None = None,
) -> LossInputs:
    """Samples of the given token counts; log-probs default to -1 everywhere."""
    n = sum(counts)
    repeats = torch.tensor(counts)
    return LossInputs(
        tokens=SampleTokens(
            sample_index=torch.repeat_interleave(torch.arange(len(counts)), repeats),
            sampler_logprobs=torch.tensor(sampler or [-1.0] * n),
            advantages=torch.repeat_interleave(torch.tensor(advantages), repeats),
            num_sequences=len(counts),
            old_logprobs=None if old is None else torch.tensor(old),
            surrogate_mask=None if kept is None else torch.tensor(kept),
        ),
        scores=TokenLogprobs(
            logprobs=torch.tensor(logprobs or [-1.0] * n, requires_grad=True),
            entropy=torch.tensor(entropy or [0.5] * n, requires_grad=True),
        ),
        reference_logprobs=None if reference is None else torch.tensor(reference),
        micro_batch_tokens=n,
        totals=totals
        or StepTotals(
            num_valid_tokens=n,
            num_samples=len(counts),
            num_micro_batches=1,
            num_surrogate_tokens=None if kept is None else sum(kept),
        ),
    )


def _gradient(output: LossOutput, inputs: LossInputs) -> list[float]:
    """[N] by the log-probs."""
    (found,) = torch.autograd.grad(output.loss, [inputs.logprobs], retain_graph=True)
    return cast("list[float]", found.tolist())


def _loss(**options: Any) -> PolicyLoss:
    return PolicyLoss(config=LossConfig(**options), max_completion_length=10)


def test_every_loss_type_has_a_surrogate() -> None:
    assert _SURROGATES.keys() == set(LossType)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # samples of 1 and 3 tokens with advantages 2 and -1: token losses -2 and 1 1 1; the step has 8 tokens in
        # 4 samples and 2 micro-batches
        ("dapo", (-2 + 3) / 8),
        ("grpo", (-2 + 1) / 4),
        ("dr_grpo", (-2 + 3) / (4 * 10)),
        ("bnpo", (-2 + 3) / 4 / 2),
        ("luspo", (-2 + 3) / 4),
        ("sapo", (-2 * 2 + 4 / 1.05 / 2) / 4),
    ],
)
def test_aggregation_divides_by_totals_of_the_whole_step(loss_type: str, expected: float) -> None:
    totals = StepTotals(num_valid_tokens=8, num_samples=4, num_micro_batches=2)
    output = _loss(loss_type=loss_type)(_inputs(advantages=[2.0, -1.0], counts=[1, 3], totals=totals))
    assert output.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("part", ["surrogate", "aggregate"])
def test_a_loss_type_that_nobody_handles_is_refused_instead_of_trained_as_another(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(advantages=[1.0], counts=[2])
    loss = _loss()
    loss.config = loss.config.model_copy(update={"loss_type": "sampo"})
    if part == "aggregate":
        monkeypatch.setattr(PolicyLoss, "surrogate", lambda *given: inputs.logprobs)
    with pytest.raises(AssertionError, match="sampo"):
        loss(inputs)


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


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # bounds 0.8, 1.2 and 2 for negative advantages
        (3.0, -1.0, 2.0, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, -1.0, 0.8, 0.0),
        (3.0, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_two_sided_clipping_bounds_the_ratio_where_the_advantage_is_negative(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    inputs = _inputs(advantages=[advantage], counts=[1], logprobs=[-1.0 + math.log(ratio)])
    output = _loss(old_logprobs="sampler", delta=2.0)(inputs)
    assert output.loss.item() == pytest.approx(loss)
    assert _gradient(output, inputs) == pytest.approx([gradient])


def test_cispo_keeps_the_gradient_of_a_token_whose_ratio_is_capped() -> None:
    # ratios 8 (capped at 5) and 0.5; losses -5 * 2 * log pi and -0.5 * -1 * log pi
    logprobs = [-1.0 + 3 * LN2, -1.0 - LN2]
    inputs = _inputs(advantages=[2.0, -1.0], counts=[1, 1], logprobs=logprobs)
    output = _loss(loss_type="cispo", epsilon_high=5.0, old_logprobs="sampler")(inputs)
    assert output.loss.item() == pytest.approx((-10 * logprobs[0] + 0.5 * logprobs[1]) / 2)
    assert _gradient(output, inputs) == pytest.approx([-5.0, 0.25])
    assert output.metrics["clip/high"].value == 0.5


@pytest.mark.parametrize(("advantage", "temperature"), [(2.0, 1.0), (-2.0, 3.0), (0.0, 3.0)])
def test_sapo_closes_a_soft_gate_at_the_temperature_of_the_advantages_sign(
    advantage: float, temperature: float
) -> None:
    inputs = _inputs(advantages=[advantage], counts=[1], logprobs=[-1.0 + LN2])
    output = _loss(loss_type="sapo", sapo_temperature_neg=3.0, old_logprobs="sampler")(inputs)
    gate = 1 / (1 + math.exp(-temperature))
    assert output.loss.item() == pytest.approx(-4 / temperature * gate * advantage)
    # d/dl = rho d/drho: 2 * 4 * gate (1 - gate) * A
    assert _gradient(output, inputs) == pytest.approx([-8 * gate * (1 - gate) * advantage])


def test_vespo_weighs_a_completion_by_the_product_of_its_ratios_and_corrections() -> None:
    # completion 1: ratios 2 and 2, corrections 1/2 and 1: w = 2, phi = 2^2 e^(3 - 6); completion 2: w = 1/2 once,
    # phi = 2^-3 e^(2 - 1)
    inputs = _inputs(
        advantages=[1.0, -1.0],
        counts=[2, 1],
        logprobs=[-1 + LN2, -1 + LN2, -1.0],
        old=[-1.0, -1.0, -1.0],
        sampler=[-1 + LN2, -1.0, -1 + LN2],
    )
    output = _loss(loss_type="vespo")(inputs)
    first, second = 4 * math.exp(-3), math.exp(1) / 8
    assert output.loss.item() == pytest.approx((-first * 2 * (LN2 - 1) + second * -1.0) / 3)
    assert _gradient(output, inputs) == pytest.approx([-first / 3, -first / 3, second / 3])
    assert output.metrics["vespo/phi_seq_mean"].value == pytest.approx((first + second) / 2)
    assert not {"clip/low", "clip/high"} & output.metrics.keys()


@pytest.mark.parametrize(
    ("advantage", "phi"), [(0.0, 4 * math.exp(-3)), (1.0, 4 * math.exp(-3)), (-1.0, 8 * math.exp(-2))]
)
def test_vespo_takes_k_and_lambda_by_the_sign_of_the_advantage(advantage: float, phi: float) -> None:
    # w = 2: 2^2 e^(3 - 6) and 2^3 e^(2 - 4)
    inputs = _inputs(advantages=[advantage], counts=[1], logprobs=[-1 + LN2])
    output = _loss(loss_type="vespo", old_logprobs="sampler")(inputs)
    assert output.metrics["vespo/phi_seq_mean"].value == pytest.approx(phi)


def test_vespo_bounds_each_log_ratio_by_20_so_that_no_token_outweighs_its_completion() -> None:
    # log-ratios 30 and -25 count as 20 and -20: w = 1
    inputs = _inputs(advantages=[1.0], counts=[2], logprobs=[-1.0, -26.0], sampler=[-31.0, -1.0])
    output = _loss(loss_type="vespo", old_logprobs="sampler")(inputs)
    assert output.metrics["vespo/phi_seq_mean"].value == pytest.approx(1.0)


def test_vespo_nearly_leaves_out_a_completion_of_which_a_token_is_masked() -> None:
    # a correction of 0 counts as 1e-8, against a log-ratio of ln 4: w = 4e-8
    inputs = _inputs(
        advantages=[1.0], counts=[2], logprobs=[-1 + 2 * LN2, -1.0], old=[-1.0, -1.0], sampler=[-1.0, -3.0]
    )
    output = _loss(loss_type="vespo", vllm_importance_sampling_mode="token_mask")(inputs)
    assert output.metrics["vespo/phi_seq_mean"].value == pytest.approx((4e-8) ** 2 * math.exp(3), rel=1e-4, abs=0.0)
    assert all(math.isfinite(value) for value in _gradient(output, inputs))


@pytest.mark.parametrize(
    ("level", "ratios", "gradient"),
    [
        # log-ratios of the first completion: 2 ln 2 and -ln 2, of the second: ln 2; losses -rho A, each divided by 3
        ("token", [4.0, 0.5, 2.0], [-4 / 3, -0.5 / 3, -2 / 3]),
        # geometric mean sqrt(2) at both tokens: d/dl = rho / 2 from each of the two losses
        ("sequence", [math.sqrt(2), math.sqrt(2), 2.0], [-math.sqrt(2) / 3, -math.sqrt(2) / 3, -2 / 3]),
        # product 2 at both tokens: d/dl = rho from each of the two losses
        ("sequence_product", [2.0, 2.0, 2.0], [-4 / 3, -4 / 3, -2 / 3]),
    ],
)
def test_the_ratio_is_of_a_token_or_of_a_whole_completion(
    level: str, ratios: list[float], gradient: list[float]
) -> None:
    inputs = _inputs(advantages=[1.0, 1.0], counts=[2, 1], logprobs=[-1 + 2 * LN2, -1 - LN2, -1 + LN2])
    output = _loss(importance_sampling_level=level, old_logprobs="sampler", epsilon=9.0)(inputs)
    assert output.loss.item() == pytest.approx(-sum(ratios) / 3)
    assert _gradient(output, inputs) == pytest.approx(gradient)


def test_fractions_clipped_are_of_completions_when_the_ratio_is() -> None:
    # one of two completions is clipped; it has three of the four tokens
    options: dict[str, Any] = {"old_logprobs": "sampler"}
    inputs = _inputs(advantages=[1.0, 1.0], counts=[3, 1], logprobs=[-1 + LN2] * 3 + [-1.0])
    assert _loss(**options)(inputs).metrics["clip/high"].value == 0.75
    by_completion = _loss(**options, importance_sampling_level="sequence")(inputs).metrics["clip/high"]
    assert (by_completion.value, by_completion.weight) == (0.5, 2)


def test_decoupled_ppo_clips_policy_over_old_and_weighs_by_old_over_sampler() -> None:
    # policy / old = 2, clipped at 1.2; old / sampler = 1/2
    inputs = _inputs(advantages=[1.0], counts=[1], logprobs=[-1 + LN2], old=[-1.0], sampler=[-1 + LN2])
    output = _loss()(inputs)
    assert output.loss.item() == pytest.approx(-1.2 * 0.5)
    assert output.metrics["importance/mean"].value == pytest.approx(0.5)
    # against the sampler there is one ratio, 1, and nothing to correct
    assert _loss(old_logprobs="sampler")(inputs).loss.item() == pytest.approx(-1.0)


def test_bad_completions_that_are_too_far_off_lose_their_loss_but_not_their_place_in_the_mean() -> None:
    # mean log-ratios sampler / policy: (ln 2 + 0) / 2 and three times ln 2; only the second is far off and bad
    sampler = [-1 + LN2, -1.0, -1 + LN2, -1 + LN2, -1 + LN2]
    inputs = _inputs(advantages=[-1.0, -3.0, 5.0, 0.0], counts=[2, 1, 1, 1], sampler=sampler)
    options: dict[str, Any] = {"off_policy_mask_threshold": 0.5, "vllm_importance_sampling_correction": False}
    output = _loss(**options)(inputs)
    assert output.loss.item() == pytest.approx((1 + 1 + 0 - 5) / 5)
    assert _gradient(output, inputs)[2] == 0
    assert output.metrics["off_policy/masked_fraction"].value == pytest.approx(0.2)
    options["off_policy_mask_threshold"] = LN2 / 2  # not exceeded by the first
    assert _loss(**options)(inputs).loss.item() == pytest.approx((1 + 1 + 0 - 5) / 5)


def test_a_masked_token_keeps_its_kl_and_its_place_in_the_mean() -> None:
    inputs = _inputs(
        advantages=[1.0], counts=[2], kept=[True, False], reference=[-1 + LN2, -1 + LN2], entropy=[0.9, 0.1]
    )
    output = _loss(beta=0.5)(inputs)
    assert output.loss.item() == pytest.approx((-1.0 + 2 * 0.5 * (1 - LN2)) / 2)
    assert output.metrics["entropy/kept_fraction"].value == 0.5
    assert output.metrics["entropy/kept"].value == pytest.approx(0.9)
    assert output.metrics["entropy"].value == pytest.approx(0.5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
@pytest.mark.parametrize(
    ("kept", "expected", "gradient"),
    [(None, (0.2 + 0.4 + 0.6) / 8, [1 / 8] * 3), ([True, False, True], (0.2 + 0.6) / 5, [1 / 5, 0.0, 1 / 5])],
)
def test_the_entropy_bonus_is_a_mean_over_the_tokens_of_the_update_whatever_the_loss_divides_by(
    loss_type: str, kept: list[bool] | None, expected: float, gradient: list[float]
) -> None:
    totals = StepTotals(num_valid_tokens=8, num_samples=4, num_micro_batches=2, num_surrogate_tokens=5)
    inputs = _inputs(advantages=[0.0, 0.0], counts=[1, 2], entropy=[0.2, 0.4, 0.6], kept=kept, totals=totals)
    output = _loss(loss_type=loss_type, entropy_coef=0.25)(inputs)
    assert output.loss.item() == pytest.approx(-0.25 * expected)
    (found,) = torch.autograd.grad(output.loss, [inputs.entropy])
    assert found.tolist() == pytest.approx([-0.25 * value for value in gradient])


def _sample(advantage: float, *, trained: list[bool], kept: list[bool] | None = None) -> TrainingSample:
    return TrainingSample(
        group_id=0,
        prompt_ids=np.zeros(1, dtype=np.int32),
        completion_ids=np.zeros(len(trained), dtype=np.int32),
        loss_mask=np.array(trained),
        sampler_logprobs=np.zeros(len(trained), dtype=np.float32),
        advantage=advantage,
        min_version=0,
        surrogate_mask=None if kept is None else np.array(kept),
    )


@pytest.mark.parametrize(
    ("options", "sample", "expected"),
    [
        ({}, _sample(1.0, trained=[True]), True),
        ({}, _sample(math.nan, trained=[True]), True),
        ({}, _sample(0.0, trained=[True]), False),
        ({}, _sample(1.0, trained=[False]), False),
        ({}, _sample(1.0, trained=[True, False], kept=[False, True]), False),
        ({"beta": 0.1}, _sample(0.0, trained=[True]), True),
        ({"beta": 0.1}, _sample(0.0, trained=[True], kept=[False]), True),
        ({"beta": 0.1}, _sample(1.0, trained=[False]), False),
        ({"beta": 0.1, "kl_placement": "reward"}, _sample(0.0, trained=[True]), False),
        ({"entropy_coef": 0.1}, _sample(0.0, trained=[True]), True),
        ({"entropy_coef": 0.1}, _sample(0.0, trained=[True], kept=[False]), False),
        ({"entropy_coef": 0.1, "use_adaptive_entropy": True}, _sample(0.0, trained=[True]), False),
        ({"off_policy_mask_threshold": 0.0}, _sample(0.0, trained=[True]), False),
    ],
)
def test_a_sample_has_a_gradient_exactly_if_something_can_move_one_of_its_tokens(
    options: dict[str, Any], sample: TrainingSample, expected: bool
) -> None:
    assert _loss(**options).has_gradient(sample) is expected


def test_an_adaptive_bonus_that_has_begun_moves_samples_of_advantage_0() -> None:
    loss = _loss(entropy_coef=0.1, use_adaptive_entropy=True, entropy_target=0.5)
    sample = _sample(0.0, trained=[True])
    loss.after_update({"entropy": Metric(value=0.4)})
    assert loss.has_gradient(sample)
    loss.after_update({"entropy": Metric(value=0.6)})
    assert not loss.has_gradient(sample)


def test_a_kl_in_the_reward_needs_a_reference_and_adds_nothing_to_the_loss() -> None:
    loss = _loss(beta=0.5, kl_placement="reward")
    output = loss(_inputs(advantages=[1.0], counts=[1], reference=[-9.0]))
    assert loss.needs.reference and not _loss().needs.reference
    assert output.loss.item() == pytest.approx(-1.0)
    assert "kl/ref" not in output.metrics


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"kl_estimator": "k3"}, 2.0),
        ({"kl_estimator": "k3", "use_bias_correction_kl": False}, 1.0),
        ({"kl_estimator": "k1"}, 2.0),
        ({"kl_estimator": "k2"}, 2.0),
        ({"kl_estimator": "k2", "use_bias_correction_kl": False}, 1.0),
    ],
)
def test_the_kl_is_estimated_as_configured_and_multiplied_by_the_ratio(options: dict[str, Any], factor: float) -> None:
    # ratio to the old policy 2; log reference - log policy = -ln 2
    inputs = _inputs(advantages=[0.0], counts=[1], logprobs=[-1.0], old=[-1 - LN2], reference=[-1 - LN2])
    values = {"k1": LN2, "k2": LN2**2 / 2, "k3": 0.5 + LN2 - 1}
    output = _loss(beta=0.1, **options)(inputs)
    value = values[options["kl_estimator"]]
    assert output.loss.item() == pytest.approx(0.1 * factor * value)
    assert output.metrics["kl/ref"].value == pytest.approx(value)


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
    assert first_non_finite_sample(_inputs(advantages=[1.0, 1.0], counts=[1, 2], old=[-1, math.nan, -1])) == 1
    assert first_non_finite_sample(_inputs(advantages=[1.0, 1.0], counts=[1, 2], reference=[-math.inf, -1, -1])) == 0
