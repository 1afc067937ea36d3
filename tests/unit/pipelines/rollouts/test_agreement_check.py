"""When sampler and learner count as two policies, and what is said to be wrong with them."""

import dataclasses

import numpy as np
import pytest

from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.pipelines.rollouts.agreement_check import AgreementCheck, Cause, Evidence
from trl_ray.types import Metric, SamplingGap, StepResult, TrainingGap

AGREE = Evidence(weights=1e-6, own_files=1e-6, training=TrainingGap(mean=1e-6, between_passes=0.0))


def config(**changes):
    return GRPOConfig(**{"disable_dropout": True, **changes})


def result(level=1e-6, *, age=0, tokens=128, diff=0.0, doubt=0.5, ess=1.0, skipped=False, beyond=0.0):
    """What a step found, by its level: mean |x| / mean doubt."""
    values = {
        "tokens": tokens,
        "abs_diff": level * doubt,
        "diff": diff,
        "k3": 0.0,
        "ratio": ess**0.5,
        "ratio_square": 1.0,
        "beyond_clip": beyond,
        "doubt": doubt,
    }
    metrics = {f"agreement/age_{age}/{name}": Metric(value=value) for name, value in values.items()}
    return StepResult(version=1, loss=0.0, grad_norm=1.0, lr=0.1, skipped=skipped, metrics=metrics)


def said(level, *, diff=0.0, tokens=128, doubt=0.5):
    """Evidence of an engine that says afterwards of tokens what it did not say as it sampled them."""
    gap = SamplingGap(version=3, tokens=tokens, abs_diff=level * doubt, diff=diff, doubt=doubt)
    return dataclasses.replace(AGREE, sampling=(gap,))


def breaches(check, *results, evidence=AGREE):
    return [each for step, one in enumerate(results, 1) for each in check.observe(step, one, evidence).breaches]


def test_float32_must_agree_from_the_first_step_on_and_stops_at_the_first_that_does_not():
    [breach] = breaches(AgreementCheck(config()), result(2e-3))
    assert breach.stops and "at the first step" in breach.detail
    check = AgreementCheck(config())
    assert breaches(check, *[result(1e-6)] * 5) == []
    [breach] = breaches(check, result(3e-4))
    assert breach.stops and "1e-06 at version 0" in breach.detail


def test_other_formats_are_held_against_what_they_showed_at_version_0_twice_and_warn():
    check = AgreementCheck(config(dtype="bfloat16"))
    # 4 x 0.03 is the limit; 0.2 would be the ceiling.
    assert breaches(check, result(0.03), result(0.11), result(0.15), result(0.02), result(0.15)) == []
    [breach] = breaches(check, result(0.15))
    assert not breach.stops


@pytest.mark.parametrize(("asked", "dtype", "stops"), [("warn", "float32", False), ("stop", "bfloat16", True)])
def test_what_a_breach_does_can_be_asked_for(asked, dtype, stops):
    check = AgreementCheck(config(dtype=dtype, rollout={"on_disagreement": asked}))
    [breach] = breaches(check, result(0.5))
    assert breach.stops is stops


def test_a_step_of_few_tokens_or_one_that_was_skipped_is_not_judged_and_sets_no_baseline():
    check = AgreementCheck(config())
    assert breaches(check, result(1.0, tokens=63), result(1.0, skipped=True)) == []
    assert check.state_dict() == {}


def test_a_resumed_run_is_judged_against_the_baseline_it_began_with_and_not_before_its_first_step():
    first = AgreementCheck(config(dtype="bfloat16"))
    breaches(first, result(0.01))
    check = AgreementCheck(config(dtype="bfloat16"), first_step=3)
    check.load_state_dict(first.state_dict())
    assert breaches(check, result(0.1), result(0.1), result(0.1)) == []
    assert len(breaches(check, *[result(0.02)] * 3, result(0.1), result(0.1))) == 1


def test_a_warning_is_told_again_only_when_it_has_become_twice_as_bad():
    check = AgreementCheck(config(rollout={"on_disagreement": "warn"}))
    assert len(breaches(check, result(1e-6), *[result(0.01)] * 9)) == 1
    assert len(breaches(check, result(0.03))) == 1


