"""Losses of pairs: every formula at a point worked out by hand, LD-DPO, WPO, mixtures, and what sorting depends on.

The point: beta 1, log-ratios ln 3 and -ln 3, so that sigma(beta c) = 3/4, sigma(beta r) = 1/4 and sigma(z) = 9/10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences, sequence_logprobs
from trl_ray.algorithms.preference.paired_preference import PairInputs, PairTotals, pair_weights, preference_loss
from trl_ray.algorithms.preference.preference_terms import f_score
from trl_ray.config.losses.preference_options import SMOOTHED, PreferenceLossConfig, PreferenceLossType

LN3 = math.log(3)


def sequences(counts: Sequence[int]) -> TokenSequences:
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return TokenSequences(sample_index=index, num_sequences=len(counts))


def pairs(
    completions: Sequence[Sequence[float]],
    reference: Sequence[float] | None,
    *,
    sum_squared_probs: Sequence[float] | None = None,
    totals: PairTotals | None = None,
) -> PairInputs:
    """Log-probs of tokens of completions, chosen and rejected in turn; the reference's log-probs of completions."""
    counts = [len(completion) for completion in completions]
    flat = [value for completion in completions for value in completion]
    return PairInputs(
        tokens=sequences(counts),
        logprobs=torch.tensor(flat, dtype=torch.float64, requires_grad=True),
        lengths=torch.tensor(counts),
        reference=None if reference is None else torch.tensor(reference, dtype=torch.float64),
        sum_squared_probs=None if sum_squared_probs is None else torch.tensor(sum_squared_probs, dtype=torch.float64),
        totals=totals or PairTotals(num_pairs=len(completions) // 2, num_chosen_tokens=sum(counts[::2])),
    )


def config(*losses: str, **options: Any) -> PreferenceLossConfig:
    return PreferenceLossConfig(loss_type=losses, **{"beta": 1.0, **options})


def the_point() -> PairInputs:
    """The chosen completion has one token, the rejected one two."""
    return pairs([[-0.25], [-1.0, -0.5]], [-0.25 - LN3, -1.5 + LN3])


BY_HAND = {
    "sigmoid": 0.1053605,  # -ln 0.9
    "hinge": 0.0,
    "ipo": 1.3177167,  # (1.5 ln 3 - 0.5)^2
    "sigmoid_norm": 0.1760105,  # ln(1 + 3^-1.5)
    "robust": -0.6270476,  # (-0.8 ln 0.9 + 0.2 ln 0.1) / 0.6
    "exo_pair": 0.0366900,  # 0.9 ln(9/8) + 0.1 ln(1/2)
    "discopop": 0.1105361,  # 0.1 * -ln 0.9 + 0.9 / 9
    "nca_pair": 1.1246703,  # -1.5 ln 0.75 - 0.5 ln 0.25
    "bco_pair": 0.5753641,  # -2 ln 0.75
    "sppo_hard": 0.7166734,  # 2 (ln 3 - 0.5)^2
    "apo_zero": 0.5,
    "apo_down": 0.85,
    "aot": 0.5448054,  # -0.8 ln 0.9 - 0.2 ln 0.1
    "aot_unpaired": 0.5448054,
    "sft": 0.25,
}


@pytest.mark.parametrize("kind", list(PreferenceLossType))
def test_every_loss_has_its_value_at_the_point(kind: PreferenceLossType) -> None:
    options = {"label_smoothing": 0.2} if kind in SMOOTHED else {}
    output = preference_loss(the_point(), config(kind.value, discopop_tau=1.0, **options))
    assert output.loss.item() == pytest.approx(BY_HAND[kind.value], abs=1e-6)


def test_the_hinge_grows_where_the_rejected_completion_is_ahead() -> None:
    swapped = pairs([[-1.0], [-1.0]], [-1 + LN3, -1 - LN3])
    assert preference_loss(swapped, config("hinge")).loss.item() == pytest.approx(1 + 2 * LN3)


def test_empty_prompts_make_lengths_differ_from_trained_tokens() -> None:
    inputs = the_point()
    longer = PairInputs(
        tokens=inputs.tokens,
        logprobs=inputs.logprobs,
        lengths=torch.tensor([2, 3]),
        reference=inputs.reference,
        totals=inputs.totals,
    )
    wanted = (LN3 / 2 + LN3 / 3 - 0.5) ** 2
    assert preference_loss(longer, config("ipo")).loss.item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("divergence", "alpha", "wanted"),
    [
        ("reverse_kl", 0.5, LN3),
        ("forward_kl", 0.5, 2 / 3),
        ("js_divergence", 0.5, math.log(1.5)),
        ("alpha_divergence", 0.5, 2 * (1 - 3**-0.5)),
        ("alpha_divergence", 2.0, 2.0),
        ("alpha_divergence", 0.0, 2 / 3),
        ("alpha_divergence", 1.0, LN3),
    ],
)
def test_each_divergence_makes_its_score_of_a_ratio_of_3(divergence: str, alpha: float, wanted: float) -> None:
    options = config("sigmoid", f_divergence_type=divergence, f_alpha_divergence_coef=alpha)
    score = f_score(torch.tensor([LN3], dtype=torch.float64), options)
    assert score.item() == pytest.approx(wanted)
    # whatever the divergence, a policy that is the reference scores 0
    assert f_score(torch.zeros(1), options).item() == pytest.approx(0.0, abs=1e-7)


