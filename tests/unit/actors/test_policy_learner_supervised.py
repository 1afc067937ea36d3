"""The learner with supervised objectives: exact over micro-batches, resumed bit for bit, undisturbed by evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from supervised_batches import COUNT, batch_of, packed, pairs, rated, reward_pairs, solutions, texts
from tiny_models import build_tiny_model
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.algorithms.batches.example_batches import (
    example_references,
    mismatched_batch,
    mismatched_kl,
    reference_batch,
    with_references,
)
from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    UnpairedLossConfig,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.sections import ModelConfig, NonFinite, SharePrompt, TrainingConfig
from trl_ray.errors import NumericsError
from trl_ray.types import Example, SampleLabel, TrainBatch

Maker = Callable[[int], list[Example]]
MIXTURE = PreferenceLossConfig(
    loss_type=("sigmoid", "ipo", "sft"), loss_weights=(0.7, 0.2, 0.5), ld_alpha=0.5, use_weighting=True
)
OBJECTIVES: dict[str, tuple[LossSection, Maker, dict[str, float]]] = {
    "sft": (SupervisedLossConfig(), texts, {}),
    "sft-smoothed": (SupervisedLossConfig(label_smoothing_factor=0.1), texts, {}),
    "dft": (SupervisedLossConfig(loss_type="dft"), texts, {}),
    "dpo": (PreferenceLossConfig(), pairs, {}),
    "mixture": (MIXTURE, pairs, {}),
    "kto": (UnpairedLossConfig(), rated, {"kl": 0.3}),
    "simpo": (CPOLossConfig(loss_type="simpo"), pairs, {}),
    "orpo": (ORPOLossConfig(), lambda seed: pairs(seed, with_prompt=True), {}),
    "reward": (RewardLossConfig(center_rewards_coefficient=0.01), reward_pairs, {}),
    "prm": (StepLossConfig(), solutions, {}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's directory."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


def build(tiny: str, loss: LossSection, *, model: dict[str, Any] | None = None, **options: Any) -> PolicyLearner:
    # Adam turns any rounding of a gradient near 0 into a whole step; a large epsilon keeps it a rounding.
    training = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1.0} | options.pop("training", {})
    return PolicyLearner(
        model=ModelConfig(model_name_or_path=tiny, gradient_checkpointing=False, **(model or {})),
        training=TrainingConfig(**training),
        loss=loss,
        total_updates=10,
        **options,
    )


def weights(learner: PolicyLearner) -> Tensor:
    return torch.cat([weight.detach().flatten().clone() for _, weight in learner._backend.weights()])


def values(learner: PolicyLearner, batch: TrainBatch) -> tuple[float, float, dict[str, float]]:
    result = learner.step(batch)
    found = {name: metric.value for name, metric in result.metrics.items()}
    return result.loss, result.grad_norm, found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_micro_batch_of_eight_examples_equals_eight_of_one(tiny: str, name: str) -> None:
    loss, make, more = OBJECTIVES[name]
    found = []
    for size in (8, 3, 1):
        learner = build(tiny, loss)
        before = weights(learner)
        # The second update starts from weights that are no longer the reference's.
        steps = [values(learner, batch_of(loss, make(step), step=step, size=size, **more)) for step in (1, 2)]
        found.append((steps, weights(learner), before))
    expected, after, before = found[0]
    assert float((after - before).abs().max()) > 1e-4
    for steps, moved, _ in found[1:]:
        torch.testing.assert_close(moved, after, rtol=0, atol=2e-6)
        for (value, norm, metrics), (wanted, wanted_norm, wanted_metrics) in zip(steps, expected, strict=True):
            assert value == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
            assert metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_sorting_losses_depend_on_how_an_update_is_cut(tiny: str, kind: str) -> None:
    loss = PreferenceLossConfig(loss_type=(kind,), beta=1.0)
    found = []
    for size in (8, 1):
        learner = build(tiny, loss, training={"adam_epsilon": 1e-8})
        learner.step(batch_of(loss, pairs(1), step=1, size=8))  # apart from the reference, or all differences are 0
        found.append(values(learner, batch_of(loss, pairs(2), step=2, size=size))[0])
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("name", ["dpo", "mixture", "orpo", "reward"])
def test_a_pair_that_shares_its_prompt_equals_one_that_computes_it_twice(tiny: str, name: str) -> None:
    loss, make, _ = OBJECTIVES[name]
    found = []
    for share in (SharePrompt.ALWAYS, SharePrompt.NEVER):
        learner = build(tiny, loss, training={"share_prompt": share})
        steps = [values(learner, batch_of(loss, make(step), step=step)) for step in (1, 2)]
        found.append((steps, weights(learner)))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=2e-6)
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
        assert one[1] == pytest.approx(other[1], rel=1e-4)


@pytest.mark.parametrize("share", [SharePrompt.AUTO, SharePrompt.NEVER])
def test_pieces_of_a_packed_row_do_not_see_each_other(tiny: str, share: SharePrompt) -> None:
    loss = SupervisedLossConfig()
    row = packed(1)
    options: dict[str, Any] = {"training": {"share_prompt": share}}
    whole = build(tiny, loss, **options).step(batch_of(loss, [row]))
    total = 0.0
    for piece in row.samples:
        alone = build(tiny, loss, **options).evaluate(batch_of(loss, [Example(row=0, samples=(piece,))]))
        total += alone.loss * int(piece.loss_mask.sum())
    trained = sum(int(piece.loss_mask.sum()) for piece in row.samples)
    assert whole.loss == pytest.approx(total / trained, rel=1e-5)
    assert whole.metrics["mean_token_accuracy"].weight == trained


def poison(examples: Sequence[Example], row: int) -> list[Example]:
    """The reference's log-prob of the second completion of one row is not a number."""
    made = [with_references(example, [-1.0] * len(example.samples)) for example in examples]
    made[row] = with_references(made[row], [-1.0, math.nan])
    return made