@pytest.mark.parametrize(
    ("given", "evidence", "cause", "words"),
    [
        ({"diff": -0.1}, AGREE, Cause.SAMPLING, "left out"),
        ({}, AGREE, Cause.SAMPLING, "another distribution"),
        ({}, Evidence(weights=0.1, own_files=1e-6), Cause.WEIGHTS, "arrived and are not computed with"),
        ({}, Evidence(weights=0.1, own_files=0.1), Cause.NUMERICS, "numerics differ"),
        ({}, Evidence(training=TrainingGap(mean=0.2, between_passes=0.0)), Cause.TRAINING, "share a row"),
        ({}, Evidence(training=TrainingGap(mean=0.2, between_passes=0.2)), Cause.TRAINING, "dropout is on"),
        ({}, Evidence(), Cause.UNKNOWN, "canary_every"),
    ],
    ids=["left-out", "reshaped", "weights", "numerics", "packing", "dropout", "unknown"],
)
def test_each_cause_has_words_of_its_own(given, evidence, cause, words):
    found = breaches(
        AgreementCheck(config(rollout={"on_disagreement": "warn"})), result(0.2, **given), evidence=evidence
    )
    assert cause in [breach.cause for breach in found]
    assert any(words in breach.detail for breach in found)


def test_the_learner_against_itself_needs_no_token_of_age_0():
    evidence = Evidence(training=TrainingGap(mean=0.05, between_passes=0.05))
    [breach] = breaches(AgreementCheck(config()), result(0.5, age=1), evidence=evidence)
    assert breach.cause is Cause.TRAINING and breach.stops
    # In bfloat16 that is below what numerics may do, but lots are drawn all the same.
    [breach] = breaches(AgreementCheck(config(dtype="bfloat16")), result(0.5, age=1), evidence=evidence)
    assert breach.cause is Cause.TRAINING and not breach.stops


def test_what_was_asked_for_is_said_and_does_not_end_the_run():
    evidence = Evidence(training=TrainingGap(mean=0.05, between_passes=0.05))
    [breach] = breaches(AgreementCheck(config(disable_dropout=False)), result(), evidence=evidence)
    assert not breach.stops and "disable_dropout=true" in breach.detail


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"top_p": 0.7}, "top_p=0.7"), ({"vllm_structured_outputs_regex": "[a-c]+"}, "structured_outputs")],
    ids=str,
)
def test_options_that_reshape_sampling_are_named_and_excuse_nothing_as_their_log_probs_are_the_policys(changes, named):
    [breach] = breaches(AgreementCheck(config(**changes)), result(0.3, diff=-0.14))
    assert breach.stops and f"asked for: {named}, with the policy's log-probs" in breach.detail


MOVED = result(0.5, age=1, diff=-0.25)
"""Tokens of age 1 alone, of which the policy made all less probable: no cause of itself."""


@pytest.mark.parametrize(
    ("diff", "words"), [(-0.1, "tokens were left out of it"), (0.0, "another distribution than temperature alone")]
)
def test_an_engine_that_samples_by_another_distribution_than_it_says_is_told_without_a_token_of_age_0(diff, words):
    check = AgreementCheck(config())
    assert breaches(check, MOVED, MOVED, evidence=said(2e-6)) == []
    [breach] = breaches(check, MOVED, evidence=said(0.2, diff=diff))
    assert breach.cause is Cause.SAMPLING and breach.stops
    assert words in breach.detail and "tokens of version 3" in breach.detail and "after 2e-06" in breach.detail


def test_an_engine_is_judged_once_for_each_check_and_in_half_precision_by_two_in_a_row():
    check = AgreementCheck(config(dtype="bfloat16"))
    assert breaches(check, MOVED, evidence=said(0.03)) == []
    high = said(0.3, diff=-0.15)
    assert breaches(check, MOVED, MOVED, MOVED, evidence=high) == []
    [breach] = breaches(check, MOVED, evidence=said(0.3, diff=-0.15))
    assert breach.cause is Cause.SAMPLING and not breach.stops


