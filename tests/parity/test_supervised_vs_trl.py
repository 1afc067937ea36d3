"""Losses of supervised fine-tuning give the values, gradients and metrics of TRL's SFTTrainer."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.supervised_loss import supervised_loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.supervised_options import SupervisedLossConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
OPTIONS: list[dict[str, Any]] = [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    logits: Tensor
    """[B, T, V]; wants a gradient."""
    labels: Tensor
    """[B, T] -100 where nothing is trained."""

    @property
    def kept(self) -> Tensor:
        """[B, T - 1] by what is predicted."""
        return self.labels[:, 1:] != -100

    @property
    def num_tokens(self) -> int:
        return int(self.kept.sum())


def texts(lengths: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(11, (len(lengths), 8), generator=generator)
    positions = torch.arange(8)
    labels = labels.masked_fill((positions < 2) | (positions >= 2 + torch.tensor(lengths)[:, None]), -100)
    logits = 2 * torch.randn(len(lengths), 8, 11, generator=generator, dtype=dtype)
    return Texts(logits=logits.requires_grad_(), labels=labels)


def over_vocabulary(data: Texts) -> Tensor:
    return data.logits[:, :-1].log_softmax(-1)


def chosen(data: Texts) -> Tensor:
    """Log-probs [B, T - 1] of labels; of token 0 where there is none."""
    return over_vocabulary(data).gather(-1, data.labels[:, 1:, None].clamp(min=0))[..., 0]


def ours(data: Texts, config: SupervisedLossConfig, num_valid_tokens: int | None = None) -> Any:
    logprobs = over_vocabulary(data)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    top1 = logprobs.argmax(-1) == data.labels[:, 1:]
    scores = TokenLogprobs(
        logprobs=chosen(data)[data.kept],
        mean_logprobs=logprobs.mean(-1)[data.kept] if config.needs_mean_logprobs else None,
        entropy=entropy[data.kept],
        top1=top1[data.kept],
    )
    trained = data.num_tokens if num_valid_tokens is None else num_valid_tokens
    return supervised_loss(scores, config, num_valid_tokens=trained)


def trl_loss(
    data: Texts, config: SupervisedLossConfig, num_items: int | None, num_processes: int = 1
) -> tuple[Tensor, dict[str, float]]:
    from transformers.trainer_pt_utils import LabelSmoother
    from trl import SFTTrainer

    def model(**inputs: Any) -> Any:
        if "fused_lm_head" not in inputs:
            return {"logits": data.logits}
        logprobs = over_vocabulary(data)
        return SimpleNamespace(
            log_probs=chosen(data) * data.kept,
            label_mask=data.kept,
            entropy=-(logprobs.exp() * logprobs).sum(-1) * data.kept,
            is_top1=(logprobs.argmax(-1) == data.labels[:, 1:]) & data.kept,
        )

    smoothing = config.label_smoothing_factor
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(
            parallelism_config=None, num_processes=num_processes, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(average_tokens_across_devices=True, loss_type=config.loss_type.value),
        aux_loss_enabled=False,
        compute_loss_func=None,
        get_tp_size=lambda: 1,
        label_smoother=LabelSmoother(epsilon=smoothing) if smoothing else None,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"labels": data.labels, "attention_mask": torch.ones_like(data.labels)}
    loss = SFTTrainer.compute_loss(stub, model, inputs, num_items_in_batch=num_items)
    return loss, {name: values[-1] for name, values in stub._metrics["train"].items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("options", OPTIONS)
def test_losses_of_tokens_are_those_of_trl(options: dict[str, Any], num_items: int | None, dtype: torch.dtype) -> None:
    config, data = SupervisedLossConfig(**options), texts([3, 6, 1, 0], dtype=dtype)
    output = ours(data, config, num_items)
    value, metrics = trl_loss(data, config, num_items)
    assert output.loss.item() == pytest.approx(value.item(), rel=1e-5)
    wanted = torch.autograd.grad(value, data.logits)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, data.logits)[0], wanted, rtol=1e-5, atol=1e-7)
    assert bool(wanted.any())
    for name in ("entropy", "mean_token_accuracy"):
        assert output.metrics[name].value == pytest.approx(metrics[name], rel=1e-5)
        assert output.metrics[name].weight == 10


@pytest.mark.parametrize("options", OPTIONS)
def test_over_micro_batches_and_ranks_every_token_has_the_weight_trl_gives_it(options: dict[str, Any]) -> None:
    # Two ranks with two micro-batches each; TRL multiplies by the number of ranks, which the mean over them undoes.
    config = SupervisedLossConfig(**options)
    lengths = ([3, 6], [1], [0, 2], [5, 5, 4])
    parts = [texts(list(one), seed=seed) for seed, one in enumerate(lengths)]
    total = sum(part.num_tokens for part in parts)
    theirs = sum(trl_loss(part, config, total, num_processes=2)[0].item() for part in parts) / 2
    assert sum(ours(part, config, total).loss.item() for part in parts) == pytest.approx(theirs, rel=1e-9)
    whole = Texts(logits=torch.cat([part.logits for part in parts]), labels=torch.cat([part.labels for part in parts]))
    assert ours(whole, config).loss.item() == pytest.approx(theirs, rel=1e-9)


def test_a_micro_batch_without_trained_tokens_has_loss_0_as_in_trl() -> None:
    config, data = SupervisedLossConfig(), texts([0, 0])
    assert ours(data, config).loss.item() == trl_loss(data, config, None)[0].item() == 0


def test_options_carry_the_names_and_defaults_of_trl() -> None:
    from trl import SFTConfig

    for name in SupervisedLossConfig.model_fields.keys() - LossSection.model_fields.keys():
        assert getattr(SupervisedLossConfig(), name) == SFTConfig.__dataclass_fields__[name].default
