"""What supervised objectives ask of a model survives DeepSpeed: class heads, extra outputs, noise on embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_models import build_tiny_model
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossNeeds
from trl_ray.config.sections import ModelConfig, SharePrompt, TrainingConfig
from trl_ray.models.backends.ranks import SOLO, Ranks, free_address, join_ranks, leave_ranks
from trl_ray.models.backends.torch_backend import TorchBackend
from trl_ray.models.backends.training_backend import TrainingBackend
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.scoring.classifier import ClassifierModule, load_classifier
from trl_ray.models.scoring.sample_scorer import ClassScores, SampleScorer, ScoringModule
from trl_ray.models.scoring.scoring_module import PredictorModule
from trl_ray.types import TrainingSample

pytest.importorskip("deepspeed")
STAGES = range(4)
NEEDS = LossNeeds(sum_squared_probs=True, top1=True, mean_logprobs=True, embedding_noise=3.0)


def _sample(group: int, prompt: list[int], completion: list[int]) -> TrainingSample:
    return TrainingSample(
        group_id=group,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        loss_mask=np.arange(len(completion)) == len(completion) - 1,
    )


PAIR = [_sample(0, [5, 6, 7], [8, 9, 258]), _sample(0, [5, 6, 7], [10, 258])]
IDLE = [_sample(-1, [1], [1])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="llama", tied=False)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A group of one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield join_ranks(rank=0, size=1, address=free_address(), device=torch.device("cpu"), timeout_s=30.0)
    leave_ranks()


def _updated(module: PredictorModule, ranks: Ranks, stage: int | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two updates, each with an idle pass, and the weights after them."""
    # A single update of Adam is a sign; a large epsilon makes it depend on the gradient.
    options: dict[str, Any] = {"learning_rate": 1e-2, "adam_epsilon": 1.0, "lr_scheduler_type": "constant"}
    if stage is None:
        backend: TrainingBackend = TorchBackend(module, TrainingConfig(**options), total_updates=10, ranks=SOLO)
    else:
        from trl_ray.models.backends.deepspeed_backend import DeepSpeedBackend

        zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        backend = DeepSpeedBackend(module, TrainingConfig(**options, deepspeed=zero), total_updates=10, ranks=ranks)
    scorer = SampleScorer(module, share_prompt=SharePrompt.ALWAYS, temperature=1.0, forward=backend.module, needs=NEEDS)
    torch.manual_seed(0)
    losses = []
    for _ in range(2):
        loss = _loss(scorer, PAIR)
        backend.backward(loss, is_last=False)
        backend.backward(0.0 * _loss(scorer, IDLE), is_last=True)
        assert backend.reduce() > 0
        backend.update()
        losses.append(float(loss.detach()))
    return losses, {name: weight.detach().clone() for name, weight in backend.weights()}


def _loss(scorer: SampleScorer, samples: list[TrainingSample]) -> Tensor:
    scores = scorer.score(samples)
    if isinstance(scores, ClassScores):
        return -torch.nn.functional.logsigmoid(scores.logits[0] - scores.logits[-1]).sum()
    assert isinstance(scores, TokenLogprobs) and scores.mean_logprobs is not None
    assert scores.top1 is not None and scores.top1.dtype == torch.bool
    assert scores.sum_squared_probs is not None and not scores.sum_squared_probs.requires_grad
    return -(0.9 * scores.logprobs + 0.1 * scores.mean_logprobs).sum()


def _module(kind: str, model: str) -> PredictorModule:
    config = ModelConfig(model_name_or_path=model, use_peft=kind == "adapter", lora_dropout=0.0)
    if kind == "language":
        return ScoringModule(load_policy(config), chunk_size=None)
    return ClassifierModule(load_classifier(config, num_labels=1))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["language", "reward", "adapter"])
def test_losses_and_weights_are_those_of_plain_torch(model: str, ranks: Ranks, kind: str, stage: int) -> None:
    losses, weights = _updated(_module(kind, model), ranks, stage)
    expected, wanted = _updated(_module(kind, model), SOLO, None)
    assert losses == pytest.approx(expected, abs=1e-5) and losses[1] != losses[0]
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-5)
