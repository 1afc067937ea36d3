"""Schedules and optimizers with hand-computed values, and which weights decay."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import SchedulerType, Trainer
from transformers.trainer_optimizer import OptimizerNames

from tiny_models import random_model
from trl_ray.config.optimizer_options import Optim
from trl_ray.config.sections import Schedule, TrainingConfig
from trl_ray.errors import ConfigError
from trl_ray.models.backends.optimizer import build_optimizer, build_scheduler, check_optimizer, load_optimizer

PLAIN = [optim for optim in Optim if not optim.is_of_bitsandbytes]


def rates(**options: Any) -> list[float]:
    """The learning rate before each of eight steps, with six in the run."""
    training = TrainingConfig(learning_rate=1.0, **options)
    optimizer = build_optimizer(torch.nn.Linear(3, 2), training)
    scheduler = build_scheduler(optimizer, training, total_steps=6)
    found = []
    for _ in range(8):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("linear", {}, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("cosine", {}, [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466, 0.0]),
        ("constant_with_warmup", {}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant", {}, [1.0] * 8),
        # 0.2 + 0.8 of the cosine
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, [0.0, 0.5, 1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
        # Two cosines of two steps each: whole, half, whole, half.
        ("cosine_with_restarts", {"num_cycles": 2}, [0.0, 0.5, 1.0, 0.5, 1.0, 0.5, 0.0]),
        # 0.1 + 0.9 (1 - k/4)^2
        ("polynomial", {"power": 2.0, "lr_end": 0.1}, [0.0, 0.5, 1.0, 0.60625, 0.325, 0.15625, 0.1]),
        # sqrt(2 / step)
        ("inverse_sqrt", {}, [0.0, 0.5, 1.0, 0.8164966, 0.7071068, 0.6324555, 0.5773503]),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear"}, [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_schedules(schedule: str, options: dict[str, Any], expected: list[float]) -> None:
    found = rates(lr_scheduler_type=schedule, lr_scheduler_kwargs=options, warmup_steps=2)
    assert found[: len(expected)] == pytest.approx(expected, abs=1e-7)


def test_every_schedule_is_one_of_transformers() -> None:
    others = {"reduce_lr_on_plateau", "greedy"}  # they wait for a metric
    assert {each.value for each in SchedulerType} - others == {each.value for each in Schedule}


@pytest.mark.parametrize(
    ("schedule", "options"), [("linear", {"min_lr": 0.1}), ("cosine_with_min_lr", {}), ("polynomial", {"lr_end": 2.0})]
)
def test_options_that_a_schedule_does_not_have_are_told_before_anything_starts(
    schedule: str, options: dict[str, Any]
) -> None:
    check_optimizer(TrainingConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.0}))
    with pytest.raises(ConfigError, match=f"options of lr_scheduler_type={schedule}"):
        check_optimizer(TrainingConfig(learning_rate=1.0, lr_scheduler_type=schedule, lr_scheduler_kwargs=options))


def test_only_matrices_decay_and_the_schedule_moves_the_learning_rate() -> None:
    model = torch.nn.Linear(3, 2)
    training = TrainingConfig(weight_decay=0.1, learning_rate=1e-2)
    optimizer = build_optimizer(model, training)
    decay = {p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0} and optimizer.defaults["fused"]
    scheduler = build_scheduler(optimizer, training, total_steps=4)
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.75e-2)


class Parts(torch.nn.Module):
    """Names of every kind: a norm that is no class of torch's, a bias, a vector and matrices that are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.layer = torch.nn.Linear(3, 3)
        self.q_norm = torch.nn.Linear(3, 1, bias=False)
        self.post = torch.nn.LayerNorm(3)
        self.input_layernorm = torch.nn.Linear(3, 1, bias=False)
        self.gate = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.head = torch.nn.Linear(3, 4, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def decayed(model: torch.nn.Module, **options: Any) -> set[str]:
    """Names of the weights that decay."""
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.1, **options))
    ids = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_neither_biases_nor_norms_decay_whatever_their_shape_and_every_other_weight_does() -> None:
    assert decayed(Parts()) == {"embed.weight", "layer.weight", "gate", "head.weight"}
    assert decayed(Parts(), optim="muon") == {"embed.weight", "layer.weight", "gate", "head.weight"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_decays_is_what_transformers_trainer_decays(family: str) -> None:
    model = random_model(family=family)
    theirs = set(Trainer.get_decay_parameter_names(SimpleNamespace(), model))  # type: ignore[arg-type]
    assert decayed(model) == theirs & {name for name, _ in model.named_parameters()}


def one_step(**options: Any) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A weight [[1.0, -2.0]] with gradient [[0.5, 0.25]] after a step with learning rate 0.1."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=0.1, **options))
    model.weight.grad = torch.tensor([[0.5, 0.25]])
    optimizer.step()
    return model.weight.data[0], optimizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The first step of AdamW is the sign of the gradient.
        ({"optim": "adamw_torch"}, [0.9, -2.1]),
        ({"optim": "adamw_torch_fused"}, [0.9, -2.1]),
        ({"optim": "sgd"}, [0.95, -2.025]),
        ({"optim": "sgd", "weight_decay": 0.5}, [0.9, -1.925]),  # + 0.1 * 0.5 * w, towards 0
        ({"optim": "sgd", "optim_args": "momentum=0.9, dampening=0.5, nesterov=False"}, [0.95, -2.025]),
        ({"optim": "adagrad"}, [0.9, -2.1]),
        # The square average is (1 - alpha) g^2, so the step is lr / sqrt(0.25) with alpha = 0.75.
        ({"optim": "rmsprop", "optim_args": "alpha=0.75"}, [0.8, -2.2]),
        # Rows and columns: r = mean(g^2) = 0.15625, c = g^2, so g / sqrt(r c / mean r) = g / |g|.
        ({"optim": "adafactor"}, [0.9, -2.1]),
    ],
)
def test_the_first_step_of_each_optimizer(options: dict[str, Any], expected: list[float]) -> None:
    weight, _ = one_step(**options)
    assert weight.tolist() == pytest.approx(expected, abs=1e-5)


