"""Each kind of teacher that a learner holds scores with its own weights, follows as it should, and is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from taught_batches import TEMPERATURE, log_softmax_at, own_ids, taught_samples
from tiny_models import build_tiny_model
from trl_ray.config.sections import ModelConfig, SharePrompt, TrainingConfig
from trl_ray.config.teacher_options import (
    AdapterAverage,
    TeacherConfig,
    TeacherKind,
    TeacherOptions,
    TeacherSource,
    TeacherWeights,
)
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.backends.ranks import SOLO
from trl_ray.models.backends.torch_backend import TorchBackend
from trl_ray.models.companions.companion import (
    AdapterlessCompanion,
    AveragedAdapterCompanion,
    AveragedCompanion,
    Companion,
)
from trl_ray.models.companions.resident_teacher import build_resident_teacher
from trl_ray.models.policy_loading import Policy, load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule

RATE, EVERY = 0.25, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with biases and tied embeddings."""
    return build_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny")


def config(path: str, **changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=path, **{"gradient_checkpointing": False} | changes)


def source(kind: TeacherKind, model: ModelConfig, average: AdapterAverage = AdapterAverage.FACTORS) -> TeacherSource:
    weights = TeacherWeights(
        teacher_model_kind=kind, teacher_update_rate=RATE, teacher_sync_steps=EVERY, teacher_adapter_average=average
    )
    external = kind is TeacherKind.EXTERNAL
    return TeacherSource(
        name="t",
        kind=kind,
        model=model,
        options=TeacherOptions(model_name_or_path=model.model_name_or_path) if external else TeacherConfig(),
        weights=None if external else weights,
    )


class Learner:
    """What a learner holds: the policy with its scorer, and the teacher."""

    def __init__(self, model: ModelConfig, told: TeacherSource, *, disable_dropout: bool = True) -> None:
        training = TrainingConfig(share_prompt=SharePrompt.NEVER)
        self.policy = load_policy(model, with_reference=True, disable_dropout=disable_dropout)
        self.module = ScoringModule(self.policy, chunk_size=100)
        self.backend = TorchBackend(self.module, training, total_updates=10, ranks=SOLO)
        self.scorer = SampleScorer(self.module, share_prompt=SharePrompt.NEVER, temperature=TEMPERATURE)
        self.teacher = build_resident_teacher(
            told,
            model=model,
            training=training,
            temperature=TEMPERATURE,
            device="cpu",
            policy=self.policy,
            scorer=self.scorer,
            gather=self.backend.gather,
        )

    def taught(self) -> Tensor:
        """[N] what the teacher says."""
        samples = taught_samples(0)
        before = [parameter.requires_grad for parameter in self.policy.parameters()]
        states = self.teacher.states(samples)
        assert states is not None and not states.requires_grad
        assert before == [parameter.requires_grad for parameter in self.policy.parameters()]
        return self.teacher.judge(states, own_ids(samples)).logprobs

    def after(self, step: int) -> None:
        if self.teacher.is_due(step):
            self.teacher.after_step(step, self.backend.weights())


@torch.no_grad()
def plainly(policy: Policy) -> Tensor:
    """[N] what a model says in the teacher's context."""
    samples = taught_samples(0)
    training = policy.training
    policy.eval()
    found = log_softmax_at(policy, samples, in_context=True).gather(1, own_ids(samples)[:, None])[:, 0]
    policy.train(training)
    return found


