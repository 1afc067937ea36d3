"""One rank x 8 micro-batches, 8 x 1 and 2 ranks x 4 are one computation: plain torch and every ZeRO stage, on Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import build_tiny_model
from training_batches import batch, samples
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.errors import NumericsError, TrlRayError
from trl_ray.models.weight_payload import named_tensors
from trl_ray.pipelines.run.learner_group import LearnerGroup, spawn_learner
from trl_ray.runtime.cluster import RayRuntime
from trl_ray.runtime.remote import plan_actors
from trl_ray.types import Event, StepResult, TrainBatch, WeightPayload

pytestmark = pytest.mark.integration
STEPS = 3
DEADLINE_S = 180.0
BACKENDS: dict[str, Any] = {
    "torch": None,
    **{f"zero-{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a few steps come to."""

    results: list[StepResult]
    weights: torch.Tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def arguments(model: str, **training: Any) -> dict[str, Any]:
    # Adam turns any rounding of a gradient near 0 into a whole step; a large epsilon keeps it a rounding.
    options: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1.0, "max_grad_norm": 0.5}
    return {
        "model": ModelConfig(model_name_or_path=model, gradient_checkpointing=False),
        "training": TrainingConfig(**options | training),
        "loss": LossConfig(beta=0.02, entropy_coef=0.01, num_iterations=1),
        "temperature": 0.9,
        "total_updates": 10,
        "max_completion_length": 9,
    }


def flat(payload: WeightPayload) -> torch.Tensor:
    return torch.cat([tensor.flatten().clone() for _, tensor in named_tensors(payload)])


def alone(model: str, *, size: int) -> Trained:
    """One rank, in this process."""
    learner = PolicyLearner(**arguments(model))
    results = [learner.step(batch(step, size=size)) for step in range(1, STEPS + 1)]
    return Trained(results=results, weights=flat(learner.publish()))


class Group:
    """Two ranks on Ray; an async context manager."""

    def __init__(self, model: str, /, **learner: Any) -> None:
        training = learner.pop("training", {})
        self._arguments = arguments(model, **training) | learner
        runtime = {"num_learners": 2, "learner_num_cpus": 0.5, "collective_timeout_s": 60.0}
        self._config = GRPOConfig(
            deepspeed=training.get("deepspeed"),
            per_device_train_batch_size=4,
            runtime=GRPOConfig().runtime.replace(**runtime),
        )

    async def __aenter__(self) -> LearnerGroup:
        config = self._config
        plans = plan_actors(runtime=config.runtime, rollout=config.rollout.replace(num_cpus=0.0), reward=config.reward)
        self._runtime = RayRuntime(config.runtime, plans)
        learner = await spawn_learner(self._runtime, config, self._arguments)
        assert isinstance(learner, LearnerGroup)
        await learner.join(deadline_s=DEADLINE_S)
        return learner

    async def __aexit__(self, *error: object) -> None:
        await self._runtime.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What two ranks of one back end did: a few steps, NaN, a checkpoint, and going on."""

    equal: Trained
    skipped: StepResult
    warnings: tuple[Event, ...]
    before_skip: torch.Tensor
    after_skip: torch.Tensor
    following: StepResult
    checkpoint: str
    at_checkpoint: torch.Tensor
    end: torch.Tensor
    resumed: torch.Tensor


async def weights(learner: LearnerGroup) -> torch.Tensor:
    shared = await learner.call_shared("publish", deadline_s=DEADLINE_S)
    return flat(await asyncio.wrap_future(shared.future()))


async def steps(learner: LearnerGroup, *, size: int) -> Trained:
    results = [await step(learner, batch(number, size=size)) for number in range(1, STEPS + 1)]
    return Trained(results=results, weights=await weights(learner))


async def step(learner: LearnerGroup, update: TrainBatch) -> StepResult:
    result: StepResult = await learner.call("step", update, deadline_s=DEADLINE_S)
    return result


async def tell(model: str, folder: Path, training: dict[str, Any]) -> Story:
    async with Group(model, training=training) as learner:
        equal = await steps(learner, size=1)
        before_skip = await weights(learner)
        skipped = await step(learner, poisoned(STEPS + 1))
        report = await learner.call("drain", deadline_s=DEADLINE_S)
        after_skip = await weights(learner)
        following = await step(learner, batch(STEPS + 2, size=1))
        path = await learner.call("save", str(folder), step=STEPS + 2, extra={}, deadline_s=DEADLINE_S)
        at_checkpoint = await weights(learner)
        await step(learner, batch(STEPS + 3, size=1))
        end = await weights(learner)
    async with Group(model, training=training, checkpoint=path) as learner:
        await step(learner, batch(STEPS + 3, size=1))
        resumed = await weights(learner)
    return Story(
        equal=equal,
        skipped=skipped,
        warnings=tuple(report.events),
        before_skip=before_skip,
        after_skip=after_skip,
        following=following,
        checkpoint=path,
        at_checkpoint=at_checkpoint,
        end=end,
        resumed=resumed,
    )


@pytest.fixture(scope="module", params=BACKENDS)
def story(
    request: pytest.FixtureRequest, ray_local: Any, model: str, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    """Started once per back end: actors and DeepSpeed take longer to start than all of these steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return asyncio.run(tell(model, folder, {"deepspeed": BACKENDS[request.param]}))


