"""Every contradiction of options of preference losses is refused by name, and its remedies are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.base import Section
from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    PreferenceLossType,
    UnpairedLossConfig,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.errors import ConfigError


def refused(owner: type[Section], option: str, values: dict[str, Any], *, remedies: list[dict[str, Any]]) -> None:
    """By one line that begins with the option; each remedy is accepted."""
    with pytest.raises(ConfigError) as caught:
        build(owner, values)
    message = str(caught.value)
    assert message.startswith(option), message
    assert ", got " in message and "\n" not in message
    for remedy in remedies:
        build(owner, {**values, **remedy})


def test_one_loss_may_be_named_without_a_list() -> None:
    assert build(PreferenceLossConfig, {"loss_type": "ipo"}).loss_type == (PreferenceLossType.IPO,)


def test_a_mixture_loads_again_from_its_own_yaml() -> None:
    config = build(PreferenceLossConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]})
    assert build(PreferenceLossConfig, parse_yaml(dump_yaml(config), source="test")) == config


@pytest.mark.parametrize("values", [{"loss_type": []}, {"loss_type": "dpo"}, {"loss_type": ["sigmoid", "dpo"]}])
def test_a_loss_is_one_of_those_known(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="loss_type"):
        build(PreferenceLossConfig, values)


def test_a_loss_is_named_once() -> None:
    refused(PreferenceLossConfig, "loss_type", {"loss_type": ["ipo", "ipo"]}, remedies=[{"loss_type": ["ipo"]}])


def test_there_are_as_many_weights_as_losses() -> None:
    refused(
        PreferenceLossConfig,
        "loss_weights",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        remedies=[{"loss_weights": [1.0, 0.5]}, {"loss_weights": None}],
    )


def test_a_loss_has_weight() -> None:
    values = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 0.0]}
    refused(PreferenceLossConfig, "loss_weights", values, remedies=[{"loss_weights": [0.0, 1.0]}])


def test_without_weights_each_loss_counts_once() -> None:
    config = PreferenceLossConfig(loss_type=("sigmoid", "sft"))
    assert config.weighted_losses == ((PreferenceLossType.SIGMOID, 1.0), (PreferenceLossType.SFT, 1.0))


@pytest.mark.parametrize("kind", ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"])
def test_losses_without_a_difference_of_scores_take_no_other_divergence(kind: str) -> None:
    refused(
        PreferenceLossConfig,
        "f_divergence_type",
        {"loss_type": ["sigmoid", kind], "f_divergence_type": "js_divergence"},
        remedies=[{"f_divergence_type": "reverse_kl"}, {"loss_type": ["sigmoid", "sft"]}],
    )


def test_exo_takes_the_logarithm_of_the_smoothing() -> None:
    refused(PreferenceLossConfig, "label_smoothing", {"loss_type": "exo_pair"}, remedies=[{"label_smoothing": 0.001}])


def test_smoothing_that_no_loss_reads_is_refused() -> None:
    refused(
        PreferenceLossConfig,
        "label_smoothing",
        {"label_smoothing": 0.1},
        remedies=[{"loss_type": "robust"}, {"loss_type": ["sigmoid", "aot"]}, {"label_smoothing": 0.0}],
    )


@pytest.mark.parametrize("owner", [PreferenceLossConfig, CPOLossConfig])
def test_half_of_the_labels_wrong_teaches_nothing(owner: type[Section]) -> None:
    loss_type = "robust" if owner is PreferenceLossConfig else "sigmoid"
    with pytest.raises(ConfigError, match=r"label_smoothing must be less than 0\.5"):
        build(owner, {"loss_type": loss_type, "label_smoothing": 0.5})


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_pairs_that_are_sorted_apart_have_no_weights(kind: str) -> None:
    refused(
        PreferenceLossConfig,
        "use_weighting",
        {"loss_type": ["ipo", kind], "use_weighting": True},
        remedies=[{"use_weighting": False}, {"loss_type": ["ipo"]}],
    )


def test_a_reference_that_moves_is_not_asked_once() -> None:
    refused(
        PreferenceLossConfig,
        "sync_ref_model",
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        remedies=[{"sync_ref_model": False}, {"precompute_ref_log_probs": False}],
    )


@pytest.mark.parametrize("option", ["sync_ref_model", "precompute_ref_log_probs"])
@pytest.mark.parametrize("values", [{"loss_type": "sft"}, {"loss_type": ["sft", "ipo"], "loss_weights": [1.0, 0.0]}])
def test_without_a_reference_there_is_none_to_ask(option: str, values: dict[str, Any]) -> None:
    assert not build(PreferenceLossConfig, values).needs_reference
    refused(
        PreferenceLossConfig,
        option,
        {option: True, **values},
        remedies=[{option: False}, {"loss_type": ["sft", "ipo"], "loss_weights": None}],
    )


def test_completions_of_one_kind_at_least_have_weight() -> None:
    refused(
        UnpairedLossConfig,
        "desirable_weight",
        {"desirable_weight": 0.0, "undesirable_weight": 0.0},
        remedies=[{"desirable_weight": 1.0}, {"undesirable_weight": 0.5}],
    )


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_cpo_smooths_the_labels_of_logistic_losses_only(kind: str) -> None:
    refused(
        CPOLossConfig,
        "label_smoothing",
        {"loss_type": kind, "label_smoothing": 0.1},
        remedies=[{"loss_type": "simpo"}, {"label_smoothing": 0.0}],
    )


def test_alphapo_has_no_likelihood() -> None:
    assert CPOLossConfig(loss_type="alphapo").nll_weight == 0.0
    assert CPOLossConfig(loss_type="simpo").nll_weight == 1.0


def test_dft_smooths_no_labels() -> None:
    refused(
        SupervisedLossConfig,
        "label_smoothing_factor",
        {"loss_type": "dft", "label_smoothing_factor": 0.1},
        remedies=[{"loss_type": "nll"}, {"label_smoothing_factor": 0.0}],
    )


@pytest.mark.parametrize(
    ("owner", "option"),
    [
        (PreferenceLossConfig, "beta"),
        (UnpairedLossConfig, "beta"),
        (CPOLossConfig, "beta"),
        (ORPOLossConfig, "beta"),
        (PreferenceLossConfig, "discopop_tau"),
        (RewardLossConfig, "center_rewards_coefficient"),
    ],
)
def test_what_is_divided_by_or_weighs_all_is_above_0(owner: type[Section], option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be greater than 0"):
        build(owner, {option: 0.0})
