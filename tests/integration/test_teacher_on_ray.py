"""A teacher as a Ray actor says what its model says in this process; weights and frames lie in the object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_batches import make_requests
from tiny_models import VOCAB_SIZE, build_tiny_model, random_model
from trl_ray.actors.teacher import Teacher
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import (
    PayloadDtype,
    TeacherConfig,
    TeacherEngine,
    TeacherKind,
    TeacherOptions,
    TeacherSource,
    TeacherWeights,
)
from trl_ray.models.companions.averaging import Pace, WeightAverage
from trl_ray.models.companions.teacher_model import TeacherModel
from trl_ray.models.companions.teacher_weights import AveragedWeights
from trl_ray.models.weight_payload import export_weights
from trl_ray.runtime.remote import plan_teacher, remote_class
from trl_ray.types import Health, PullReport, TeacherQuestion, TeacherScores, WeightPayload
from trl_ray.wire.teacher_payload import decode_scores

pytestmark = pytest.mark.integration
QUESTION = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=20, tail=True)
REQUESTS = make_requests([60, 3, 200, 41], vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spawn(ray_local: Any) -> Iterator[Any]:
    """Starts teachers as actors; they are gone afterwards."""
    actors = []

    def start(source: TeacherSource) -> Any:
        remote = remote_class(Teacher, plan_teacher(source))
        actors.append(remote.remote(name=f"teacher-{source.name}-0", source=source, vocab_size=VOCAB_SIZE))
        return actors[-1]

    yield start
    for actor in actors:
        ray_local.kill(actor)


def external(folder: str, **changes: Any) -> TeacherSource:
    options = TeacherOptions(name="big", model_name_or_path=folder, **changes)
    return TeacherSource(name="big", kind=TeacherKind.EXTERNAL, model=options.model, options=options)


def columns(scores: Sequence[TeacherScores]) -> np.ndarray:
    return np.concatenate([np.column_stack([each.logprobs, each.top_logprobs, each.tail]) for each in scores])


def local(model: Any) -> np.ndarray:
    return columns(TeacherModel(model, name="local", max_tokens_per_batch=4096).score(REQUESTS, QUESTION))


def test_an_actor_says_what_the_model_says_here(ray_local: Any, spawn: Any, folder: str) -> None:
    actor, expected = spawn(external(folder)), local(random_model())
    frame = ray_local.get(actor.score.remote(REQUESTS, QUESTION))
    scores = decode_scores(frame, teacher="big", requests=REQUESTS, question=QUESTION)
    np.testing.assert_allclose(columns(scores), expected, atol=1e-5, rtol=0)
    small = ray_local.get(actor.score.remote(REQUESTS, QUESTION, dtype=PayloadDtype.FLOAT16))
    halves = decode_scores(small, teacher="big", requests=REQUESTS, question=QUESTION)
    # A step of float16 is a share of the number.
    np.testing.assert_allclose(columns(halves), expected, atol=1e-3, rtol=1e-3)
    # Over 100 KiB, so it is read where the actor put it.
    assert not frame.flags.owndata and np.shares_memory(scores[0].logprobs, frame)


def test_an_average_in_an_actor_follows_weights_in_the_object_store_and_outlives_it(
    ray_local: Any, spawn: Any, folder: str, tmp_path: Path
) -> None:
    source = TeacherSource(
        name="ema",
        kind=TeacherKind.EMA,
        model=ModelConfig(model_name_or_path=folder),
        options=TeacherConfig(),
        weights=TeacherWeights(teacher_update_rate=0.25, teacher_sync_steps=2),
    )
    model = random_model()
    weights = AveragedWeights(model, lambda weights: WeightAverage(weights, Pace(rate=0.25, every=2)))

    def follow(actor: Any, version: int) -> None:
        payload: WeightPayload = export_weights(random_model(seed=20 + version).named_parameters(), version=version)
        report: PullReport = ray_local.get(actor.pull.remote(ray_local.put(payload)))
        assert (report.version, report.checksum) == (version, payload.identity.checksum)
        weights.take(payload)

    def assert_agrees(actor: Any) -> None:
        frame = ray_local.get(actor.score.remote(REQUESTS, QUESTION))
        scores = decode_scores(frame, teacher="ema", requests=REQUESTS, question=QUESTION)
        np.testing.assert_allclose(columns(scores), local(model), atol=1e-5, rtol=0)

    first = spawn(source)
    for version in (0, 1, 2):
        follow(first, version)
    assert_agrees(first)
    assert ray_local.get(first.save.remote(str(tmp_path / "teacher")))
    ray_local.kill(first)
    second = spawn(source)
    ray_local.get(second.restore.remote(str(tmp_path / "teacher")))
    health: Health = ray_local.get(second.health.remote())
    assert (health.version, health.problem) == (2, None)
    assert_agrees(second)
    follow(second, 4)
    assert_agrees(second)


@pytest.mark.slow
def test_a_teacher_on_vllm_says_what_transformers_says(ray_local: Any, spawn: Any, folder: str) -> None:
    pytest.importorskip("vllm")
    source = external(folder, engine=TeacherEngine.VLLM, kv_cache_memory_gib=0.1, timeout_s=120.0)
    actor = spawn(source)
    expected = local(random_model())
    for dtype, atol, rtol in ((PayloadDtype.FLOAT32, 1e-4, 0.0), (PayloadDtype.FLOAT16, 1e-3, 1e-3)):
        frame = ray_local.get(actor.score.remote(REQUESTS, QUESTION, dtype=dtype))
        scores = decode_scores(frame, teacher="big", requests=REQUESTS, question=QUESTION)
        np.testing.assert_allclose(columns(scores), expected, atol=atol, rtol=rtol)
        if dtype is PayloadDtype.FLOAT32:
            assert np.abs(columns(scores) - expected).mean() < 1e-5
        assert {each.version for each in scores} == {None}
