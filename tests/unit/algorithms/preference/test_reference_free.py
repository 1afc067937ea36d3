"""CPO, SimPO, AlphaPO and ORPO at points worked out by hand, and their ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trl_ray.algorithms.batches.sequences import TokenSequences
from trl_ray.algorithms.preference.reference_free import cpo_loss, orpo_loss
from trl_ray.config.losses.preference_options import CPOLossConfig, ORPOLossConfig

LN3 = math.log(3)


def pair(
    chosen: list[float], rejected: list[float], prompt: list[float] | None = None, *, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """One pair for `cpo_loss`, or with a prompt for `orpo_loss`."""
    index = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    inputs = {
        "tokens": TokenSequences(sample_index=index, num_sequences=2),
        "logprobs": torch.tensor(chosen + rejected, dtype=dtype, requires_grad=True),
        "num_pairs": 1,
        "num_likelihood_tokens": len(chosen) + len(prompt or []),
    }
    if prompt is None:
        return inputs
    return inputs | {"prompt_logprobs": torch.tensor(prompt, dtype=dtype, requires_grad=True)}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # sums differ by -1 - (-1 - 2 ln 3) = ln 9, means by -0.5 + 1 + 2 ln 3; the likelihood is 0.5
        ({}, 0.1053605 + 0.5),
        ({"cpo_alpha": 0.0, "label_smoothing": 0.2}, 0.5448054),
        ({"loss_type": "hinge", "cpo_alpha": 2.0}, 1.0),
        ({"loss_type": "ipo", "cpo_alpha": 0.0}, (2 * LN3) ** 2),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, 0.1053605),
        ({"loss_type": "alphapo", "simpo_gamma": 0.5}, 0.1053605),
    ],
)
def test_losses_of_cpo_are_those_worked_out_by_hand(options: dict[str, Any], wanted: float) -> None:
    output = cpo_loss(**pair([-0.25, -0.75], [-1 - 2 * LN3]), config=CPOLossConfig(**{"beta": 1.0, **options}))
    assert output.loss.item() == pytest.approx(wanted, abs=1e-6)


def test_alpha_bends_the_reward() -> None:
    # alpha 1: (1 - 1/p) is -1 at 1/2 and -3 at 1/4
    output = cpo_loss(
        **pair([-math.log(2)], [-math.log(4)]),
        config=CPOLossConfig(loss_type="hinge", alpha=1.0, beta=0.25, cpo_alpha=0.0),
    )
    assert output.loss.item() == pytest.approx(0.5)
    assert output.metrics["rewards/chosen"].value == pytest.approx(-0.25)
    assert output.metrics["rewards/rejected"].value == pytest.approx(-0.75)
    assert output.metrics["logps/rejected"].value == pytest.approx(-math.log(4))


def test_a_bent_reward_stays_a_number_where_the_probability_is_none() -> None:
    inputs = pair([-200.0], [-100.0], dtype=torch.float32)
    assert math.isfinite(cpo_loss(**inputs, config=CPOLossConfig(alpha=0.25, cpo_alpha=0.0)).loss.item())


def test_orpo_adds_the_odds_to_the_likelihood_of_the_whole_text() -> None:
    # probabilities 3/4 and 1/4 per token: odds 3 and 1/3, ln sigma(ln 9) = ln 0.9
    good, poor = math.log(0.75), math.log(0.25)
    inputs = pair([good, good], [poor], [poor])
    output = orpo_loss(**inputs, config=ORPOLossConfig(beta=0.5))
    likelihood = -(2 * good + poor) / 3
    assert output.loss.item() == pytest.approx(likelihood - 0.5 * math.log(0.9))
    assert output.metrics["nll_loss"].value == pytest.approx(likelihood)
    assert output.metrics["log_odds_chosen"].value == pytest.approx(2 * LN3)
    assert output.metrics["log_odds_ratio"].value == pytest.approx(math.log(0.9))
    assert output.metrics["rewards/margins"].value == pytest.approx(0.5 * LN3)


def test_odds_are_exact_for_near_certain_and_near_impossible_texts() -> None:
    inputs = pair([-1e-6], [-20.0], [-1.0], dtype=torch.float32)
    # odds are 10^6 and e^-20
    wanted = 6 * math.log(10) + 20
    assert orpo_loss(**inputs, config=ORPOLossConfig()).metrics["log_odds_chosen"].value == pytest.approx(
        wanted, rel=1e-6
    )


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-4, -0.7, -60.0, -400.0])
def test_orpo_and_its_gradient_stay_numbers_at_every_probability(logprob: float) -> None:
    inputs = pair([logprob], [-1.0], [-1.0], dtype=torch.float32)
    loss = orpo_loss(**inputs, config=ORPOLossConfig()).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, inputs["logprobs"])[0]).all()
