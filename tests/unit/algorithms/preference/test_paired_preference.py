"""Losses of pairs: every formula at a point worked out by hand, LD-DPO, WPO, mixtures, and what sorting depends on.

The point: beta 1, log-ratios ln 3 and -ln 3, so that sigma(beta c) = 3/4, sigma(beta r) = 1/4 and sigma(z) = 9/10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences, sequence_logprobs
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossOutput
from trl_ray.algorithms.preference.paired_preference import pair_weights, preference_loss
from trl_ray.algorithms.preference.preference_terms import f_score
from trl_ray.config.losses.preference_options import SMOOTHED, PreferenceLossConfig, PreferenceLossType

LN3 = math.log(3)


def sequences(counts: Sequence[int]) -> TokenSequences:
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return TokenSequences(sample_index=index, num_sequences=len(counts))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A micro-batch."""

    tokens: TokenSequences
    scores: TokenLogprobs
    lengths: Tensor
    reference: Tensor | None
    num_pairs: int
    num_chosen_tokens: int

    def loss(self, options: PreferenceLossConfig) -> LossOutput:
        return preference_loss(
            self.tokens,
            self.scores,
            options,
            lengths=self.lengths,
            reference=self.reference,
            num_pairs=self.num_pairs,
            num_chosen_tokens=self.num_chosen_tokens,
        )


def pairs(
    completions: Sequence[Sequence[float]],
    reference: Sequence[float] | None,
    *,
    sum_squared_probs: Sequence[float] | None = None,
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
) -> Pairs:
    """Log-probs of tokens of completions, chosen and rejected in turn; the reference's log-probs of completions."""
    counts = [len(completion) for completion in completions]
    flat = [value for completion in completions for value in completion]
    squares = None if sum_squared_probs is None else torch.tensor(sum_squared_probs, dtype=torch.float64)
    logprobs = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
    return Pairs(
        tokens=sequences(counts),
        scores=TokenLogprobs(logprobs=logprobs, entropy=torch.full_like(logprobs, 0.5), sum_squared_probs=squares),
        lengths=torch.tensor(counts),
        reference=None if reference is None else torch.tensor(reference, dtype=torch.float64),
        num_pairs=len(completions) // 2 if num_pairs is None else num_pairs,
        num_chosen_tokens=sum(counts[::2]) if num_chosen_tokens is None else num_chosen_tokens,
    )


def config(*losses: str, **options: Any) -> PreferenceLossConfig:
    return PreferenceLossConfig(loss_type=losses, **{"beta": 1.0, **options})


def the_point() -> Pairs:
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
    output = the_point().loss(config(kind.value, discopop_tau=1.0, **options))
    assert output.loss.item() == pytest.approx(BY_HAND[kind.value], abs=1e-6)


def test_the_hinge_grows_where_the_rejected_completion_is_ahead() -> None:
    swapped = pairs([[-1.0], [-1.0]], [-1 + LN3, -1 - LN3])
    assert swapped.loss(config("hinge")).loss.item() == pytest.approx(1 + 2 * LN3)


def test_empty_prompts_make_lengths_differ_from_trained_tokens() -> None:
    longer = replace(the_point(), lengths=torch.tensor([2, 3]))
    wanted = (LN3 / 2 + LN3 / 3 - 0.5) ** 2
    assert longer.loss(config("ipo")).loss.item() == pytest.approx(wanted)


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
    scores = replace(inputs.scores, logprobs=inputs.scores.logprobs.float())
    loss = replace(inputs, scores=scores, reference=torch.zeros(4)).loss(config("discopop")).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, inputs.scores.logprobs)[0]).all()


@pytest.mark.parametrize(("ld_alpha", "chosen"), [(None, -7.0), (1.0, -7.0), (0.5, -4.0), (0.0, -1.0)])
def test_tokens_beyond_the_shorter_completion_count_by_ld_alpha(ld_alpha: float | None, chosen: float) -> None:
    inputs = pairs([[-1.0, -2.0, -4.0], [-3.0]], None)
    logps = sequence_logprobs(inputs.scores.logprobs, inputs.tokens, ld_alpha=ld_alpha)
    assert logps.tolist() == [chosen, -3.0]


def test_each_pair_has_a_shorter_completion_of_its_own() -> None:
    inputs = pairs([[-1.0, -2.0], [-3.0], [-1.0], [-2.0, -4.0, -8.0]], None)
    assert sequence_logprobs(inputs.scores.logprobs, inputs.tokens, ld_alpha=0.0).tolist() == [-1.0, -3.0, -1.0, -2.0]


def weighed() -> Pairs:
    """Probabilities relative to their mean: 2 and 2 in the chosen, 1/4 in the rejected completion."""
    logs = [math.log(0.5), math.log(0.2), math.log(0.1)]
    return pairs([logs[:2], logs[2:]], [-1.0, -1.0], sum_squared_probs=[0.25, 0.1, 0.4])