@pytest.fixture(scope="module")
def expected(model: str) -> Trained:
    return alone(model, size=8)


def assert_equal(found: Trained, expected: Trained) -> None:
    for one, other in zip(found.results, expected.results, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.lr == other.lr
        for name in ("entropy", "kl/ref", "kl/sampler", "importance/mean"):
            assert one.metrics[name].value == pytest.approx(other.metrics[name].value, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-5)


def test_eight_micro_batches_on_one_rank_equal_one_of_eight(model: str, expected: Trained) -> None:
    assert_equal(alone(model, size=1), expected)


def test_two_ranks_of_four_micro_batches_equal_one_rank(story: Story, expected: Trained) -> None:
    assert_equal(story.equal, expected)


@pytest.mark.parametrize("backend", ["torch", "zero-3"])
def test_ranks_may_get_unequal_shares(ray_local: Any, model: str, expected: Trained, backend: str) -> None:
    async def run() -> Trained:
        async with Group(model, training={"deepspeed": BACKENDS[backend]}) as learner:
            return await steps(learner, size=3)

    assert_equal(asyncio.run(run()), expected)


def test_a_step_with_nan_on_one_rank_is_skipped_on_all_and_names_the_rank(story: Story) -> None:
    assert story.skipped.skipped and story.skipped.version == STEPS + 1
    assert torch.equal(story.before_skip, story.after_skip)
    (warning,) = story.warnings
    assert warning.detail["group_id"] == 6 and warning.detail["rank"] in (0, 1)
    assert f"rank {warning.detail['rank']}" in warning.detail["message"]
    assert not story.following.skipped and story.following.version == STEPS + 2


def test_a_checkpoint_of_two_ranks_resumes_bit_for_bit_and_loads_with_from_pretrained(story: Story) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(story.checkpoint)
    assert torch.equal(torch.cat([p.detach().flatten() for p in loaded.parameters()]), story.at_checkpoint)
    assert not torch.equal(story.end, story.at_checkpoint)
    assert torch.equal(story.resumed, story.end)


def poisoned(step: int) -> TrainBatch:
    """The sampler's log-prob of one token of the seventh completion is not a number."""
    chosen = samples(step)
    chosen[6].sampler_logprobs[0] = np.nan
    return batch(step, size=1, chosen=chosen)


def test_stop_on_nan_raises_on_the_group(ray_local: Any, model: str) -> None:
    async def run() -> None:
        async with Group(model, training={"on_non_finite": "stop"}) as learner:
            await learner.call("step", poisoned(1), deadline_s=DEADLINE_S)

    with pytest.raises(NumericsError, match="group 6"):
        asyncio.run(run())


def test_first_pass_scores_come_back_in_the_order_of_the_batch(ray_local: Any, model: str) -> None:
    whole = batch(1, size=3)
    alone_scores = PolicyLearner(**arguments(model)).score(whole)

    async def run() -> Any:
        async with Group(model) as learner:
            return await learner.call("score", whole, deadline_s=DEADLINE_S)

    for one, other in zip(asyncio.run(run()), alone_scores, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-5)
        np.testing.assert_allclose(one.reference_logprobs, other.reference_logprobs, atol=1e-5)


def test_a_killed_rank_ends_the_groups_call_at_once(ray_local: Any, model: str) -> None:
    async def run() -> None:
        async with Group(model) as learner:
            pid = (await learner.members[1].call("health", deadline_s=DEADLINE_S)).pid
            os.kill(pid, signal.SIGKILL)
            await learner.call("step", batch(1, size=1), deadline_s=DEADLINE_S)

    with pytest.raises(TrlRayError, match="learner-"):
        asyncio.run(run())