def test_muon_turns_a_layers_gradient_into_an_orthogonal_one_and_leaves_embeddings_and_head_to_adamw() -> None:
    torch.manual_seed(0)
    model, before = Parts(), {}
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=0.1, optim="muon"))
    for name, parameter in model.named_parameters():
        before[name] = parameter.detach().clone()
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    singular = torch.linalg.svdvals(moved["layer.weight"] / (0.1 * 0.2 * 3**0.5))  # scaled to 0.2 sqrt(longest side)
    assert singular.min() > 0.5 and singular.max() < 1.3
    for name in ("embed.weight", "head.weight", "layer.bias", "gate", "post.weight"):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("optim", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_bit_for_bit(optim: Optim, dtype: torch.dtype) -> None:
    training = TrainingConfig(learning_rate=0.01, optim=optim, weight_decay=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
        schedule[id(optimizer)].step()

    straight = Parts().to(dtype)
    first = build_optimizer(straight, training)
    schedule = {id(first): build_scheduler(first, training, total_steps=8)}
    for seed in range(3):
        step(straight, first, seed)
    resumed, kept = deepcopy(straight), deepcopy(first.state_dict())
    second = build_optimizer(resumed, training)
    schedule[id(second)] = build_scheduler(second, training, total_steps=8)
    load_optimizer(second, kept)
    schedule[id(second)].load_state_dict(schedule[id(first)].state_dict())
    for seed in range(3, 6):
        step(straight, first, seed)
        step(resumed, second, seed)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == pytest.approx(0.01 * 2 / 8)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, {}),
        ("momentum=0.9, nesterov=True,dampening=0", {"momentum": 0.9, "nesterov": True, "dampening": 0}),
        ({"momentum": 0.5}, {"momentum": 0.5}),
        ("decay_rate=-0.8,mode=abc", {"decay_rate": -0.8, "mode": "abc"}),
    ],
)
def test_optim_args_are_read_from_text_or_a_mapping(given: Any, read: dict[str, Any]) -> None:
    found = TrainingConfig(optim="sgd", optim_args=given).optim_args
    assert found == read and TrainingConfig(optim_args=found).optim_args == read


