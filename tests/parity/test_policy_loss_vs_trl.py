"""The policy objective gives the values and gradients of TRL's GRPO loss."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trl_ray.algorithms.loss import LossInputs, SampleTokens, StepTotals
from trl_ray.algorithms.policy_loss import PolicyLoss, importance_weights
from trl_ray.config.sections import LossConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
LENGTHS = [3, 5, 1, 4]
ACCUMULATION = 2
MAX_LENGTH = 9


def _tensors() -> dict[str, torch.Tensor]:
    """Padded [4, 5] log-probs of the policy, the sampler and a reference, the mask, and advantages [4]."""
    torch.manual_seed(0)
    policy = -torch.rand(4, 5) * 3
    return {
        "policy": policy,
        "sampler": policy + 0.4 * torch.randn(4, 5),
        "reference": policy + 0.3 * torch.randn(4, 5),
        "advantages": torch.tensor([1.5, -0.7, 0.0, 2.0]),
        "mask": (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long(),
    }


def _trl_loss(data: dict[str, torch.Tensor], loss: LossConfig, weights: torch.Tensor | None) -> tuple[float, Any]:
    from trl import GRPOTrainer

    logprobs = data["policy"].clone().requires_grad_()
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=loss.beta,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=ACCUMULATION),
        loss_type=loss.loss_type.value,
        epsilon_low=loss.epsilon,
        epsilon_high=loss.epsilon if loss.epsilon_high is None else loss.epsilon_high,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=ACCUMULATION,
        max_completion_length=MAX_LENGTH,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": data["mask"],
        "advantages": data["advantages"],
        "old_per_token_logps": data["sampler"] if loss.old_logprobs.value == "sampler" else None,
        "ref_per_token_logps": data["reference"],
        "importance_sampling_ratio": weights,
        "num_items_in_batch": torch.tensor(float(_totals().num_valid_tokens)),
    }
    value = GRPOTrainer._compute_loss(stub, None, inputs)
    return value.item(), torch.autograd.grad(value, logprobs)[0]


def _totals() -> StepTotals:
    """Of two micro-batches: this one of 13 tokens, and another of 4 samples with 11."""
    return StepTotals(num_valid_tokens=sum(LENGTHS) + 11, num_samples=8, num_micro_batches=ACCUMULATION)


def _inputs(data: dict[str, torch.Tensor]) -> LossInputs:
    kept = data["mask"].bool()
    counts = torch.tensor(LENGTHS)
    return LossInputs(
        tokens=SampleTokens(
            sample_index=torch.repeat_interleave(torch.arange(4), counts),
            sampler_logprobs=data["sampler"][kept],
            advantages=torch.repeat_interleave(data["advantages"], counts),
            counts=counts.float(),
        ),
        logprobs=data["policy"][kept].requires_grad_(),
        entropy=torch.zeros(sum(LENGTHS)),
        reference_logprobs=data["reference"][kept],
        micro_batch_tokens=sum(LENGTHS),
        totals=_totals(),
    )


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("old_logprobs", ["policy", "sampler"])
def test_the_loss_and_its_gradient_equal_those_of_trl(loss_type: str, beta: float, old_logprobs: str) -> None:
    data = _tensors()
    config = LossConfig(loss_type=loss_type, beta=beta, old_logprobs=old_logprobs, epsilon_high=0.28)
    inputs = _inputs(data)
    weights = None
    if old_logprobs == "policy":
        # TRL computes this factor while generating; its formula is tested with hand-computed numbers elsewhere.
        flat = importance_weights(inputs, config)[1]
        assert flat is not None
        weights = torch.ones(4, 5)
        weights[data["mask"].bool()] = flat
    expected, wanted = _trl_loss(data, config, weights)
    output = PolicyLoss(config=config, max_completion_length=MAX_LENGTH)(inputs)
    gradient = torch.autograd.grad(output.loss, inputs.logprobs)[0]
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, wanted[data["mask"].bool()], rtol=1e-5, atol=1e-7)
