"""Each loss as the learner calls it: the numbers of the pure function it wraps, its totals, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from supervised_batches import pairs, rated, reward_pairs, sample, solutions, texts, tokens
from trl_ray.algorithms.batches.labels import completion_lengths, pairs_of
from trl_ray.algorithms.batches.sequences import TokenSequences, sequence_logprobs
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import (
    HeadKind,
    Loss,
    LossInputs,
    LossNeeds,
    LossOutput,
    StepTotals,
    first_non_finite_sample,
    sample_tokens,
)
from trl_ray.algorithms.loss_registry import build_loss
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.algorithms.preference.paired_preference import preference_loss
from trl_ray.algorithms.preference.reference_free import (
    are_prompts,
    cpo_loss,
    orpo_loss,
)
from trl_ray.algorithms.preference.reward_losses import bradley_terry_loss, step_loss
from trl_ray.algorithms.preference.unpaired_preference import unpaired_loss
from trl_ray.algorithms.supervised_loss import supervised_loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    UnpairedLossConfig,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.runs.dataset_config import DPOConfig
from trl_ray.types import Example, Metric, SampleLabel, TrainingSample


def flat(examples: Sequence[Example]) -> list[TrainingSample]:
    return [one for example in examples for one in example.samples]


def inputs_of(
    loss: LossSection, samples: Sequence[TrainingSample], *, reference: bool = False, classes: int = 0, **totals: float
) -> LossInputs:
    """Made-up answers of a model."""
    given = sample_tokens(samples)
    count, draw = len(given.sample_index), torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    scores = TokenLogprobs(
        logprobs=(-3 * drawn(count)).requires_grad_(),
        entropy=drawn(count),
        sum_squared_probs=drawn(count),
        top1=drawn(count) < 0.5,
        mean_logprobs=-5 - drawn(count),
    )
    return LossInputs(
        samples=samples,
        tokens=given,
        scores=None if classes else scores,
        class_logits=drawn(count, classes).requires_grad_() if classes else None,
        reference_logprobs=-3 * drawn(count) if reference else None,
        micro_batch_tokens=count,
        totals=StepTotals(
            num_valid_tokens=3 * count,
            num_samples=2 * len(samples),
            num_micro_batches=3,
            named={**build_loss(loss).totals(samples), **totals},
        ),
    )


def assert_same(found: LossOutput, expected: LossOutput, inputs: LossInputs) -> None:
    assert found.loss.item() == expected.loss.item()
    assert found.metrics == expected.metrics
    leaf = inputs.class_logits if inputs.scores is None else inputs.logprobs
    assert leaf is not None
    gradients = [torch.autograd.grad(one.loss, leaf, retain_graph=True)[0] for one in (found, expected)]
    assert torch.equal(*gradients) and bool(gradients[0].abs().sum() > 0)


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_supervised_fine_tuning(options: dict[str, Any]) -> None:
    config = SupervisedLossConfig(**options)
    inputs = inputs_of(config, flat(texts(1)))
    expected = supervised_loss(inputs.language, config, num_valid_tokens=3 * len(inputs.logprobs))
    found = build_loss(config)(inputs)
    assert_same(found, expected, inputs)
    assert {"entropy", "mean_token_accuracy", "nll"} == found.metrics.keys()


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("known", [False, True])
def test_pairs_against_a_reference_that_is_passed_or_known(ld_alpha: float | None, known: bool) -> None:
    config = PreferenceLossConfig(loss_type=("sigmoid", "sft"), ld_alpha=ld_alpha, use_weighting=True)
    samples = flat(pairs(1))
    numbers = [-10.0 - place for place in range(len(samples))]
    if known:
        samples = [replace(one, label=SampleLabel(reference=n)) for one, n in zip(samples, numbers, strict=True)]
    inputs = inputs_of(config, samples, reference=not known)
    if known:
        reference = torch.tensor(numbers)
    else:
        assert inputs.reference_logprobs is not None
        reference = sequence_logprobs(inputs.reference_logprobs, inputs.tokens, ld_alpha=ld_alpha)
    expected = preference_loss(
        inputs.tokens,
        inputs.language,
        config,
        lengths=torch.tensor([len(one.completion_ids) for one in samples]),
        reference=reference,
        num_pairs=8,
        num_chosen_tokens=sum(len(one.completion_ids) for one in samples[::2]),
    )
    assert_same(build_loss(config)(inputs), expected, inputs)


def test_lengths_are_those_of_labels_where_these_have_them() -> None:
    samples = flat(pairs(1))[:3]
    samples[1] = replace(samples[1], label=SampleLabel(length=40))
    inputs = inputs_of(SupervisedLossConfig(), samples)
    counts = [len(one.completion_ids) for one in samples]
    assert completion_lengths(inputs).tolist() == [counts[0], 40, counts[2]]


def test_rated_completions_take_the_kl_from_the_totals() -> None:
    config = UnpairedLossConfig(beta=0.2, undesirable_weight=0.7)
    samples = flat(rated(1))
    inputs = inputs_of(config, samples, reference=True, kl=0.4)
    assert inputs.reference_logprobs is not None
    expected = unpaired_loss(
        inputs.tokens,
        inputs.language,
        config,
        reference=inputs.tokens.sums(inputs.reference_logprobs),
        desirable=torch.tensor([True, False] * 4),
        num_completions=16,
        kl=0.4,
    )
    loss = build_loss(config)
    assert_same(loss(inputs), expected, inputs)
    with pytest.raises(AssertionError, match="estimate of the KL"):
        loss(inputs_of(config, samples, reference=True))


def test_the_margin_of_rated_completions_is_the_difference_of_the_joined_means() -> None:
    loss = build_loss(UnpairedLossConfig())
    metrics = {"rewards/chosen": Metric(value=0.5, weight=3), "rewards/rejected": Metric(value=-1.0, weight=9)}
    assert loss.joined(metrics)["rewards/margins"].value == 1.5
    assert loss.joined({"rewards/chosen": Metric(value=0.5)}) == {}


def test_pairs_without_a_reference() -> None:
    config = CPOLossConfig(loss_type="simpo")
    samples = flat(pairs(1))
    inputs = inputs_of(config, samples)
    trained = sum(len(one.completion_ids) for one in samples[::2])
    expected = cpo_loss(inputs.tokens, inputs.logprobs, config, num_pairs=8, num_likelihood_tokens=trained)
    assert_same(build_loss(config)(inputs), expected, inputs)


def test_odds_ratios_take_prompts_from_the_third_samples() -> None:
    config = ORPOLossConfig()
    samples = flat(pairs(1, with_prompt=True))
    prompts = are_prompts(samples)
    assert prompts[:8] == [False, False, False, False, True, False, False, True]  # the first prompt has one token
    assert sum(prompts) == 6
    inputs = inputs_of(config, samples)
    index = inputs.tokens.sample_index.tolist()
    completions = [place for place, is_prompt in enumerate(prompts) if not is_prompt]
    kept = torch.tensor([not prompts[number] for number in index])
    trained = sum(len(samples[place].completion_ids) for place in completions[::2])
    rest = sum(len(one.completion_ids) for one, is_prompt in zip(samples, prompts, strict=True) if is_prompt)
    expected = orpo_loss(
        TokenSequences(
            sample_index=torch.tensor([completions.index(number) for number in index if not prompts[number]]),
            num_sequences=16,
        ),
        inputs.logprobs[kept],
        inputs.logprobs[~kept],
        config,
        num_pairs=8,
        num_likelihood_tokens=trained + rest,
    )
    assert_same(build_loss(config)(inputs), expected, inputs)


def test_a_row_that_comes_twice_in_a_row_is_two_pairs() -> None:
    rng = np.random.default_rng(0)
    one, three = tokens(rng, 1), tokens(rng, 3)
    short = [sample(4, one, tokens(rng, 2)) for _ in range(2)]
    long = [*(sample(5, three, tokens(rng, 2)) for _ in range(2)), sample(5, three[:1], three[1:])]
    assert are_prompts(short + short + long + long) == [False] * 4 + [False, False, True] * 2


def test_pairs_of_rewards_have_margin_0_where_they_have_none() -> None:
    config = RewardLossConfig(center_rewards_coefficient=0.01)
    samples = flat(reward_pairs(1))
    inputs = inputs_of(config, samples, classes=1)
    assert inputs.class_logits is not None
    rewards = inputs.class_logits[:, 0]
    expected = partial(bradley_terry_loss, rewards[::2], rewards[1::2], config, num_pairs=8)
    found = build_loss(config)(inputs)
    assert_same(found, expected(margin=torch.tensor([0.0, 0.5] * 4)), inputs)
    without = [replace(one, label=None) for one in samples]
    plain = build_loss(config)(replace(inputs, samples=without))
    assert_same(plain, expected(margin=None), inputs)
    assert plain.loss.item() < found.loss.item()


def test_steps_are_read_in_the_order_of_the_trained_positions() -> None:
    config = StepLossConfig()
    samples = flat(solutions(1))
    inputs = inputs_of(config, samples, classes=2)
    assert inputs.class_logits is not None
    right = [bool(value) for one in samples for value in one.label.steps]  # type: ignore[union-attr]
    expected = step_loss(inputs.class_logits, torch.tensor(right), num_steps=inputs.totals.num_valid_tokens)
    assert_same(build_loss(config)(inputs), expected, inputs)


LABELLED = [replace(one, label=SampleLabel(steps=np.ones(3, dtype=np.bool_))) for one in flat(solutions(1))[:1]]


@pytest.mark.parametrize(
    ("options", "samples", "classes", "match"),
    [
        (PreferenceLossConfig(), flat(pairs(1))[1:3], 0, "one example"),
        (PreferenceLossConfig(), flat(pairs(1))[:3], 0, "in pairs"),
        (PreferenceLossConfig(), flat(pairs(1))[:2], 0, "log-probs of the reference"),
        (StepLossConfig(), LABELLED, 2, "1 steps of example 0"),
        (StepLossConfig(), flat(texts(1)), 2, "label"),
        (RewardLossConfig(), flat(pairs(1)), 1, "one reward"),
        (SupervisedLossConfig(), flat(texts(1)), 1, "language-model head"),
        (RewardLossConfig(), flat(reward_pairs(1)), 0, "classifying head"),
        (LossConfig(), flat(texts(1)), 0, "sampler's log-probs"),
    ],
)
def test_a_loss_says_what_it_misses(
    options: LossSection, samples: list[TrainingSample], classes: int, match: str
) -> None:
    inputs = inputs_of(SupervisedLossConfig(), samples, classes=classes, pairs=1, chosen_tokens=1)
    with pytest.raises(AssertionError, match=match):
        build_loss(options)(inputs)


def test_a_missing_total_is_named() -> None:
    totals = StepTotals(num_valid_tokens=1, num_samples=1, num_micro_batches=1, named={"pairs": 0.0})
    assert totals.count("pairs") == 1
    with pytest.raises(AssertionError, match=r"chosen_tokens, but have \['pairs'\]"):
        totals.count("chosen_tokens")


def test_totals_are_counted_over_the_whole_update() -> None:
    samples = flat(pairs(2))
    chosen = sum(len(one.completion_ids) for one in samples[::2])
    with_prompts = flat(pairs(2, with_prompt=True))
    rest = sum(len(pair[0].prompt_ids) - 1 for pair in pairs_of(samples))
    assert build_loss(PreferenceLossConfig()).totals(samples) == {"pairs": 8, "chosen_tokens": chosen}
    assert build_loss(CPOLossConfig()).totals(samples) == {"pairs": 8, "likelihood_tokens": chosen}
    again = [one for example in pairs(2, with_prompt=True) for one in example.samples]
    assert len(again) == len(with_prompts) == 22
    first = sum(len(example.samples[0].completion_ids) for example in pairs(2, with_prompt=True))
    prompts = sum(len(example.samples[0].prompt_ids) - 1 for example in pairs(2, with_prompt=True))
    assert build_loss(ORPOLossConfig()).totals(with_prompts) == {"pairs": 8, "likelihood_tokens": first + prompts}
    assert rest == prompts
    assert build_loss(RewardLossConfig()).totals(flat(reward_pairs(2))) == {"pairs": 8}
    others: list[LossSection] = [LossConfig(), SupervisedLossConfig(), UnpairedLossConfig(), StepLossConfig()]
    assert all(build_loss(options).totals(samples) == {} for options in others)


NEEDS: list[tuple[LossSection, LossNeeds]] = [
    (LossConfig(), LossNeeds()),
    (LossConfig(beta=0.1), LossNeeds(reference=True)),
    (SupervisedLossConfig(neftune_noise_alpha=5.0), LossNeeds(top1=True, embedding_noise=5.0)),
    (SupervisedLossConfig(label_smoothing_factor=0.1), LossNeeds(top1=True, mean_logprobs=True)),
    (PreferenceLossConfig(), LossNeeds(reference=True, top1=True, whole_groups=True)),
    (PreferenceLossConfig(loss_type="sft"), LossNeeds(top1=True, whole_groups=True)),
    (PreferenceLossConfig(precompute_ref_log_probs=True), LossNeeds(top1=True, whole_groups=True)),
    (
        PreferenceLossConfig(use_weighting=True),
        LossNeeds(reference=True, top1=True, sum_squared_probs=True, whole_groups=True),
    ),
    (UnpairedLossConfig(), LossNeeds(reference=True)),
    (UnpairedLossConfig(precompute_ref_log_probs=True), LossNeeds()),
    (CPOLossConfig(), LossNeeds(whole_groups=True)),
    (ORPOLossConfig(), LossNeeds(whole_groups=True)),
    (RewardLossConfig(), LossNeeds(head=HeadKind.SEQUENCE, whole_groups=True)),
    (StepLossConfig(), LossNeeds(head=HeadKind.STEPS)),
]


@pytest.mark.parametrize(("options", "needs"), NEEDS)
def test_a_loss_asks_for_what_its_options_read(options: LossSection, needs: LossNeeds) -> None:
    loss: Loss = build_loss(options)
    assert loss.needs == needs
    assert loss.state_dict() == {}
    loss.load_state_dict({})
    if not isinstance(loss, PolicyLoss):
        assert loss.has_gradient(flat(texts(1))[0]) and loss.after_update({}) == {}
        with pytest.raises(ValueError, match="no state"):
            loss.load_state_dict({"coefficient": 1.0})


def test_the_configuration_of_a_run_is_the_options_of_its_loss() -> None:
    assert build_loss(DPOConfig(beta=0.3, model_name_or_path="m", dataset_name="d")).needs.reference


@pytest.mark.parametrize(
    ("label", "logits", "expected"),
    [
        (SampleLabel(reference=math.nan), None, 1),
        (SampleLabel(margin=math.inf), None, 1),
        (None, math.nan, 2),
        (SampleLabel(margin=math.nan), math.nan, 1),
        (SampleLabel(margin=1.0, reference=-3.0), None, None),
    ],
)
def test_what_is_not_finite_is_found_in_labels_and_class_logits(
    label: SampleLabel | None, logits: float | None, expected: int | None
) -> None:
    samples = flat(reward_pairs(1))[:4]
    samples[1] = replace(samples[1], label=label)
    inputs = inputs_of(RewardLossConfig(), samples, classes=1)
    if logits is not None:
        assert inputs.class_logits is not None
        inputs = replace(inputs, class_logits=inputs.class_logits.detach().index_fill(0, torch.tensor([2]), logits))
    assert first_non_finite_sample(inputs) == expected
