"""A learner that trains an adapter: several ranks equal one, and what it saves and publishes is whole."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.test_learner_ranks import BACKENDS, DEADLINE_S, Group, Trained, arguments, assert_equal, flat
from tiny_models import build_tiny_model
from training_batches import batch
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.config.sections import ModelConfig
from trl_ray.models.checkpoint import verify_checkpoint
from trl_ray.pipelines.run.learner_group import LearnerGroup
from trl_ray.types import WeightPayload

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def adapter(model: str, **changes: Any) -> dict[str, Any]:
    """A learner's arguments: DoRA beside frozen layers, and norms trained in full."""
    options = {"use_dora": True, "lora_modules_to_save": ["norm"], "gradient_checkpointing": False} | changes
    return {"model": ModelConfig(model_name_or_path=model, use_peft=True, **options)}


def laid_out(payload: WeightPayload | None) -> list[tuple[str, tuple[int, ...], str]]:
    assert payload is not None
    return [(entry.name, entry.shape, entry.dtype) for entry in payload.manifest]


def test_engines_are_sent_the_plain_model_and_the_adapter_resumes_bit_for_bit(model: str, tmp_path: Path) -> None:
    options = arguments(model, adam_epsilon=1e-8)
    learner = PolicyLearner(**options | adapter(model))
    first = learner.publish()
    assert laid_out(first) == laid_out(PolicyLearner(**options).publish())
    assert learner.step(batch(1, size=4)).metrics["kl/ref"].value == 0.0  # nothing has moved yet
    path = learner.save(str(tmp_path), step=1, extra={})
    verify_checkpoint(path)
    second, end = learner.step(batch(2, size=4)), learner.publish()
    resumed = PolicyLearner(**options | adapter(model), checkpoint=path)
    again = resumed.step(batch(2, size=4))
    assert (again.loss, again.grad_norm) == (second.loss, second.grad_norm)
    assert again.metrics["kl/ref"] == second.metrics["kl/ref"] and second.metrics["kl/ref"].value > 0
    assert end is not None and resumed.publish().identity == end.identity  # type: ignore[union-attr]


@pytest.mark.parametrize(("backend", "checkpointing"), [("torch", True), ("zero-1", False), ("zero-3", True)])
def test_two_ranks_train_an_adapter_as_one_does_and_resume_bit_for_bit(
    ray_local: Any, model: str, tmp_path: Path, backend: str, checkpointing: bool
) -> None:
    alone = PolicyLearner(**arguments(model) | adapter(model))
    results = [alone.step(batch(step, size=8)) for step in (1, 2)]
    expected = Trained(results=results, weights=flat(alone.publish()))
    changed = adapter(model, gradient_checkpointing=checkpointing)

    async def weights(learner: LearnerGroup) -> torch.Tensor:
        shared = await learner.call_shared("publish", deadline_s=DEADLINE_S)
        return flat(await asyncio.wrap_future(shared.future()))

    async def straight() -> tuple[str, Trained]:
        async with Group(model, training={"deepspeed": BACKENDS[backend]}, **changed) as learner:
            first = await learner.call("step", batch(1, size=1), deadline_s=DEADLINE_S)
            path = await learner.call("save", str(tmp_path), step=1, extra={}, deadline_s=DEADLINE_S)
            second = await learner.call("step", batch(2, size=1), deadline_s=DEADLINE_S)
            return path, Trained(results=[first, second], weights=await weights(learner))

    async def resumed(path: str) -> torch.Tensor:
        options = changed | {"checkpoint": path}
        async with Group(model, training={"deepspeed": BACKENDS[backend]}, **options) as learner:
            await learner.call("step", batch(2, size=1), deadline_s=DEADLINE_S)
            return await weights(learner)

    path, found = asyncio.run(straight())
    assert_equal(found, expected)
    verify_checkpoint(path)
    assert (Path(path) / "adapter_model.safetensors").is_file() and not (Path(path) / "model.safetensors").exists()
    assert torch.equal(asyncio.run(resumed(path)), found.weights)