def test_options_that_an_optimizer_does_not_have_are_told_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"optim_args must be options of optim=sgd, got .*'momentun'"):
        check_optimizer(TrainingConfig(optim="sgd", optim_args="momentun=0.9"))
    with pytest.raises(ConfigError, match="name=value,name=value, got 'momentum'"):
        TrainingConfig(optim="sgd", optim_args="momentum")
    with pytest.raises(ConfigError, match="optim_args must be options of optim=sgd"):
        check_optimizer(TrainingConfig(optim="sgd", optim_args="nesterov=true"))  # it needs momentum


def test_every_optimizer_of_transformers_is_had_or_refused_with_what_to_take() -> None:
    for each in OptimizerNames:
        if each.value in set(Optim):
            continue
        with pytest.raises(ConfigError, match=rf"^optim must be .* got '{each.value}': .*(Take|take) "):
            TrainingConfig(optim=each.value)
    assert set(Optim) - {each.value for each in OptimizerNames} == {"muon"}
    with pytest.raises(ConfigError, match=r"optim must be 'adamw_torch'.*got 'adamw_trch'"):
        TrainingConfig(optim="adamw_trch")


def test_without_its_library_an_optimizer_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for optim in Optim:
        if optim.is_of_bitsandbytes:
            with pytest.raises(ConfigError, match=f"optim={optim.value} needs the package bitsandbytes"):
                check_optimizer(TrainingConfig(optim=optim))
        else:
            check_optimizer(TrainingConfig(optim=optim))


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The library's classes, which write down what they were made with."""
    made: list[tuple[str, dict[str, Any]]] = []

    def make(name: str) -> Any:
        def build(groups: Any, **options: Any) -> torch.optim.Optimizer:
            made.append((name, options))
            return torch.optim.SGD(groups, lr=options["lr"])

        return build

    library = ModuleType("bitsandbytes.optim")
    for name in ("AdamW", "AdEMAMix", "Lion", "RMSprop"):
        setattr(library, name, make(name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)
    yield made


@pytest.mark.parametrize(
    ("optim", "name", "options"),
    [
        ("adamw_8bit", "AdamW", {"optim_bits": 8, "is_paged": False, "betas": (0.9, 0.999), "eps": 1e-8}),
        ("adamw_bnb_8bit", "AdamW", {"optim_bits": 8, "is_paged": False, "betas": (0.9, 0.999), "eps": 1e-8}),
        ("paged_adamw_32bit", "AdamW", {"optim_bits": 32, "is_paged": True, "betas": (0.9, 0.999), "eps": 1e-8}),
        ("paged_lion_8bit", "Lion", {"optim_bits": 8, "is_paged": True, "betas": (0.9, 0.999)}),
        ("lion_32bit", "Lion", {"optim_bits": 32, "is_paged": False, "betas": (0.9, 0.999)}),
        ("rmsprop_bnb", "RMSprop", {"optim_bits": 32}),
        ("rmsprop_bnb_8bit", "RMSprop", {"optim_bits": 8}),
        (
            "ademamix_8bit",
            "AdEMAMix",
            {"optim_bits": 8, "is_paged": False, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8},
        ),
    ],
)
def test_what_bitsandbytes_is_told(
    bitsandbytes: list[tuple[str, dict[str, Any]]], optim: str, name: str, options: dict[str, Any]
) -> None:
    check_optimizer(TrainingConfig(optim=optim, learning_rate=0.5))
    assert bitsandbytes == [(name, {"lr": 0.5, **options})]
