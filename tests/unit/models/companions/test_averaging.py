"""Moving averages by hand: blends, paces, number formats, factors and products of adapters, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import build_tiny_model
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.adapters.merging import merged_weights
from trl_ray.models.companions.averaging import (
    AverageState,
    FactorAverage,
    LoraFactors,
    Pace,
    ProductAverage,
    WeightAverage,
    lora_factors,
)
from trl_ray.models.policy_loading import load_policy

HALF = Pace(rate=0.5)


def weights(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"w{index}": torch.full((2,), value, dtype=dtype) for index, value in enumerate(values)}


def test_a_blend_moves_the_teachers_own_tensors_by_the_rate() -> None:
    teacher = weights(1.0, 2.0)
    average = WeightAverage(teacher, Pace(rate=0.25))
    assert average.update(1, weights(5.0, 6.0).items())
    # 0.75 * 1 + 0.25 * 5 and 0.75 * 2 + 0.25 * 6.
    assert [teacher["w0"].tolist(), teacher["w1"].tolist()] == [[2.0, 2.0], [3.0, 3.0]]
    assert average.num_bytes == 16


def test_only_every_nth_step_counts() -> None:
    teacher = weights(0.0)
    average = WeightAverage(teacher, Pace(rate=0.5, every=3))
    moved = [average.update(step, weights(float(step)).items()) for step in range(1, 7)]
    assert moved == [False, False, True, False, False, True]
    # 3 / 2, then (1.5 + 6) / 2.
    assert teacher["w0"].tolist() == [3.75, 3.75]
    assert (average.is_due(8), average.is_due(9)) == (False, True)


def test_a_step_that_comes_again_changes_nothing() -> None:
    teacher = weights(0.0)
    average = WeightAverage(teacher, HALF)
    assert [average.update(step, weights(8.0).items()) for step in (1, 1, 2, 1)] == [True, False, True, False]
    assert teacher["w0"].tolist() == [6.0, 6.0]
    assert average.step == 2


def test_for_blends_that_were_missed_the_weights_at_hand_stand_in() -> None:
    late, punctual = weights(0.0), weights(0.0)
    WeightAverage(late, Pace(rate=0.5, every=2)).update(7, weights(8.0).items())
    average = WeightAverage(punctual, Pace(rate=0.5, every=2))
    for step in (2, 4, 6):
        average.update(step, weights(8.0).items())
    # 8 (1 - 1/2^3).
    assert late["w0"].tolist() == punctual["w0"].tolist() == [7.0, 7.0]


def test_weights_are_not_asked_for_when_no_blend_is_due() -> None:
    def asked() -> Any:
        raise AssertionError("weights were asked for")
        yield

    assert not WeightAverage(weights(1.0), Pace(rate=0.5, every=2)).update(1, asked())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_blends_of_coarse_numbers_add_up(dtype: torch.dtype) -> None:
    teacher = weights(1.0, dtype=dtype)
    average = WeightAverage(teacher, Pace(rate=0.001))
    in_place = 1.0
    for step in range(1, 1001):
        average.update(step, weights(1.5, dtype=dtype).items())
        in_place = (
            torch.tensor(in_place, dtype=dtype).mul(0.999).add(torch.tensor(1.5, dtype=dtype), alpha=0.001).item()
        )
    # 1.5 - 0.5 * 0.999^1000 = 1.3162; in the format itself rounding leads elsewhere.
    torch.testing.assert_close(teacher["w0"], torch.full((2,), 1.31615, dtype=dtype))
    assert abs(in_place - 1.316) > 0.1
    assert average.num_bytes == 8


def test_weights_that_do_not_belong_together_are_a_broken_promise() -> None:
    for wrong in (weights(1.0), weights(1.0, 2.0, 3.0), {"w0": torch.ones(3), "w1": torch.ones(2)}):
        with pytest.raises(AssertionError):
            WeightAverage(weights(1.0, 2.0), HALF).update(1, wrong.items())
    with pytest.raises(AssertionError, match="came twice"):
        WeightAverage(weights(1.0), HALF).update(1, [*weights(1.0).items(), *weights(1.0).items()])


@pytest.mark.parametrize(("rate", "every"), [(0.0, 1), (1.1, 1), (0.5, 0), (float("nan"), 1)])
def test_a_pace_that_means_nothing_is_refused(rate: float, every: int) -> None:
    with pytest.raises(ConfigError, match=r"teacher_update_rate must be in \(0, 1\]"):
        Pace(rate=rate, every=every)


def adapter(seed: int, *, transposed: bool = False) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            down=torch.randn(2, 5, generator=generator),
            up=torch.randn(3, 2, generator=generator),
            scale=0.5,
            transposed=transposed,
        )
        for name in ("a", "b")
    }


def test_factors_are_averaged_each_from_zero() -> None:
    average = FactorAverage(adapter(0), HALF)
    assert not average.delta("a").any()
    first, second = adapter(1), adapter(2)
    average.update(1, first)
    average.update(2, second)
    down = first["a"].down / 4 + second["a"].down / 2
    up = first["a"].up / 4 + second["a"].up / 2
    torch.testing.assert_close(average.factors()["a"].down, down)
    torch.testing.assert_close(average.delta("a"), 0.5 * up @ down)
    assert average.num_bytes == 2 * (10 + 6) * 4


def test_products_are_averaged_from_zero() -> None:
    average = ProductAverage(adapter(0), HALF)
    assert not average.delta("b").any()
    first, second = adapter(1), adapter(2)
    average.update(1, first)
    average.update(2, second)
    expected = 0.5 * (first["b"].up @ first["b"].down) / 4 + 0.5 * (second["b"].up @ second["b"].down) / 2
    torch.testing.assert_close(average.delta("b"), expected)
    assert average.num_bytes == 2 * 15 * 4


@pytest.mark.parametrize("kind", [FactorAverage, ProductAverage])
def test_a_delta_has_the_shape_of_the_layers_weight_and_is_added_to_it(kind: Any) -> None:
    for transposed in (False, True):
        average = kind(adapter(0, transposed=transposed), HALF)
        average.update(1, adapter(1, transposed=transposed))
        shape = (5, 3) if transposed else (3, 5)
        base = torch.ones(shape, dtype=torch.bfloat16)
        weight = average.weight("a", base)
        assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, shape)
        torch.testing.assert_close(weight, (1 + average.delta("a")).bfloat16())
        assert (base == 1).all()


def test_factors_that_are_shared_with_the_policy_do_not_move_it() -> None:
    policy = adapter(1)
    before = policy["a"].down.clone()
    for kind in (FactorAverage, ProductAverage):
        kind(policy, HALF).update(1, policy)
    torch.testing.assert_close(policy["a"].down, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("averaging") / "tiny")


def adapted(path: str, **changes: Any) -> Any:
    options = {"use_peft": True, "gradient_checkpointing": False, "lora_r": 4} | changes
    return load_policy(ModelConfig(model_name_or_path=path, **options))


def train(policy: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def test_the_average_of_merged_weights_is_the_base_and_the_average_of_products(tiny: str) -> None:
    policy = adapted(tiny)
    initial = {name: weight.clone() for name, weight in merged_weights(policy)}
    teacher = {name: weight.clone() for name, weight in initial.items()}
    pace = Pace(rate=0.3)
    whole, products = WeightAverage(teacher, pace), ProductAverage(lora_factors(policy), pace)
    for step in (1, 2, 3):
        train(policy, step)
        whole.update(step, merged_weights(policy))
        products.update(step, lora_factors(policy))
    for name in lora_factors(policy):
        base = initial[f"{name}.weight"]
        torch.testing.assert_close(teacher[f"{name}.weight"], products.weight(name, base), atol=1e-6, rtol=1e-5)
        assert (teacher[f"{name}.weight"] - base).abs().max() > 1e-3


def test_the_policys_factors_amount_to_what_its_layers_add(tiny: str) -> None:
    policy = adapted(tiny, lora_alpha=8)
    initial = dict(load_policy(ModelConfig(model_name_or_path=tiny)).named_parameters())
    train(policy, 1)
    merged = dict(merged_weights(policy))
    for name, layer in lora_factors(policy).items():
        assert layer.scale == 2.0
        delta = merged[f"{name}.weight"] - initial[f"{name}.weight"]
        torch.testing.assert_close(layer.scale * layer.up @ layer.down, delta, atol=1e-6, rtol=1e-4)


def test_a_policy_in_which_anything_else_is_trained_is_refused(tiny: str) -> None:
    for policy in (adapted(tiny, use_dora=True), adapted(tiny, use_peft=False)):
        with pytest.raises(ConfigError, match="nothing else is trained"):
            lora_factors(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_goes_on_from_a_checkpoint_as_if_nothing_had_been(dtype: torch.dtype) -> None:
    straight, resumed = weights(1.0, 2.0, dtype=dtype), weights(1.0, 2.0, dtype=dtype)
    pace = Pace(rate=0.1, every=2)
    average = WeightAverage(straight, pace)
    for step in range(1, 6):
        average.update(step, weights(step, -step, dtype=dtype).items())
    kept = AverageState(step=average.state().step, tensors={n: t.clone() for n, t in average.state().tensors.items()})
    again = WeightAverage(resumed, pace)
    again.restore(kept)
    assert again.step == 5
    assert resumed["w0"].equal(straight["w0"])
    for each in (average, again):
        each.update(6, weights(9.0, 9.0, dtype=dtype).items())
    for name in straight:
        assert resumed[name].equal(straight[name])
        assert again.state().tensors[name].equal(average.state().tensors[name])


@pytest.mark.parametrize("kind", [FactorAverage, ProductAverage])
def test_averages_of_adapters_go_on_from_a_checkpoint(kind: Any) -> None:
    average, again = kind(adapter(0), HALF), kind(adapter(0), HALF)
    average.update(1, adapter(1))
    again.restore(average.state())
    torch.testing.assert_close(again.delta("a"), average.delta("a"))
    assert again.step == 1


def test_the_checkpoint_of_another_average_is_refused() -> None:
    average = FactorAverage(adapter(0), HALF)
    with pytest.raises(CheckpointError, match=r"missing: .'a.lora_A'"):
        average.restore(ProductAverage(adapter(0), HALF).state())
    half = WeightAverage(weights(1.0), HALF)
    with pytest.raises(CheckpointError, match=r"of another shape or dtype: .'w0'"):
        half.restore(AverageState(step=1, tensors={"w0": torch.ones(2, dtype=torch.float64)}))
    assert half.step == 0
