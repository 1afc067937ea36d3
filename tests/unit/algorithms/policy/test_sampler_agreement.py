"""How far sampler and learner are apart, by the age of the tokens."""

import math

import numpy as np
import pytest
import torch

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossInputs, StepTotals, sample_tokens
from trl_ray.algorithms.metric_merging import merge_metrics
from trl_ray.algorithms.policy.sampler_agreement import OLDEST, SamplerAgreement
from trl_ray.types import Reduce, TrainingSample

TOTALS = StepTotals(num_valid_tokens=1, num_samples=1, num_micro_batches=1)


def sample(sampler, versions, *, mask=None, old=None, is_label=False):
    length = len(sampler)
    return TrainingSample(
        group_id=0,
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.ones(length, np.bool_) if mask is None else np.array(mask),
        sampler_logprobs=np.array(sampler, np.float32),
        token_versions=None if versions is None else np.array(versions, np.int32),
        old_logprobs=None if old is None else np.array(old, np.float32),
        is_label=is_label,
    )


def found(*given, version=3, has_moved=False, bounds=(0.8, 1.2)):
    """Metrics of micro-batches, each samples with the learner's log-probs of their trained tokens."""
    agreement = SamplerAgreement(version=version, has_moved=has_moved, bounds=bounds, device="cpu")
    for samples, logprobs in given:
        scores = TokenLogprobs(logprobs=torch.tensor(logprobs), entropy=torch.zeros(len(logprobs)))
        agreement.add(
            LossInputs(
                samples=samples,
                tokens=sample_tokens(samples),
                scores=scores,
                micro_batch_tokens=len(logprobs),
                totals=TOTALS,
            )
        )
    return agreement.metrics()


def test_what_is_told_of_the_tokens_of_an_age_is_what_the_formulas_say():
    half, quarter = math.log(0.5), math.log(0.25)
    # x is log 2 where the learner thinks twice as much of the token as the sampler did, and -log 2 at the other.
    metrics = found(([sample([quarter, half], [3, 3])], [half, quarter]))
    values = {name.removeprefix("agreement/age_0/"): metric.value for name, metric in metrics.items()}
    assert values.pop("tokens") == 2
    assert values == pytest.approx(
        {
            "abs_diff": math.log(2),
            "diff": 0.0,
            "k3": ((2 - math.log(2) - 1) + (0.5 + math.log(2) - 1)) / 2,
            "ratio": 1.25,
            "ratio_square": 2.125,
            "beyond_clip": 1.0,
            "doubt": (0.75 + 0.5) / 2,
        },
        abs=1e-6,
    )


def test_ages_are_kept_apart_token_by_token_and_old_ones_joined():
    metrics = found(([sample([-1.0] * 5, [3, 2, 2, 0, 3])], [-1.0, -1.1, -1.2, -1.5, -1.0]), version=3)
    apart = {name: metric for name, metric in metrics.items() if name.endswith(("tokens", "abs_diff"))}
    assert {name: metric.value for name, metric in apart.items()} == pytest.approx(
        {
            "agreement/age_0/tokens": 2.0,
            "agreement/age_0/abs_diff": 0.0,
            "agreement/age_1/tokens": 2.0,
            "agreement/age_1/abs_diff": 0.15,
            "agreement/age_3/tokens": 1.0,
            "agreement/age_3/abs_diff": 0.5,
        },
        abs=1e-6,
    )
    ancient = found(([sample([-1.0, -1.0], [0, 50])], [-1.0, -1.0]), version=100)
    assert {name for name in ancient if name.endswith("tokens")} == {f"agreement/age_{OLDEST}/tokens"}


def test_tokens_that_nobody_sampled_or_by_unknown_or_later_weights_do_not_count():
    nobody = sample([0.0], None)
    label = sample([0.0], [3], is_label=True)
    unknown, later = sample([-1.0], [-1]), sample([-1.0], [4])
    assert found(([nobody, label, unknown, later], [-5.0, -5.0, -5.0, -5.0])) == {}
    masked = sample([-1.0, -1.0], [3, 3], mask=[False, True])
    assert found(([masked], [-1.5]))["agreement/age_0/tokens"].value == 1


def test_once_an_update_of_the_step_has_moved_the_weights_only_a_first_pass_can_tell():
    assert found(([sample([-1.0], [3])], [-9.0]), has_moved=True) == {}
    metrics = found(([sample([-1.0], [3], old=[-1.25])], [-9.0]), has_moved=True)
    assert metrics["agreement/age_0/abs_diff"].value == pytest.approx(0.25)


def test_micro_batches_and_ranks_join_to_the_means_over_all_tokens():
    one, two = ([sample([-1.0], [3])], [-1.3]), ([sample([-1.0] * 3, [3] * 3)], [-1.1] * 3)
    together = found(one, two)
    joined = merge_metrics([found(one), found(two)])
    assert joined.keys() == together.keys()
    for name, metric in together.items():
        assert joined[name].value == pytest.approx(metric.value)
    assert together["agreement/age_0/tokens"].reduce is Reduce.SUM


def test_a_probability_ratio_that_leaves_the_numbers_stays_one():
    metrics = found(([sample([-500.0], [3])], [0.0]))
    assert all(math.isfinite(metric.value) for metric in metrics.values())
