"""Losses of reward models give the values, gradients and metrics of TRL's RewardTrainer and of token classification."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.preference.reward_losses import bradley_terry_loss, step_loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]


def rewards(dtype: torch.dtype) -> Tensor:
    """[10] of five chosen, then of five rejected texts; one pair ties."""
    values = 2 * torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=dtype)
    values[7] = values[2]
    return values.requires_grad_()


MARGIN = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.1])


def trl_loss(values: Tensor, config: RewardLossConfig, margin: Tensor | None) -> tuple[Tensor, dict[str, float]]:
    from trl import RewardTrainer

    stub = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=config.center_rewards_coefficient),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(10, 3)} | ({} if margin is None else {"margin": margin})
    loss = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=values[:, None]), inputs)
    return loss, {name: found[-1] for name, found in stub._metrics["train"].items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("coefficient", [None, 0.03])
@pytest.mark.parametrize("margin", [None, MARGIN])
def test_the_loss_of_pairs_is_that_of_trl_however_it_is_cut(
    margin: Tensor | None, coefficient: float | None, dtype: torch.dtype
) -> None:
    config, values = RewardLossConfig(center_rewards_coefficient=coefficient), rewards(dtype)
    margin = None if margin is None else margin.to(dtype)
    value, metrics = trl_loss(values, config, margin)
    wanted = torch.autograd.grad(value, values)[0]
    for cuts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        outputs = [
            bradley_terry_loss(
                values[:5][cut],
                values[5:][cut],
                config,
                margin=None if margin is None else margin[cut],
                num_pairs=5,
            )
            for cut in cuts
        ]
        loss = torch.stack([output.loss for output in outputs]).sum()
        assert loss.item() == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(loss, values)[0], wanted, rtol=1e-5, atol=1e-7)
        if len(outputs) == 1:
            ours = {name: metric.value for name, metric in outputs[0].metrics.items()}
            assert ours == pytest.approx({name: metrics[name] for name in ours}, rel=1e-5)
            assert ours.keys() == {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}


@pytest.mark.parametrize("num_items", [None, 30])
def test_the_loss_of_steps_is_that_of_token_classification(num_items: int | None) -> None:
    from transformers.loss.loss_utils import ForTokenClassification

    logits = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.full((3, 6), -100)
    labels[0, 1], labels[0, 4], labels[1, 5], labels[2, 0] = 1, 0, 1, 1
    value = ForTokenClassification(logits, labels, SimpleNamespace(num_labels=2), num_items_in_batch=num_items)
    at = labels != -100
    output = step_loss(logits[at], labels[at] == 1, num_steps=num_items or 4)
    assert output.loss.item() == pytest.approx(value.item(), rel=1e-6)
    wanted = torch.autograd.grad(value, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, logits)[0], wanted)


def test_options_carry_the_names_and_defaults_of_trl() -> None:
    from trl import RewardConfig

    for name in RewardLossConfig.model_fields.keys() - LossSection.model_fields.keys():
        assert getattr(RewardLossConfig(), name) == RewardConfig.__dataclass_fields__[name].default