def test_of_several_engines_new_figures_are_judged_beside_old_ones():
    check = AgreementCheck(config(rollout={"on_disagreement": "warn"}))
    [bad], [good], [worse] = said(0.2).sampling, said(1e-6).sampling, said(0.9).sampling
    assert len(breaches(check, MOVED, evidence=Evidence(sampling=(good, bad)))) == 1
    assert breaches(check, MOVED, evidence=Evidence(sampling=(good, bad))) == []
    assert breaches(check, MOVED, evidence=Evidence(sampling=(*said(1e-6).sampling, bad))) == []
    assert len(breaches(check, MOVED, evidence=Evidence(sampling=(worse, bad)))) == 1


def test_few_tokens_of_an_engine_are_not_judged_and_its_baseline_goes_into_checkpoints():
    check = AgreementCheck(config(dtype="bfloat16"))
    assert breaches(check, MOVED, evidence=said(0.5, tokens=63)) == []
    assert breaches(check, MOVED, evidence=said(0.03)) == []
    assert check.state_dict() == {"engines": pytest.approx(0.03)}
    resumed = AgreementCheck(config(dtype="bfloat16"))
    resumed.load_state_dict(check.state_dict())
    assert breaches(resumed, MOVED, evidence=said(0.13)) == []
    assert len(breaches(resumed, MOVED, evidence=said(0.13))) == 1


def test_a_policy_that_moved_too_far_is_told_once_it_did_so_three_times_in_a_row():
    check, far = AgreementCheck(config()), result(1.0, age=2, ess=0.014, beyond=0.6)
    assert breaches(check, far, far, result(0.1, age=2, ess=0.5), far, far) == []
    [breach] = breaches(check, far)
    assert breach.cause is Cause.POLICY and not breach.stops
    assert "age 2" in breach.detail and "60 %" in breach.detail
    assert breaches(check, far, far) == []


def test_the_line_of_a_step_has_sample_sizes_and_not_what_led_to_them():
    agreement = AgreementCheck(config()).observe(1, result(1e-6, ess=0.25), AGREE)
    assert agreement.metrics["agreement/age_0/ess"].value == pytest.approx(0.25)
    assert not any(name.endswith(("ratio", "ratio_square", "doubt")) for name in agreement.metrics)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 5e-6), ("bfloat16", 3e-2)])
def test_a_long_clean_run_gives_no_alarm_whatever_its_entropy_does(dtype, error):
    """Errors of logits with heavy tails; the policy goes from unsure to sure and back, with 64 tokens a step."""
    random = np.random.default_rng(0)
    check = AgreementCheck(config(dtype=dtype))
    for step in range(1, 3001):
        sureness = 1.5 + 1.4 * np.sin(step / 200)
        p = random.beta(0.3 * 4**sureness, 1.0, size=64)
        x, y = (error * (1 - p) * random.standard_t(4, size=64) for _ in range(2))
        doubt = np.maximum(1 - p, 0.05)
        step_result = result(np.abs(x).mean() / doubt.mean(), tokens=64, diff=x.mean(), doubt=doubt.mean())
        # Every other step has nothing but tokens of a policy that has moved, at times far and all in one direction.
        if step % 2:
            drift = random.choice([0.01, 0.1, 1.0])
            step_result = result(drift, age=1, diff=-0.5 * drift)
        evidence = said(np.abs(y).mean() / doubt.mean(), diff=y.mean(), tokens=64, doubt=doubt.mean())
        assert check.observe(step, step_result, evidence).breaches == (), step


def test_the_numbers_of_the_rule():
    exact = AgreementRule.of(config())
    assert (exact.limit(None), exact.limit(1e-6), exact.limit(1e-4), exact.limit(1.0)) == (1e-3, 2e-4, 4e-4, 1e-3)
    assert not AgreementRule.of(config(load_in_4bit=True, use_peft=True)).is_exact
    half = AgreementRule.of(config(bf16=True))
    assert (half.limit(None), half.limit(1e-3), half.limit(0.01), half.limit(1.0)) == (0.2, 0.02, 0.04, 0.2)