def test_a_number_that_is_not_finite_is_traced_to_its_row_and_its_side(tiny: str) -> None:
    loss = PreferenceLossConfig()
    learner = build(tiny, loss)
    before = weights(learner)
    batch = batch_of(loss, poison(pairs(1), 5), size=2)
    result = learner.step(batch)
    assert result.skipped and torch.equal(weights(learner), before)
    (event,) = learner.drain().events
    place = next(i for i, samples in enumerate(batch.micro_batches) if any(one.group_id == 5 for one in samples))
    inside = [one.group_id for one in batch.micro_batches[place]].index(5) + 1
    assert (event.detail["micro_batch"], event.detail["group_id"], event.detail["sample"]) == (place, 5, inside)
    stopping = build(tiny, loss, training={"on_non_finite": NonFinite.STOP})
    with pytest.raises(NumericsError, match="group 5"):
        stopping.step(batch)


def test_a_gradient_that_is_not_finite_is_traced_to_its_pair(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = PreferenceLossConfig()
    learner = build(tiny, loss)
    plain = learner._loss.__class__.__call__

    def treacherous(self: Any, inputs: Any) -> Any:
        output = plain(self, inputs)
        if not any(one.group_id == 3 for one in inputs.samples):
            return output
        return replace(output, loss=output.loss + (inputs.logprobs * 0.0).sum().sqrt())

    monkeypatch.setattr(learner._loss.__class__, "__call__", treacherous)
    assert learner.step(batch_of(loss, pairs(1), size=8)).skipped
    (event,) = learner.drain().events
    assert (event.detail["quantity"], event.detail["group_id"]) == ("gradients", 3)


RESUMED: dict[str, tuple[LossSection, Maker]] = {
    "sft with noise": (SupervisedLossConfig(neftune_noise_alpha=5.0), texts),
    "dpo": (PreferenceLossConfig(), pairs),
    "dpo with a reference that follows": (
        PreferenceLossConfig(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5),
        pairs,
    ),
    "reward": (RewardLossConfig(), reward_pairs),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny: str, tmp_path: Path, name: str) -> None:
    loss, make = RESUMED[name]
    straight = build(tiny, loss)
    for step in (1, 2):
        straight.step(batch_of(loss, make(step), step=step, size=3))
    path = straight.save(str(tmp_path), step=2, extra={})
    expected = [values(straight, batch_of(loss, make(step), step=step, size=3)) for step in (3, 4)]
    torch.manual_seed(99)  # whatever happens in between
    resumed = build(tiny, loss, checkpoint=path)
    actual = [values(resumed, batch_of(loss, make(step), step=step, size=3)) for step in (3, 4)]
    assert actual == expected
    assert torch.equal(weights(resumed), weights(straight))


def test_noise_on_embeddings_is_drawn_anew_in_each_update_and_by_the_seed(tiny: str) -> None:
    loss = SupervisedLossConfig(neftune_noise_alpha=5.0)
    still: dict[str, Any] = {"learning_rate": 1e-30, "weight_decay": 0.0}
    learner = build(tiny, loss, training=still)
    found = [learner.step(batch_of(loss, texts(1), step=step)).loss for step in (1, 2)]
    assert abs(found[0] - found[1]) > 1e-5
    assert build(tiny, loss, training=still).step(batch_of(loss, texts(1))).loss == found[0]
    assert build(tiny, loss, training=still | {"seed": 1}).step(batch_of(loss, texts(1))).loss != found[0]


@pytest.mark.parametrize("name", ["sft with noise", "dpo", "reward"])
def test_evaluating_changes_nothing(tiny: str, name: str) -> None:
    loss, make = RESUMED[name]
    found = []
    for evaluates in (True, False):
        learner = build(tiny, loss)
        learner.step(batch_of(loss, make(1), step=1))
        if evaluates:
            state, before = torch.get_rng_state(), weights(learner)
            evaluations = [learner.evaluate(batch_of(loss, make(7), size=size)) for size in (8, 1)]
            assert torch.equal(torch.get_rng_state(), state) and torch.equal(weights(learner), before)
            assert learner.version == 1 and learner._model.training
            assert evaluations[0].loss == pytest.approx(evaluations[1].loss, rel=1e-5)
        found.append((values(learner, batch_of(loss, make(2), step=2)), weights(learner)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("loss", "model"),
    [(SupervisedLossConfig(neftune_noise_alpha=5.0), {}), (SupervisedLossConfig(), {"use_peft": True})],
)
def test_an_evaluation_has_neither_noise_nor_dropout(tiny: str, loss: LossSection, model: dict[str, Any]) -> None:
    learner = build(tiny, loss, model=model | {"lora_dropout": 0.5}, training={"disable_dropout": False})
    learner.step(batch_of(loss, texts(1)))  # an adapter that has moved
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(learner.evaluate(batch_of(loss, texts(7))).loss)
    assert found[0] == found[1]


def test_an_evaluation_is_the_loss_and_the_metrics_of_a_step_without_the_step(tiny: str) -> None:
    loss = PreferenceLossConfig()
    learner = build(tiny, loss)
    learner.step(batch_of(loss, pairs(1), step=1))
    evaluation = learner.evaluate(batch_of(loss, pairs(2), size=2))
    result = learner.step(batch_of(loss, pairs(2), step=2, size=3))
    assert evaluation.loss == pytest.approx(result.loss, rel=1e-5)
    shared = evaluation.metrics.keys() & result.metrics.keys()
    assert {"rewards/margins", "mean_token_accuracy", "entropy", "logps/chosen"} <= shared
    for name in shared:
        assert evaluation.metrics[name].value == pytest.approx(result.metrics[name].value, rel=1e-4, abs=1e-5)


def references(learner: PolicyLearner, examples: Sequence[Example], ld_alpha: float | None = None) -> list[Example]:
    batch = reference_batch(examples, rules=CutRules(max_examples=3))
    answers = learner.reference_logprobs(batch)
    found = example_references(examples, batch, answers, ld_alpha=ld_alpha)
    return [with_references(example, row) for example, row in zip(examples, found, strict=True)]


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_references_give_the_run_of_a_reference_that_is_held(
    tiny: str, ld_alpha: float | None, adapter: bool
) -> None:
    model = {"use_peft": adapter}
    held = PreferenceLossConfig(ld_alpha=ld_alpha)
    known = PreferenceLossConfig(ld_alpha=ld_alpha, precompute_ref_log_probs=True)
    learner, expected = build(tiny, known, model=model), build(tiny, held, model=model)
    labelled = {step: references(learner, pairs(step), ld_alpha) for step in (1, 2)}
    for step in (1, 2):
        one = values(learner, batch_of(known, labelled[step], step=step, size=3))
        other = values(expected, batch_of(held, pairs(step), step=step, size=3))
        assert one[0] == pytest.approx(other[0], abs=1e-5)
        if step == 1:  # where nothing has moved, rounding decides who wins
            del one[2]["rewards/accuracies"], other[2]["rewards/accuracies"]
        assert one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-4)
    with pytest.raises(AssertionError, match="initial weights"):
        learner.reference_logprobs(reference_batch(pairs(1), rules=CutRules()))
    # One that holds a reference may be asked at any time.
    again = references(expected, pairs(1), ld_alpha)
    for one_example, other_example in zip(again, labelled[1], strict=True):
        for one_sample, other_sample in zip(one_example.samples, other_example.samples, strict=True):
            assert one_sample.label is not None and other_sample.label is not None
            assert one_sample.label.reference == pytest.approx(other_sample.label.reference, abs=1e-4)


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_kl_of_kto_comes_from_the_mismatched_completions_under_the_weights_as_they_are(
    tiny: str, precomputed: bool
) -> None:
    loss = UnpairedLossConfig(beta=0.5, precompute_ref_log_probs=precomputed)
    learner = build(tiny, loss, training={"adam_epsilon": 1e-8})
    examples = {step: references(learner, rated(step)) if precomputed else rated(step) for step in (1, 2)}

    def kl_now(step: int, size: int) -> float:
        batch = mismatched_batch(examples[step], step=step, rules=CutRules(max_examples=size))
        return mismatched_kl(batch, learner.score(batch))

    assert kl_now(1, 8) == pytest.approx(0.0, abs=1e-5)
    learner.step(batch_of(loss, examples[1], step=1, kl=0.0))
    whole = kl_now(1, 8)
    reference = [
        float(np.sum(found))
        for found in build(tiny, loss).reference_logprobs(mismatched_batch(examples[1], step=1, rules=CutRules()))
    ]
    policy = [
        float(score.logprobs.sum()) for score in learner.score(mismatched_batch(examples[1], step=1, rules=CutRules()))
    ]
    assert whole > 0.01
    assert whole == pytest.approx(float(np.mean(policy) - np.mean(reference)), abs=1e-4)
    assert kl_now(1, 1) == pytest.approx(whole, abs=1e-5)
    result = learner.step(batch_of(loss, examples[2], step=2, kl=whole))
    metrics = result.metrics
    assert metrics["kl"].value == pytest.approx(whole)
    margin = metrics["rewards/chosen"].value - metrics["rewards/rejected"].value
    assert metrics["rewards/margins"].value == pytest.approx(margin)


def test_training_a_reward_model_raises_its_accuracy(tiny: str) -> None:
    loss = RewardLossConfig()
    learner = build(tiny, loss, training={"learning_rate": 3e-3, "adam_epsilon": 1e-8, "weight_decay": 0.0})
    held = batch_of(loss, reward_pairs(1))
    before = learner.evaluate(held)
    for step in range(1, 8):
        learner.step(batch_of(loss, reward_pairs(1), step=step))
    after = learner.evaluate(held)
    assert after.loss < 0.5 * before.loss and after.metrics["accuracy"].value == 1.0


def test_reward_models_have_nothing_to_publish_or_to_score(tiny: str) -> None:
    learner = build(tiny, RewardLossConfig())
    for ask in (learner.publish, lambda: learner.weight_check(np.arange(3, dtype=np.int32))):
        with pytest.raises(AssertionError, match="language-model head"):
            ask()
    with pytest.raises(AssertionError, match="language-model head"):
        learner.score(batch_of(RewardLossConfig(), reward_pairs(1)))


def test_examples_without_labels_are_refused_by_losses_that_read_them(tiny: str) -> None:
    loss = UnpairedLossConfig()
    unlabelled = [replace(one, samples=(replace(one.samples[0], label=SampleLabel()),)) for one in rated(1)]
    with pytest.raises(AssertionError, match="good or bad"):
        build(tiny, loss).step(batch_of(loss, unlabelled, kl=0.0))
    assert len(unlabelled) == COUNT
