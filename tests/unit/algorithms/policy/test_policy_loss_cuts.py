"""How an update is cut into micro-batches and ranks changes neither loss, gradient nor metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossInputs, StepTotals, sample_tokens
from trl_ray.algorithms.metric_merging import merge_metrics
from trl_ray.algorithms.policy.first_pass import with_scores
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.types import Metric, SampleScores, TrainBatch, TrainingSample

CUTS = {"1 x 8": [8], "8 x 1": [1] * 8, "2 x 4": [4, 4], "ragged": [1, 5, 2]}
OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "rloo": {"loss_type": "grpo", "importance_sampling_level": "sequence_product"},
    "everything": {
        "delta": 1.4,
        "off_policy_mask_threshold": 0.05,
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.3,
        "beta": 0.2,
        "vllm_importance_sampling_mode": "sequence_truncate",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Computed:
    loss: float
    logprobs: Tensor
    """[tokens] gradient."""
    entropy: Tensor
    """[tokens] gradient."""
    metrics: dict[str, Metric]


def _samples(loss: LossConfig) -> list[TrainingSample]:
    """Eight, of 1 to 9 tokens, one of them masked out; scored by a first pass."""
    rng = np.random.default_rng(3)
    samples, scores = [], []
    for number in range(8):
        length = int(rng.integers(1, 10))
        old = rng.normal(-2, 1, length).astype(np.float32)
        samples.append(
            TrainingSample(
                group_id=number // 4,
                prompt_ids=np.array([1], dtype=np.int32),
                completion_ids=np.arange(length, dtype=np.int32),
                loss_mask=np.full(length, number != 5),
                sampler_logprobs=(old + rng.normal(0, 0.3, length)).astype(np.float32),
                advantage=0.0 if number == 2 else float(rng.normal()),
                min_version=0,
            )
        )
        scores.append(
            SampleScores(
                logprobs=old,
                entropy=rng.uniform(0, 2, length).astype(np.float32),
                reference_logprobs=(old + rng.normal(0, 0.3, length)).astype(np.float32),
            )
        )
    return with_scores(samples, scores, loss=loss, updates_per_step=2)


def _batch(samples: Sequence[TrainingSample], sizes: Sequence[int]) -> TrainBatch:
    ends = np.cumsum(sizes)
    kept = [int(sample.surrogate_mask.sum()) for sample in samples if sample.surrogate_mask is not None]
    return TrainBatch(
        step=1,
        micro_batches=tuple(tuple(samples[end - size : end]) for size, end in zip(sizes, ends.tolist(), strict=True)),
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for sample in samples),
        num_samples=len(samples),
        num_micro_batches=len(sizes),
        num_surrogate_tokens=sum(kept) if kept else None,
    )


def _double(tokens: Any) -> Any:
    """Streams in float64, so that only the order of sums can differ."""
    values = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    return dataclasses.replace(
        tokens,
        **{name: v.double() for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()},
    )


def _compute(options: dict[str, Any], sizes: Sequence[int]) -> Computed:
    config = LossConfig(**options)
    loss, batch = PolicyLoss(config=config, max_completion_length=9), _batch(_samples(config), sizes)
    totals, rng = StepTotals.of(batch), np.random.default_rng(4)
    value, metrics, gradients = 0.0, [], []
    for samples in batch.micro_batches:
        trained = [sample for sample in samples if sample.loss_mask.any()]
        if not trained:
            continue
        drift = np.concatenate([rng.normal(0, 0.3, int(sample.loss_mask.sum())) for sample in trained])
        tokens = _double(sample_tokens(samples))
        logprobs = (tokens.old_logprobs + torch.from_numpy(drift)).requires_grad_()
        entropy = (1 + torch.sin(logprobs.detach())).requires_grad_()
        reference = np.concatenate(
            [s.reference_logprobs[s.loss_mask] for s in trained if s.reference_logprobs is not None]
        )
        output = loss(
            LossInputs(
                tokens=tokens,
                scores=TokenLogprobs(logprobs=logprobs, entropy=entropy),
                reference_logprobs=torch.from_numpy(reference).double(),
                micro_batch_tokens=len(drift),
                totals=totals,
            )
        )
        found = torch.autograd.grad(output.loss, [logprobs, entropy], allow_unused=True)
        gradients.append([torch.zeros_like(logprobs) if one is None else one for one in found])
        value += output.loss.item()
        metrics.append(output.metrics)
    return Computed(
        loss=value,
        logprobs=torch.cat([pair[0] for pair in gradients]),
        entropy=torch.cat([pair[1] for pair in gradients]),
        metrics=merge_metrics(metrics),
    )


@pytest.mark.parametrize("cut", list(CUTS)[1:])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_cut_changes_nothing(name: str, cut: str) -> None:
    whole, parts = _compute(OPTIONS[name], CUTS["1 x 8"]), _compute(OPTIONS[name], CUTS[cut])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.entropy, whole.entropy, rtol=1e-12, atol=1e-14)
    assert whole.logprobs.count_nonzero() > 10
    assert parts.metrics.keys() == whole.metrics.keys()
    for key in whole.metrics.keys() - {"importance/ess"}:  # no mean: a ratio of sums
        assert parts.metrics[key].value == pytest.approx(whole.metrics[key].value, rel=1e-9), key


def test_bnpo_depends_on_the_cut_by_definition() -> None:
    # two micro-batches of token means, one with 1 token of loss -2, one with 3 tokens of loss 1
    def sample(length: int, advantage: float) -> TrainingSample:
        return TrainingSample(
            group_id=0,
            prompt_ids=np.array([1], dtype=np.int32),
            completion_ids=np.arange(length, dtype=np.int32),
            loss_mask=np.ones(length, dtype=bool),
            sampler_logprobs=np.full(length, -1.0, dtype=np.float32),
            advantage=advantage,
            min_version=0,
        )

    def value(sizes: Sequence[int]) -> float:
        batch = _batch([sample(1, 2.0), sample(3, -1.0)], sizes)
        total = 0.0
        for samples in batch.micro_batches:
            tokens = sample_tokens(samples)
            assert tokens.sampler_logprobs is not None
            count = len(tokens.sampler_logprobs)
            inputs = LossInputs(
                tokens=tokens,
                scores=TokenLogprobs(logprobs=tokens.sampler_logprobs.clone(), entropy=torch.zeros(count)),
                reference_logprobs=None,
                micro_batch_tokens=count,
                totals=StepTotals.of(batch),
            )
            total += PolicyLoss(config=LossConfig(loss_type="bnpo"), max_completion_length=9)(inputs).loss.item()
        return total

    assert value([2]) == pytest.approx((-2 + 3) / 4)
    assert value([1, 1]) == pytest.approx((-2 + 1) / 2)
