"""The learner: exact accumulation, bit-for-bit resume, and steps that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import build_tiny_model
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.algorithms.loss import LossInputs, LossOutput
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.losses.policy_options import LossConfig, LossType
from trl_ray.config.sections import ModelConfig, NonFinite, SharePrompt, TrainingConfig
from trl_ray.errors import CheckpointError, NumericsError
from trl_ray.models.weight_payload import named_tensors, verify_checksum
from trl_ray.types import TrainBatch, TrainingSample, WeightPayload


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's directory."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


def _learner(
    tiny: str, *, training: dict[str, Any] | None = None, loss: dict[str, Any] | None = None, **options: Any
) -> PolicyLearner:
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 1}
    return PolicyLearner(
        model=ModelConfig(model_name_or_path=tiny, gradient_checkpointing=False),
        training=TrainingConfig(**defaults | (training or {})),
        loss=LossConfig(**(loss or {})),
        temperature=0.9,
        total_updates=10,
        max_completion_length=6,
        **options,
    )


def _samples(seed: int) -> list[TrainingSample]:
    """Two groups of four completions of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(2):
        prompt = rng.integers(0, 250, 5).astype(np.int32)
        for _ in range(4):
            length = int(rng.integers(1, 7))
            samples.append(
                TrainingSample(
                    group_id=group,
                    prompt_ids=prompt,
                    completion_ids=rng.integers(0, 250, length).astype(np.int32),
                    loss_mask=np.ones(length, dtype=bool),
                    sampler_logprobs=rng.normal(-6, 1, length).astype(np.float32),
                    advantage=float(rng.normal()),
                    min_version=0,
                )
            )
    return samples


def _batch(step: int, samples: Sequence[TrainingSample] | None = None, *, size: int = 4) -> TrainBatch:
    chosen = list(_samples(step) if samples is None else samples)
    return TrainBatch(
        step=step,
        micro_batches=tuple(tuple(chosen[i : i + size]) for i in range(0, len(chosen), size)),
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for sample in chosen),
        num_samples=len(chosen),
        num_micro_batches=-(-len(chosen) // size),
    )


def _weights(payload: WeightPayload) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in named_tensors(payload)])


@pytest.mark.parametrize("loss_type", [LossType.DAPO, LossType.GRPO, LossType.DR_GRPO])
def test_one_micro_batch_of_eight_equals_eight_of_one(tiny: str, loss_type: LossType) -> None:
    results = []
    for size in (8, 4, 1):
        # Adam turns any rounding of a gradient near 0 into a whole step; SGD-like epsilon keeps it a rounding.
        learner = _learner(tiny, training={"adam_epsilon": 1.0, "warmup_steps": 0}, loss={"loss_type": loss_type})
        results.append((learner.step(_batch(1, size=size)), _weights(learner.publish())))
    for result, weights in results[1:]:
        assert result.loss == pytest.approx(results[0][0].loss, abs=1e-6)
        assert result.grad_norm == pytest.approx(results[0][0].grad_norm, rel=1e-5)
        torch.testing.assert_close(weights, results[0][1], rtol=0, atol=1e-6)
        for name in ("entropy", "kl/sampler", "importance/mean", "clip/low"):
            assert result.metrics[name].value == pytest.approx(results[0][0].metrics[name].value, rel=1e-5)


def test_gpu_memory_is_given_back_every_so_many_steps(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    learner = _learner(tiny, training={"torch_empty_cache_steps": 2})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: steps.append(learner.version))
    for step in (1, 2, 3, 4):
        learner.step(_batch(step))
    assert steps == [2, 4]
    learner = _learner(tiny)
    learner.step(_batch(1))
    assert steps == [2, 4]


@pytest.mark.parametrize("tf32", [True, False, None])
def test_products_in_tf32_are_set_where_that_is_said(tiny: str, tf32: bool | None) -> None:
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in libraries]
    try:
        for each in libraries:
            each.allow_tf32 = tf32 is not True
        _learner(tiny, training={"tf32": tf32})
        assert [each.allow_tf32 for each in libraries] == [tf32 is not False] * 2
    finally:
        for each, value in zip(libraries, before, strict=True):
            each.allow_tf32 = value


def test_sharing_prompts_changes_nothing(tiny: str) -> None:
    learners = [
        _learner(tiny, training={"share_prompt": share, "adam_epsilon": 1.0})
        for share in (SharePrompt.ALWAYS, SharePrompt.NEVER)
    ]
    results = [learner.step(_batch(1)) for learner in learners]
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-6)
    torch.testing.assert_close(*[_weights(learner.publish()) for learner in learners], rtol=0, atol=1e-6)