def test_the_exponent_of_alpha_divergence_stays_a_number() -> None:
    options = config("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=3.0)
    ratio = torch.tensor([500.0], requires_grad=True)
    score = f_score(ratio, options)
    assert math.isfinite(score.item())
    assert torch.autograd.grad(score.sum(), ratio)[0].item() == 0


def test_discopop_and_its_gradient_stay_numbers_far_from_the_reference() -> None:
    inputs = pairs([[-300.0], [-1.0], [-1.0], [-300.0]], [0.0, 0.0, 0.0, 0.0])
    options = config("discopop")
    narrow = PairInputs(
        tokens=inputs.tokens,
        logprobs=inputs.logprobs.float(),
        lengths=inputs.lengths,
        reference=torch.zeros(4),
        totals=inputs.totals,
    )
    loss = preference_loss(narrow, options).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, inputs.logprobs)[0]).all()


@pytest.mark.parametrize(("ld_alpha", "chosen"), [(None, -7.0), (1.0, -7.0), (0.5, -4.0), (0.0, -1.0)])
def test_tokens_beyond_the_shorter_completion_count_by_ld_alpha(ld_alpha: float | None, chosen: float) -> None:
    inputs = pairs([[-1.0, -2.0, -4.0], [-3.0]], None)
    logps = sequence_logprobs(inputs.logprobs, inputs.tokens, ld_alpha=ld_alpha)
    assert logps.tolist() == [chosen, -3.0]


def test_each_pair_has_a_shorter_completion_of_its_own() -> None:
    inputs = pairs([[-1.0, -2.0], [-3.0], [-1.0], [-2.0, -4.0, -8.0]], None)
    assert sequence_logprobs(inputs.logprobs, inputs.tokens, ld_alpha=0.0).tolist() == [-1.0, -3.0, -1.0, -2.0]


def weighed() -> PairInputs:
    """Probabilities relative to their mean: 2 and 2 in the chosen, 1/4 in the rejected completion."""
    logs = [math.log(0.5), math.log(0.2), math.log(0.1)]
    return pairs([logs[:2], logs[2:]], [-1.0, -1.0], sum_squared_probs=[0.25, 0.1, 0.4])


def test_pairs_weigh_the_product_of_their_completions_mean_probabilities() -> None:
    weights = pair_weights(weighed())
    assert weights.tolist() == pytest.approx([0.5])
    assert not weights.requires_grad


def test_a_weight_scales_loss_and_gradient_and_has_no_gradient_itself() -> None:
    gradients: list[Tensor] = []
    values = []
    for use in (False, True):
        inputs = weighed()
        output = preference_loss(inputs, config("sigmoid", use_weighting=use))
        values.append(output.loss.item())
        gradients.append(torch.autograd.grad(output.loss, inputs.logprobs)[0])
    assert values[1] == pytest.approx(0.5 * values[0])
    torch.testing.assert_close(gradients[1], 0.5 * gradients[0])
    assert output.metrics["wpo/weight"].value == pytest.approx(0.5)