def test_pairs_weigh_the_product_of_their_completions_mean_probabilities() -> None:
    weights = pair_weights(weighed().tokens, weighed().scores)
    assert weights.tolist() == pytest.approx([0.5])
    assert not weights.requires_grad


def test_a_weight_scales_loss_and_gradient_and_has_no_gradient_itself() -> None:
    gradients: list[Tensor] = []
    values = []
    for use in (False, True):
        inputs = weighed()
        output = inputs.loss(config("sigmoid", use_weighting=use))
        values.append(output.loss.item())
        gradients.append(torch.autograd.grad(output.loss, inputs.scores.logprobs)[0])
    assert values[1] == pytest.approx(0.5 * values[0])
    torch.testing.assert_close(gradients[1], 0.5 * gradients[0])
    assert output.metrics["wpo/weight"].value == pytest.approx(0.5)


def test_with_weights_the_likelihood_of_each_pair_is_weighed_by_its_own() -> None:
    output = weighed().loss(config("sft", use_weighting=True))
    assert output.loss.item() == pytest.approx(0.5 * -(math.log(0.5) + math.log(0.2)) / 2)


def test_a_mixture_is_the_weighed_sum_of_its_losses() -> None:
    mixture = config("sigmoid", "apo_down", "sft", loss_weights=(0.8, 0.0, 2.0))
    wanted = 0.8 * BY_HAND["sigmoid"] + 2.0 * BY_HAND["sft"]
    assert the_point().loss(mixture).loss.item() == pytest.approx(wanted, abs=1e-6)


def test_denominators_are_those_of_the_whole_update() -> None:
    inputs = pairs([[-0.25], [-1.0]], [-0.25 - LN3, -1 + LN3], num_pairs=4, num_chosen_tokens=10)
    output = inputs.loss(config("sigmoid", "sft"))
    assert output.loss.item() == pytest.approx(BY_HAND["sigmoid"] / 4 + 0.25 / 10, abs=1e-6)


def test_aot_compares_sorted_margins_so_that_it_depends_on_the_cut() -> None:
    # Margins of the policy 3 and 1, of the reference 0 and 2: sorted they differ by 1 and 1, pair by pair by 3 and -1.
    parts = [([[-1.0], [-4.0]], [-2.0, -2.0]), ([[-1.0], [-2.0]], [-1.0, -3.0])]
    whole = pairs([*parts[0][0], *parts[1][0]], [*parts[0][1], *parts[1][1]])
    options = config("aot")
    assert whole.loss(options).loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    cut = sum(pairs(*part, num_pairs=2, num_chosen_tokens=2).loss(options).loss.item() for part in parts)
    assert cut == pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2)
    assert options.depends_on_cut


def test_aot_unpaired_sorts_chosen_and_rejected_apart() -> None:
    # chosen 2 and 0, rejected 1 and 3: sorted they differ by -1 and -1
    inputs = pairs([[-1.0], [-1.0], [-1.0], [-1.0]], [-3.0, -2.0, -1.0, -4.0])
    wanted = math.log1p(math.exp(1))
    assert inputs.loss(config("aot_unpaired")).loss.item() == pytest.approx(wanted)


def test_rewards_are_beta_times_the_log_ratio_and_an_equal_pair_is_not_won() -> None:
    inputs = pairs([[-1.0], [-2.0], [-2.0], [-2.0]], [-2.0, -1.0, -3.0, -3.0])
    metrics = inputs.loss(config("sigmoid", beta=0.5)).metrics
    found = {name: (metric.value, metric.weight) for name, metric in metrics.items()}
    assert found == {
        "logps/chosen": (-1.5, 2),
        "logps/rejected": (-2.0, 2),
        "entropy": (0.5, 4),
        "rewards/chosen": (0.5, 2),
        "rewards/rejected": (0.0, 2),
        "rewards/accuracies": (0.5, 2),
        "rewards/margins": (0.5, 2),
    }


def test_the_likelihood_alone_needs_no_reference() -> None:
    output = pairs([[-1.0, -2.0], [-9.0]], None).loss(config("sft"))
    assert output.loss.item() == 1.5
    assert output.metrics.keys() == {"logps/chosen", "logps/rejected", "entropy"}
    with pytest.raises(AssertionError, match="sigmoid needs"):
        pairs([[-1.0], [-9.0]], None).loss(config("sigmoid"))


def test_a_micro_batch_without_pairs_adds_nothing() -> None:
    inputs = pairs([], [], num_pairs=3, num_chosen_tokens=3)
    output = inputs.loss(config("sigmoid", "aot", "sft"))
    assert output.loss.item() == 0
    assert all(metric.weight == 0 for metric in output.metrics.values())
