"""Averages of weights and of adapters against TRL's callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tiny_models import random_model
from trl_ray.models.companions.averaging import FactorAverage, LoraFactors, Pace, WeightAverage

pytestmark = pytest.mark.parity
teacher_sync = pytest.importorskip("trl.experimental.sdpo.teacher_sync", reason="the reference is TRL")
RATE, EVERY = 0.05, 2


def train(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


@pytest.mark.parametrize("rate", [RATE, 1.0])
def test_the_average_of_whole_weights_is_trls_bit_for_bit(rate: float) -> None:
    policy, theirs, ours = random_model(), random_model(), random_model()
    average = WeightAverage(dict(ours.named_parameters()), Pace(rate=rate, every=EVERY))
    for step in range(1, 9):
        train(policy, step)
        if step % EVERY == 0:
            teacher_sync.SyncTeacherModelCallback._sync_target_model(policy, theirs, rate)
        average.update(step, policy.named_parameters())
    for (name, own), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert own.equal(their), name


def test_the_average_of_factors_is_trls() -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(random_model(), config)
    callback = teacher_sync.PEFTAdapterEMACallback(model, update_rate=RATE, sync_steps=EVERY)
    callback.on_train_begin(None, None, None)

    def factors() -> dict[str, LoraFactors]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            layer, kind, rest = name.partition(".lora_")
            if kind and ".default." in rest:
                found.setdefault(layer, {})[rest[0]] = parameter
        return {layer: LoraFactors(down=pair["A"], up=pair["B"], scale=2.0) for layer, pair in found.items()}

    average = FactorAverage(factors(), Pace(rate=RATE, every=EVERY))
    for step in range(1, 9):
        train(model, step)
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
        average.update(step, factors())
    assert len(average.factors()) == 4
    for layer, own in average.factors().items():
        for letter, tensor in (("A", own.down), ("B", own.up)):
            their = callback.shadow_weights[f"{layer}.lora_{letter}.weight"]
            assert their.abs().max() > 0
            torch.testing.assert_close(tensor, their, rtol=1e-6, atol=1e-8)
