"""16-bit weights are trained through float32 copies: small steps add up, and checkpoints go on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_ray.config.sections import TrainingConfig
from trl_ray.models.backends.ranks import SOLO
from trl_ray.models.backends.torch_backend import TorchBackend

OPTIMIZERS = ["adamw_torch_fused", "adafactor", "sgd", "muon"]


class Module(nn.Module):
    """Two matrices and a bias, with a loss whose gradient is what is asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False)).to(dtype)


def backend(dtype: torch.dtype, **options: Any) -> TorchBackend:
    values = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options}
    module: Any = Module(dtype)
    return TorchBackend(module, TrainingConfig(**values), total_updates=100, ranks=SOLO)


def weights(made: TorchBackend) -> list[Tensor]:
    return [weight.detach().float().clone() for _, weight in made.weights()]


def train(made: TorchBackend, steps: int, *, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        total: Any = 0.0
        for _, weight in made.weights():
            slope = torch.rand(weight.shape, generator=generator) + 0.5
            total = total + (weight.float() * slope).sum()
        made.backward(total, is_last=True)
        made.reduce()
        made.update()


def moved(first: list[Tensor], second: list[Tensor]) -> float:
    pairs = list(zip(first, second, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def test_twenty_small_steps_move_every_copy_and_without_copies_next_to_nothing() -> None:
    kept, plain = backend(torch.bfloat16), backend(torch.bfloat16, float32_master_weights=False)
    before = [copy.clone() for copy in kept._masters.state()]
    start = weights(plain)
    for made in (kept, plain):
        train(made, 20)
    # By hand: a step of AdamW with gradients of one sign is about the rate, 20 of them 2e-5.
    assert all(
        torch.allclose(after, copy - 20e-6, atol=3e-6)
        for after, copy in zip(kept._masters.state(), before, strict=True)
    )
    assert moved(before, kept._masters.state()) > 0.99
    assert moved(start, weights(plain)) < 0.05


def test_the_weights_are_the_copies_rounded_and_follow_a_float32_run() -> None:
    half, full = backend(torch.bfloat16, learning_rate=1e-3), backend(torch.float32, learning_rate=1e-3)
    with torch.no_grad():
        for (_, mine), (_, other), copy in zip(half.weights(), full.weights(), half._masters.moved, strict=True):
            other.copy_(mine)
            copy.copy_(mine)
    for made in (half, full):
        train(made, 30)
    for mine, copy, other in zip(weights(half), half._masters.state(), weights(full), strict=True):
        assert torch.equal(mine, copy.bfloat16().float())
        # Gradients are rounded to 16 bits, weights are not.
        assert torch.allclose(copy, other, atol=1e-4)


def test_float32_weights_are_their_own_copies() -> None:
    made = backend(torch.float32)
    assert made._masters.state() == [] and "masters" not in made.save_state(Path())
    assert all(copy is weight for copy, (_, weight) in zip(made._masters.moved, made.weights(), strict=True))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(optim: str) -> None:
    options = {"optim": optim, "learning_rate": 1e-3}
    straight, first, second = (backend(torch.bfloat16, **options) for _ in range(3))
    train(straight, 6)
    train(first, 3)
    state = first.save_state(Path())
    with torch.no_grad():
        for (_, new), (_, old) in zip(second.weights(), first.weights(), strict=True):
            new.copy_(old)
    second.load_state(Path(), state)
    train(second, 3, start=3)
    assert all(map(torch.equal, second._masters.state(), straight._masters.state()))
    assert all(map(torch.equal, weights(second), weights(straight)))


def test_a_checkpoint_without_copies_goes_on_from_its_weights() -> None:
    old, new = backend(torch.bfloat16, float32_master_weights=False), backend(torch.bfloat16)
    train(old, 2)
    with torch.no_grad():
        for (_, mine), (_, other) in zip(new.weights(), old.weights(), strict=True):
            mine.copy_(other)
    new.load_state(Path(), old.save_state(Path()))
    assert all(map(torch.equal, new._masters.state(), weights(old)))
    train(new, 1, start=2)