def test_with_weights_the_likelihood_of_each_pair_is_weighed_by_its_own() -> None:
    output = preference_loss(weighed(), config("sft", use_weighting=True))
    assert output.loss.item() == pytest.approx(0.5 * -(math.log(0.5) + math.log(0.2)) / 2)


def test_a_mixture_is_the_weighed_sum_of_its_losses() -> None:
    mixture = config("sigmoid", "apo_down", "sft", loss_weights=(0.8, 0.0, 2.0))
    wanted = 0.8 * BY_HAND["sigmoid"] + 2.0 * BY_HAND["sft"]
    assert preference_loss(the_point(), mixture).loss.item() == pytest.approx(wanted, abs=1e-6)


def test_denominators_are_those_of_the_whole_update() -> None:
    totals = PairTotals(num_pairs=4, num_chosen_tokens=10)
    inputs = pairs([[-0.25], [-1.0]], [-0.25 - LN3, -1 + LN3], totals=totals)
    output = preference_loss(inputs, config("sigmoid", "sft"))
    assert output.loss.item() == pytest.approx(BY_HAND["sigmoid"] / 4 + 0.25 / 10, abs=1e-6)


def test_aot_compares_sorted_margins_so_that_it_depends_on_the_cut() -> None:
    # Margins of the policy 3 and 1, of the reference 0 and 2: sorted they differ by 1 and 1, pair by pair by 3 and -1.
    parts = [([[-1.0], [-4.0]], [-2.0, -2.0]), ([[-1.0], [-2.0]], [-1.0, -3.0])]
    whole = pairs([*parts[0][0], *parts[1][0]], [*parts[0][1], *parts[1][1]])
    options = config("aot")
    assert preference_loss(whole, options).loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    totals = PairTotals(num_pairs=2, num_chosen_tokens=2)
    cut = sum(preference_loss(pairs(*part, totals=totals), options).loss.item() for part in parts)
    assert cut == pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2)
    assert options.depends_on_cut


def test_aot_unpaired_sorts_chosen_and_rejected_apart() -> None:
    # chosen 2 and 0, rejected 1 and 3: sorted they differ by -1 and -1
    inputs = pairs([[-1.0], [-1.0], [-1.0], [-1.0]], [-3.0, -2.0, -1.0, -4.0])
    wanted = math.log1p(math.exp(1))
    assert preference_loss(inputs, config("aot_unpaired")).loss.item() == pytest.approx(wanted)


def test_rewards_are_beta_times_the_log_ratio_and_an_equal_pair_is_not_won() -> None:
    inputs = pairs([[-1.0], [-2.0], [-2.0], [-2.0]], [-2.0, -1.0, -3.0, -3.0])
    metrics = preference_loss(inputs, config("sigmoid", beta=0.5)).metrics
    found = {name: (metric.value, metric.weight) for name, metric in metrics.items()}
    assert found == {
        "logps/chosen": (-1.5, 2),
        "logps/rejected": (-2.0, 2),
        "rewards/chosen": (0.5, 2),
        "rewards/rejected": (0.0, 2),
        "rewards/accuracies": (0.5, 2),
        "rewards/margins": (0.5, 2),
    }


def test_the_likelihood_alone_needs_no_reference() -> None:
    output = preference_loss(pairs([[-1.0, -2.0], [-9.0]], None), config("sft"))
    assert output.loss.item() == 1.5
    assert output.metrics.keys() == {"logps/chosen", "logps/rejected"}
    with pytest.raises(AssertionError, match="sigmoid needs"):
        preference_loss(pairs([[-1.0], [-9.0]], None), config("sigmoid"))


def test_a_micro_batch_without_pairs_adds_nothing() -> None:
    inputs = pairs([], [], totals=PairTotals(num_pairs=3, num_chosen_tokens=3))
    output = preference_loss(inputs, config("sigmoid", "aot", "sft"))
    assert output.loss.item() == 0
    assert all(metric.weight == 0 for metric in output.metrics.values())
