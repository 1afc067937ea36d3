"""The reference of each kind scores with the initial weights, and only the synchronised one moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_models import build_tiny_model
from trl_ray.config.base import Section
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    PreferenceLossType,
    UnpairedLossConfig,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.runs.dataset_config import DPOConfig
from trl_ray.config.sections import Dtype, ModelConfig, SharePrompt, TrainingConfig
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.companions.companion import Companion
from trl_ray.models.companions.reference import ReferenceKind, build_reference, reference_kind
from trl_ray.models.policy_loading import Policy, load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.types import TrainingSample

BETA = LossConfig(beta=0.1)
SYNC = LossConfig(beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with biases and tied embeddings."""
    return build_tiny_model(tmp_path_factory.mktemp("reference") / "tiny")


def samples() -> list[TrainingSample]:
    def sample(group: int, prompt: list[int], completion: list[int]) -> TrainingSample:
        return TrainingSample(
            group_id=group,
            prompt_ids=np.array(prompt, dtype=np.int32),
            completion_ids=np.array(completion, dtype=np.int32),
            loss_mask=np.array([token != 9 for token in completion]),
            sampler_logprobs=np.zeros(len(completion), dtype=np.float32),
            advantage=1.0,
            min_version=0,
        )

    return [sample(0, [5, 6, 7], [8, 9, 10]), sample(0, [5, 6, 7], [11, 12]), sample(1, [3], [40, 41, 42])]


class Learner:
    """What a learner holds: the policy with its scorer, and the reference."""

    def __init__(self, model: ModelConfig, loss: Section, *, path: str | None = None, **options: Any) -> None:
        training = TrainingConfig(share_prompt=SharePrompt.NEVER)
        self.policy = load_policy(model, path=path, with_reference=True, **options)
        module = ScoringModule(self.policy, chunk_size=None)
        self.scorer = SampleScorer(module, share_prompt=training.share_prompt, temperature=0.7)
        self.reference = build_reference(
            model=model,
            training=training,
            loss=loss,
            temperature=0.7,
            device="cpu",
            policy=self.policy,
            scorer=self.scorer,
        )

    def own(self) -> Tensor:
        with torch.no_grad():
            logprobs = self.scorer.logprobs(samples())
        assert logprobs is not None
        return logprobs

    @property
    def held(self) -> Companion:
        assert self.reference is not None
        return self.reference

    def ref(self) -> Tensor:
        logprobs = self.held.logprobs(samples())
        assert logprobs is not None and not logprobs.requires_grad
        return logprobs


def config(path: str, **changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=path, **{"gradient_checkpointing": False} | changes)