def test_samples_of_advantage_0_give_no_gradient_and_still_count(tiny: str) -> None:
    samples = [replace(s, advantage=0.0) if s.group_id == 0 else s for s in _samples(1)]
    # A KL of almost no weight makes the learner compute all gradients; without it, those of group 0 are left out.
    results = [_learner(tiny, loss={"beta": beta}).step(_batch(1, samples, size=8)) for beta in (0.0, 1e-12)]
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert results[0].metrics["entropy"].value == pytest.approx(results[1].metrics["entropy"].value, rel=1e-5)
    assert results[0].metrics["entropy"].weight == _batch(1, samples).num_valid_tokens


def test_training_raises_the_log_probs_of_good_completions(tiny: str) -> None:
    learner = _learner(tiny)
    sample = replace(_samples(1)[0], advantage=1.0)
    ids = np.concatenate([sample.prompt_ids, sample.completion_ids])
    before = learner.weight_check(ids)
    for step in (1, 2, 3):
        result = learner.step(_batch(step, [sample]))
    after = learner.weight_check(ids)
    assert (before.version, after.version, result.version, learner.version) == (0, 3, 3, 3)
    start = len(sample.prompt_ids) - 1
    assert after.logprobs[start:].sum() > before.logprobs[start:].sum()
    assert result.metrics["tokens/trained"].value == len(sample.completion_ids)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny: str, tmp_path: Path) -> None:
    straight = _learner(tiny)
    for step in (1, 2):
        straight.step(_batch(step))
    path = straight.save(str(tmp_path), step=2, extra={"ledger.json": b"{}"})
    expected = straight.step(_batch(3))
    resumed = _learner(tiny, checkpoint=path)
    assert resumed.version == 2
    actual = resumed.step(_batch(3))
    assert (actual.loss, actual.grad_norm, actual.lr) == (expected.loss, expected.grad_norm, expected.lr)
    assert resumed.publish().identity == straight.publish().identity
    assert Path(path, "ledger.json").exists() and Path(path, "tokenizer.json").exists()


def test_the_reference_is_the_initial_policy_also_after_a_resume(tiny: str, tmp_path: Path) -> None:
    learner = _learner(tiny, loss={"beta": 0.5})
    assert learner.step(_batch(1)).metrics["kl/ref"].value == pytest.approx(0.0, abs=1e-6)
    learner.step(_batch(2))
    resumed = _learner(tiny, loss={"beta": 0.5}, checkpoint=learner.save(str(tmp_path), step=2, extra={}))
    expected, actual = learner.step(_batch(3)), resumed.step(_batch(3))
    assert actual.metrics["kl/ref"].value == expected.metrics["kl/ref"].value > 1e-4


def test_a_damaged_checkpoint_is_refused(tiny: str, tmp_path: Path) -> None:
    path = _learner(tiny).save(str(tmp_path), step=0, extra={})
    Path(path, "trainer_state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt"):
        _learner(tiny, checkpoint=path)


def _poisoned(step: int) -> TrainBatch:
    samples = _samples(step)
    samples[5].sampler_logprobs[0] = math.nan
    return _batch(step, samples)


def test_a_step_that_is_not_finite_is_skipped_and_says_where(tiny: str) -> None:
    learner = _learner(tiny)
    before = learner.publish()
    result = learner.step(_poisoned(1))
    after = learner.publish()
    assert result.skipped and result.version == 1 and math.isnan(result.loss)
    assert torch.equal(_weights(before), _weights(after))
    (event,) = learner.drain().events
    assert event.detail["step"] == 1 and event.detail["micro_batch"] == 1
    assert event.detail["group_id"] == 1 and event.detail["sample"] == 1
    assert not learner.step(_batch(2)).skipped
    assert not torch.equal(_weights(learner.publish()), _weights(after))