@torch.no_grad()
def move(policy: Policy, seed: int = 1) -> None:
    """Change all that is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_live_teacher_is_the_policy_as_it_is_and_keeps_nothing(tiny: str, tmp_path: Path) -> None:
    for changes in ({}, {"use_peft": True, "lora_dropout": 0.0}):
        learner = Learner(config(tiny, **changes), source(TeacherKind.LIVE, config(tiny)))
        move(learner.policy)
        same(learner.taught(), plainly(learner.policy))
        assert learner.policy.training and not learner.teacher.is_due(EVERY)
        learner.teacher.save(tmp_path)
        learner.teacher.load(tmp_path, step=3)
    assert not list(tmp_path.iterdir())


def test_a_live_teacher_has_no_dropout_and_draws_no_random_number(tiny: str) -> None:
    model = config(tiny, use_peft=True, lora_dropout=0.5)
    learner = Learner(model, source(TeacherKind.LIVE, model), disable_dropout=False)
    move(learner.policy)
    before = torch.get_rng_state()
    same(learner.taught(), plainly(learner.policy))
    assert torch.equal(torch.get_rng_state(), before) and learner.policy.training


def test_a_base_teacher_stays_where_training_began(tiny: str) -> None:
    initial = plainly(load_policy(config(tiny)))
    for changes in ({}, {"use_peft": True}):
        learner = Learner(config(tiny, **changes), source(TeacherKind.BASE, config(tiny)))
        move(learner.policy)
        same(learner.taught(), initial)
        assert not learner.teacher.is_due(EVERY)
        assert bool((plainly(learner.policy) - initial).abs().max() > 0.1)
        assert isinstance(learner.teacher, AdapterlessCompanion) is bool(changes)


def test_the_base_of_an_adapter_that_is_trained_on_is_that_adapter(tiny: str, tmp_path: Path) -> None:
    first = load_policy(config(tiny, use_peft=True))
    move(first)
    save_adapter(first, tmp_path)
    model = config(str(tmp_path), use_peft=True)
    learner = Learner(model, source(TeacherKind.BASE, model))
    move(learner.policy, seed=2)
    same(learner.taught(), plainly(first))


def test_an_external_teacher_is_another_model(tiny: str, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", family="llama", seed=5)
    learner = Learner(config(tiny), source(TeacherKind.EXTERNAL, config(other)))
    move(learner.policy)
    same(learner.taught(), plainly(load_policy(config(other))))
    held = learner.teacher._policy
    assert not any(parameter.requires_grad for parameter in held.parameters()) and not held.training


def test_an_average_of_weights_is_blended_after_every_second_step(tiny: str) -> None:
    learner = Learner(config(tiny), source(TeacherKind.EMA, config(tiny)))
    assert isinstance(learner.teacher, AveragedCompanion)
    expected = load_policy(config(tiny), trainable=False)
    same(learner.taught(), plainly(expected))
    for step in range(1, 6):
        move(learner.policy, seed=step)
        assert learner.teacher.is_due(step) is (step % EVERY == 0)
        learner.after(step)
        if step % EVERY == 0:
            with torch.no_grad():
                for own, new in zip(expected.parameters(), learner.policy.parameters(), strict=True):
                    own.lerp_(new, RATE)
    same(learner.taught(), plainly(expected))
    assert bool((plainly(expected) - plainly(learner.policy)).abs().max() > 0.1)


ADAPTERS = [
    {"lora_dropout": 0.1},
    {"lora_dropout": 0.0, "use_rslora": True, "lora_r": 4},
]


@pytest.mark.parametrize("changes", ADAPTERS)
@pytest.mark.parametrize("average", list(AdapterAverage))
def test_an_average_of_an_adapter_stands_in_for_it_without_a_copy_of_the_model(
    tiny: str, average: AdapterAverage, changes: dict[str, Any]
) -> None:
    model = config(tiny, use_peft=True, **changes)
    learner = Learner(model, source(TeacherKind.EMA, model, average))
    assert isinstance(learner.teacher, AveragedAdapterCompanion) and learner.teacher._policy is learner.policy
    same(learner.taught(), plainly(load_policy(config(tiny))))
    expected = load_policy(config(tiny))
    deltas: dict[str, list[Tensor]] = {}
    for step in range(1, 6):
        move(learner.policy, seed=step)
        learner.after(step)
        if step % EVERY:
            continue
        for name, layer in learner.policy.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            new = [down, up] if average is AdapterAverage.FACTORS else [layer.scaling["default"] * up @ down]
            old = deltas.get(name, [torch.zeros_like(tensor) for tensor in new])
            deltas[name] = [(1 - RATE) * one + RATE * other for one, other in zip(old, new, strict=True)]
    with torch.no_grad():
        for name, parts in deltas.items():
            scale = learner.policy.get_submodule(name).scaling["default"]  # type: ignore[union-attr, index, operator]
            product = parts[0] if len(parts) == 1 else scale * parts[1] @ parts[0]
            expected.get_submodule(name).weight.add_(product)  # type: ignore[union-attr, operator]
    own = plainly(learner.policy)
    same(learner.taught(), plainly(expected))
    assert deltas and bool((learner.taught() - own).abs().max() > 0.05)
    # Hooks and switches are gone again.
    assert torch.equal(plainly(learner.policy), own)


def test_an_average_of_an_adapter_refuses_what_is_trained_beside_it(tiny: str) -> None:
    model = config(tiny, use_peft=True, use_dora=True)
    with pytest.raises(ConfigError, match="teacher_model_kind"):
        Learner(model, source(TeacherKind.EMA, model))


KINDS = [
    ({}, AdapterAverage.FACTORS),
    ({"use_peft": True}, AdapterAverage.FACTORS),
    ({"use_peft": True}, AdapterAverage.PRODUCT),
]


@pytest.mark.parametrize(("changes", "average"), KINDS)
def test_what_is_averaged_is_in_the_checkpoint_to_the_last_bit(
    tiny: str, changes: dict[str, Any], average: AdapterAverage, tmp_path: Path
) -> None:
    model = config(tiny, **changes)
    learner = Learner(model, source(TeacherKind.EMA, model, average))
    for step in range(1, 4):
        move(learner.policy, seed=step)
        learner.after(step)
    learner.teacher.save(tmp_path)
    again = Learner(model, source(TeacherKind.EMA, model, average))
    again.teacher.load(tmp_path, step=3)
    again.policy.load_state_dict(learner.policy.state_dict())
    for step in range(4, 7):
        for each in (learner, again):
            move(each.policy, seed=step)
            assert each.teacher.is_due(step) is (step % EVERY == 0)
            each.after(step)
    learner.teacher.save(tmp_path)
    straight = load_file(tmp_path / "teacher" / "weights.safetensors")
    again.teacher.save(tmp_path)
    resumed = load_file(tmp_path / "teacher" / "weights.safetensors")
    assert straight.keys() == resumed.keys() and all(straight[name].equal(resumed[name]) for name in straight)
    assert torch.equal(learner.taught(), again.taught())


def test_a_checkpoint_without_the_average_or_with_another_is_refused(tiny: str, tmp_path: Path) -> None:
    model = config(tiny, use_peft=True)
    factors = Learner(model, source(TeacherKind.EMA, model))
    with pytest.raises(CheckpointError, match="teacher's average"):
        factors.teacher.load(tmp_path, step=3)
    factors.teacher.save(tmp_path)
    products = Learner(model, source(TeacherKind.EMA, model, AdapterAverage.PRODUCT))
    with pytest.raises(CheckpointError, match="missing"):
        products.teacher.load(tmp_path, step=3)
    file = tmp_path / "teacher" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="teacher's average"):
        factors.teacher.load(tmp_path, step=3)


def test_a_teacher_that_does_not_move_is_not_to_be_moved(tiny: str) -> None:
    learner = Learner(config(tiny), source(TeacherKind.LIVE, config(tiny)))
    assert type(learner.teacher) is Companion
    with pytest.raises(AssertionError, match="does not move"):
        learner.teacher.after_step(1, [])