def move(policy: Policy) -> None:
    """Change all that is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def test_each_kind_is_what_the_options_ask_for(tiny: str) -> None:
    full, adapter = config(tiny), config(tiny, use_peft=True)
    assert reference_kind(full, LossConfig(beta=0.0)) is ReferenceKind.NONE
    assert reference_kind(adapter, LossConfig(beta=0.0)) is ReferenceKind.NONE
    assert reference_kind(full, BETA) is ReferenceKind.FROZEN
    assert reference_kind(full, SYNC) is ReferenceKind.SYNCHRONISED
    assert reference_kind(adapter, BETA) is ReferenceKind.ADAPTER
    with pytest.raises(ConfigError, match="sync_ref_model"):
        reference_kind(adapter, SYNC)


def test_each_kind_is_what_the_options_of_preference_losses_ask_for(tiny: str) -> None:
    full, adapter = config(tiny), config(tiny, use_peft=True)
    sft_only = (PreferenceLossType.SIGMOID, PreferenceLossType.SFT)
    for model, held in ((full, ReferenceKind.FROZEN), (adapter, ReferenceKind.ADAPTER)):
        assert reference_kind(model, PreferenceLossConfig()) is held
        assert reference_kind(model, UnpairedLossConfig()) is held
        for loss in (PreferenceLossConfig, UnpairedLossConfig):
            assert reference_kind(model, loss(precompute_ref_log_probs=True)) is ReferenceKind.PRECOMPUTED
        unread = PreferenceLossConfig(loss_type=sft_only, loss_weights=(0.0, 1.0))
        assert reference_kind(model, unread) is ReferenceKind.NONE
        for without in (SupervisedLossConfig(), CPOLossConfig(), ORPOLossConfig(), RewardLossConfig()):
            assert reference_kind(model, without) is ReferenceKind.NONE
    moving = PreferenceLossConfig(sync_ref_model=True)
    assert reference_kind(full, moving) is ReferenceKind.SYNCHRONISED
    with pytest.raises(ConfigError, match="sync_ref_model"):
        reference_kind(adapter, moving)
    assert reference_kind(full, DPOConfig(precompute_ref_log_probs=True)) is ReferenceKind.PRECOMPUTED


def test_preference_losses_move_their_copy_as_they_say(tiny: str) -> None:
    loss = PreferenceLossConfig(sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=3)
    learner = Learner(config(tiny), loss)
    copy = dict(learner.held._policy.named_parameters())
    with torch.no_grad():
        copy["model.norm.weight"].fill_(2.0)
        learner.policy.get_parameter("model.norm.weight").fill_(10.0)
    assert [step for step in range(1, 4) if learner.held.is_due(step)] == [3]
    learner.held.after_step(3, learner.policy.named_parameters())
    assert copy["model.norm.weight"].unique().tolist() == [4.0]  # 0.75 * 2 + 0.25 * 10


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_precomputed_reference_is_asked_of_the_initial_policy_and_none_is_held(tiny: str, use_peft: bool) -> None:
    expected = Learner(config(tiny), PreferenceLossConfig()).ref()
    learner = Learner(config(tiny, use_peft=use_peft), UnpairedLossConfig(precompute_ref_log_probs=True))
    assert learner.reference is None
    found = Companion(learner.policy, learner.scorer).logprobs(samples())
    assert found is not None and torch.equal(found, expected)
    assert not found.requires_grad and learner.policy.training


def test_an_adapter_that_training_starts_from_is_part_of_the_initial_reference(tiny: str, tmp_path: Path) -> None:
    first = Learner(config(tiny, use_peft=True), BETA)
    move(first.policy)
    save_adapter(first.policy, tmp_path)
    model = config(str(tmp_path), use_peft=True)
    policy = load_policy(model)  # without holding the adapter twice
    scorer = SampleScorer(ScoringModule(policy, chunk_size=None), share_prompt=SharePrompt.NEVER, temperature=0.7)
    found = Companion(policy, scorer).logprobs(samples())
    assert found is not None and torch.equal(found, Learner(model, BETA).ref())


def test_without_beta_none_is_held(tiny: str) -> None:
    assert Learner(config(tiny), LossConfig(beta=0.0)).reference is None


def test_a_reference_that_does_not_move_is_not_to_be_moved(tiny: str) -> None:
    reference = Learner(config(tiny), BETA).held
    assert not reference.is_due(512)
    with pytest.raises(AssertionError, match="does not move"):
        reference.after_step(512, [])


def test_a_frozen_copy_keeps_the_initial_scores_bit_for_bit(tiny: str) -> None:
    learner = Learner(config(tiny), BETA)
    initial = learner.own()
    assert torch.equal(learner.ref(), initial)
    move(learner.policy)
    assert torch.equal(learner.ref(), initial) and not torch.allclose(learner.own(), initial, atol=1e-2)
    assert not learner.held.is_due(512)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "lora_modules_to_save": ["norm"]}])
def test_the_policy_without_its_adapter_scores_as_the_base_model_bit_for_bit(
    tiny: str, changes: dict[str, Any]
) -> None:
    base = Learner(config(tiny), LossConfig(beta=0.0)).own()
    learner = Learner(config(tiny, use_peft=True, **changes), BETA)
    move(learner.policy)
    own = learner.own()
    assert torch.equal(learner.ref(), base) and not torch.allclose(own, base, atol=1e-2)
    assert torch.equal(learner.own(), own) and learner.policy.training


def test_dropout_takes_no_part_in_the_reference(tiny: str, tmp_path: Path) -> None:
    base = Learner(config(tiny), LossConfig(beta=0.0)).own()
    shutil.copytree(tiny, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.5}))
    learner = Learner(config(str(tmp_path / "m"), use_peft=True), BETA, disable_dropout=False)
    assert learner.policy.training and not torch.allclose(learner.own(), base, atol=1e-2)
    assert torch.equal(learner.ref(), base) and learner.policy.training


def test_scoring_with_the_reference_costs_the_adapter_no_gradient(tiny: str) -> None:
    learner = Learner(config(tiny, use_peft=True), BETA)
    move(learner.policy)
    learner.ref()
    logprobs = learner.scorer.logprobs(samples())
    assert logprobs is not None
    logprobs.sum().backward()
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_a_continued_adapter_is_held_against_itself_as_it_was_also_on_resume(tiny: str, tmp_path: Path) -> None:
    first = Learner(config(tiny, use_peft=True), BETA)
    move(first.policy)
    initial = first.own()
    for folder in ("start", "checkpoint"):
        (tmp_path / folder).mkdir()
        save_adapter(first.policy, tmp_path / folder)
        move(first.policy)
    model = config(str(tmp_path / "start"), use_peft=True)
    learner = Learner(model, BETA, path=str(tmp_path / "checkpoint"))
    assert torch.equal(learner.ref(), initial) and not torch.allclose(learner.own(), initial, atol=1e-2)


def test_the_reference_is_the_initial_model_also_where_a_run_goes_on(tiny: str, tmp_path: Path) -> None:
    first = Learner(config(tiny), BETA)
    initial = first.own()
    move(first.policy)
    first.policy.save_pretrained(tmp_path / "step-1")
    learner = Learner(config(tiny), BETA, path=str(tmp_path / "step-1"))
    assert torch.equal(learner.own(), first.own()) and torch.equal(learner.ref(), initial)


def test_the_synchronised_copy_mixes_every_third_step(tiny: str) -> None:
    learner = Learner(config(tiny), SYNC)
    before = {name: weight.detach().clone() for name, weight in learner.policy.named_parameters()}
    move(learner.policy)
    assert [step for step in range(1, 4) if learner.held.is_due(step)] == [3]
    learner.held.after_step(3, learner.policy.named_parameters())
    assert [step for step in range(4, 7) if learner.held.is_due(step)] == [6]
    copy = dict(learner.held._policy.named_parameters())
    for name, weight in learner.policy.named_parameters():
        assert torch.allclose(copy[name], 0.75 * before[name] + 0.25 * weight, atol=1e-6)
        assert not copy[name].requires_grad


def test_the_mix_of_one_weight_is_the_number_computed_by_hand(tiny: str) -> None:
    learner = Learner(config(tiny), SYNC)
    copy = dict(learner.held._policy.named_parameters())
    with torch.no_grad():
        copy["model.norm.weight"].fill_(2.0)
        learner.policy.get_parameter("model.norm.weight").fill_(10.0)
    learner.held.after_step(3, learner.policy.named_parameters())
    assert copy["model.norm.weight"].unique().tolist() == [4.0]  # 0.75 * 2 + 0.25 * 10
    learner.held.after_step(6, learner.policy.named_parameters())
    assert copy["model.norm.weight"].unique().tolist() == [5.5]  # 0.75 * 4 + 0.25 * 10


def test_the_synchronised_copy_goes_on_from_its_checkpoint_bit_for_bit(tiny: str, tmp_path: Path) -> None:
    learner = Learner(config(tiny), SYNC)
    move(learner.policy)
    learner.held.after_step(3, learner.policy.named_parameters())
    learner.held.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors")), "engines would take them for the policy's"
    resumed = Learner(config(tiny), SYNC)
    assert not torch.equal(resumed.ref(), learner.ref())
    resumed.held.load(tmp_path, step=3)
    assert torch.equal(resumed.ref(), learner.ref())


def test_a_mix_with_other_weights_or_out_of_turn_is_a_broken_promise(tiny: str) -> None:
    learner = Learner(config(tiny), SYNC)
    weights = list(learner.policy.named_parameters())
    wrong = {"did not send": weights[1:], "came twice": [*weights, weights[0]], "or": [("unknown", weights[0][1])]}
    for step, (says, each) in enumerate(wrong.items(), start=1):
        with pytest.raises(AssertionError, match=says):
            learner.held.after_step(3 * step, each)
    with pytest.raises(AssertionError, match="not due after step 10"):
        learner.held.after_step(10, weights)


def test_a_synchronised_copy_of_an_old_checkpoint_goes_on_at_the_step_of_the_checkpoint(
    tiny: str, tmp_path: Path
) -> None:
    learner = Learner(config(tiny), SYNC)
    move(learner.policy)
    learner.held.after_step(3, learner.policy.named_parameters())
    learner.held.save(tmp_path)
    file = tmp_path / "reference" / "weights.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})  # as it was written once: no step in it
    resumed = Learner(config(tiny), SYNC)
    resumed.held.load(tmp_path, step=4)
    assert torch.equal(resumed.ref(), learner.ref())
    assert [step for step in range(5, 8) if resumed.held.is_due(step)] == [6, 7]


def test_weights_of_16_bits_are_mixed_in_their_own_format_as_trl_does(tiny: str) -> None:
    learner = Learner(config(tiny, dtype=Dtype.BFLOAT16), SYNC)
    copy = dict(learner.held._policy.named_parameters())
    with torch.no_grad():
        copy["model.norm.weight"].fill_(1.0)
        learner.policy.get_parameter("model.norm.weight").fill_(1.0078125)
    for step in (3, 6, 9):
        learner.held.after_step(step, learner.policy.named_parameters())
    # A quarter of the distance 2^-7 to the next number of bfloat16 is rounded off, every time.
    assert copy["model.norm.weight"].unique().tolist() == [1.0]


def test_a_missing_or_foreign_synchronised_copy_is_told(tiny: str, tmp_path: Path) -> None:
    reference = Learner(config(tiny), SYNC).held
    with pytest.raises(CheckpointError, match="must hold the synchronised reference"):
        reference.load(tmp_path, step=3)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="must be written"):
        reference.save(tmp_path / "file")
    reference.save(tmp_path)
    file = tmp_path / "reference" / "weights.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match="Resume with the configuration"):
        reference.load(tmp_path, step=3)