class _Treacherous(PolicyLoss):
    """Finite everywhere, but its gradient is not a number for completions of advantage 7."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        output = super().__call__(inputs)
        zero = (inputs.logprobs[inputs.tokens.advantages == 7.0] * 0.0).sum()
        return replace(output, loss=output.loss + (zero.sqrt() if bool((inputs.tokens.advantages == 7.0).any()) else 0))


def test_a_gradient_that_is_not_finite_is_traced_to_its_sample(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ray.algorithms.policy.policy_loss.PolicyLoss", _Treacherous)
    learner = _learner(tiny)
    before = _weights(learner.publish())
    samples = _samples(1)
    samples[6] = replace(samples[6], advantage=7.0)
    result = learner.step(_batch(1, samples))
    assert result.skipped and math.isnan(result.grad_norm) and torch.equal(_weights(learner.publish()), before)
    (event,) = learner.drain().events
    assert event.detail["quantity"] == "gradients"
    assert (event.detail["rank"], event.detail["micro_batch"], event.detail["sample"]) == (0, 1, 2)
    assert not learner.step(_batch(2)).skipped


def test_several_updates_are_one_version(tiny: str) -> None:
    learner = _learner(tiny)
    first = learner.step(replace(_batch(1), is_last_update=False))
    before = _weights(learner.publish())
    second = learner.step(_batch(1))
    assert (first.version, second.version, learner.version) == (0, 1, 1)
    assert not torch.equal(before, _weights(learner.publish()))


def test_a_synchronised_reference_follows_and_is_in_the_checkpoint(tiny: str, tmp_path: Path) -> None:
    loss = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    learner = _learner(tiny, loss=loss)
    for step in (1, 2):
        learner.step(_batch(step))
    path = learner.save(str(tmp_path), step=2, extra={})
    resumed = _learner(tiny, loss=loss, checkpoint=path)
    frozen = _learner(tiny, loss={"beta": 0.5}, checkpoint=path)
    scores = [one.score(_batch(3))[0].reference_logprobs for one in (learner, resumed, frozen)]
    assert np.array_equal(scores[0], scores[1])
    assert not np.allclose(scores[0], scores[2])
    results = [one.step(_batch(3)) for one in (learner, resumed)]
    assert results[0].loss == results[1].loss
    assert torch.equal(_weights(learner.publish()), _weights(resumed.publish()))


def test_the_adaptive_entropy_bonus_is_in_the_checkpoint(tiny: str, tmp_path: Path) -> None:
    loss = {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 9.0}
    learner = _learner(tiny, loss=loss)
    assert learner.step(_batch(1)).metrics["entropy_coef"].value == pytest.approx(0.015)
    resumed = _learner(tiny, loss=loss, checkpoint=learner.save(str(tmp_path), step=1, extra={}))
    assert resumed.step(_batch(2)).metrics["entropy_coef"].value == pytest.approx(0.02)


def test_stop_raises_and_leaves_weights_and_version_as_they_were(tiny: str) -> None:
    learner = _learner(tiny, training={"on_non_finite": NonFinite.STOP})
    before = _weights(learner.publish())
    with pytest.raises(NumericsError, match="step 1, rank 0, micro-batch 1, group 1, sample 1"):
        learner.step(_poisoned(1))
    assert learner.version == 0 and torch.equal(_weights(learner.publish()), before)
    assert not learner.step(_batch(1)).skipped


def test_too_many_skipped_steps_in_a_row_stop_the_run(tiny: str) -> None:
    learner = _learner(tiny, training={"max_skipped_steps": 2})
    for step in (1, 2):
        assert learner.step(_poisoned(step)).skipped
    with pytest.raises(NumericsError, match=r"max_skipped_steps allows 2\. Begin a new run with model_name_or_path"):
        learner.step(_poisoned(3))


def test_published_weights_name_tied_tensors_once_and_health_reports_them(tiny: str) -> None:
    learner = _learner(tiny)
    payload = learner.publish()
    verify_checksum(payload)
    names = [entry.name for entry in payload.manifest]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    health = learner.health()
    assert (health.version, health.checksum, health.busy_since) == (0, payload.identity.checksum, None)
    assert [span.name for span in learner.drain().spans] == ["publish"] and not learner.drain().spans
    learner.close()


def test_steps_come_in_order(tiny: str) -> None:
    with pytest.raises(AssertionError, match="does not follow"):
        _learner(tiny).step(_batch(2))


def test_training_passes_are_held_against_evaluation_over_the_longest_text(tiny: str) -> None:
    learner = _learner(tiny)
    short, long = np.arange(8, dtype=np.int32), np.arange(100, dtype=np.int32) % 90
    check = learner.weight_check(short, further=(long,), asks_training=True)
    assert [len(text.logprobs) for text in check.further] == [99]
    np.testing.assert_array_equal(check.further[0].logprobs, learner.weight_check(long).logprobs)
    assert check.training is not None and check.training.mean < 1e-5 and check.training.between_passes == 0.0
    assert learner.weight_check(short).training is None
    # Whoever asks again finds the model in training mode, and the random state where it was.
    assert learner._model.training
