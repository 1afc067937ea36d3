"""A teacher actor in this process: its frames, the weights it follows, what it keeps, and who stands behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes import until
from teacher_batches import make_requests
from teacher_servers import Reply, frame_answer, serving
from tiny_models import VOCAB_SIZE, build_tiny_model, random_model
from trl_ray.actors import teacher as teacher_module
from trl_ray.actors.teacher import Teacher
from trl_ray.config.sections import ModelConfig
from trl_ray.config.teacher_options import (
    PayloadDtype,
    PayloadIds,
    TeacherConfig,
    TeacherEngine,
    TeacherKind,
    TeacherOptions,
    TeacherSource,
    TeacherWeights,
)
from trl_ray.errors import CheckpointError, ConfigError, DataError, ModelError, TeacherError, WeightError
from trl_ray.models.companions.teacher_model import TeacherModel
from trl_ray.models.weight_payload import export_weights
from trl_ray.types import (
    EventKind,
    TeacherQuestion,
    TeacherRequest,
    TeacherScores,
    WeightCheck,
    WeightPayload,
)
from trl_ray.wire.teacher_payload import decode_scores

QUESTION = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=4, tail=True)
REQUESTS = make_requests([5, 2, 9], vocab_size=VOCAB_SIZE)
POLICIES = [random_model(seed=10 + version) for version in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def policy_teacher(folder: str, kind: TeacherKind, *, rate: float = 0.25, **options: Any) -> Teacher:
    source = TeacherSource(
        name=kind.value,
        kind=kind,
        model=ModelConfig(model_name_or_path=folder),
        options=TeacherConfig(**options),
        weights=TeacherWeights(teacher_update_rate=rate),
    )
    return Teacher(name=f"teacher-{kind.value}-0", source=source, vocab_size=VOCAB_SIZE)


def external(options: TeacherOptions, *, vocab_size: int = VOCAB_SIZE) -> Teacher:
    source = TeacherSource(name=options.name, kind=TeacherKind.EXTERNAL, model=options.model, options=options)
    return Teacher(name=f"teacher-{options.name}-0", source=source, vocab_size=vocab_size)


def payload(version: int) -> WeightPayload:
    return export_weights(POLICIES[version].named_parameters(), version=version)


def check(version: int, *, shift: float = 0.0) -> WeightCheck:
    ids = np.arange(1, 12, dtype=np.int32)
    request = TeacherRequest(prompt_ids=ids[:1], completion_ids=ids[1:])
    [scores] = TeacherModel(random_model(seed=10 + version), name="learner", max_tokens_per_batch=99).score(
        [request], TeacherQuestion(vocab_size=VOCAB_SIZE)
    )
    return WeightCheck(token_ids=ids, logprobs=scores.logprobs + np.float32(shift), version=version)


def said_by(model: torch.nn.Module, asked: Sequence[TeacherRequest] = REQUESTS) -> np.ndarray:
    return numbers(TeacherModel(model, name="local", max_tokens_per_batch=4096).score(asked, QUESTION))


def numbers(scores: Sequence[TeacherScores]) -> np.ndarray:
    return np.concatenate([np.column_stack([each.logprobs, each.top_logprobs, each.tail]) for each in scores])


async def ask(teacher: Teacher, **how: Any) -> list[TeacherScores]:
    frame = await teacher.score(REQUESTS, QUESTION, **how)
    return decode_scores(frame, teacher="ema", requests=REQUESTS, question=QUESTION)


def blended(*versions: int, rate: float = 0.25) -> torch.nn.Module:
    """A model with the average that these versions leave, by hand."""
    model = random_model(seed=10 + versions[0])
    own = dict(model.named_parameters())
    with torch.no_grad():
        for version in versions[1:]:
            for name, tensor in POLICIES[version].named_parameters():
                own[name].copy_((1 - rate) * own[name] + rate * tensor)
    return model


def test_a_base_teacher_says_what_training_started_from_says_and_is_of_no_version(folder: str) -> None:
    made = policy_teacher(folder, TeacherKind.BASE)
    scores = asyncio.run(ask(made))
    np.testing.assert_allclose(numbers(scores), said_by(random_model()), atol=1e-5)
    assert {each.version for each in scores} == {None}
    health = made.health()
    assert (health.version, health.checksum, health.problem, health.progress) == (None, None, None, 1)
    made.close()
    made.close()


def test_the_frame_is_in_the_format_that_the_call_or_the_options_ask_for(folder: str) -> None:
    async def run() -> list[int]:
        plain = await made.score(REQUESTS, QUESTION)
        full = await made.score(REQUESTS, QUESTION, dtype=PayloadDtype.FLOAT32)
        small = await made.score(REQUESTS, QUESTION, ids=PayloadIds.COMPACT)
        scores = decode_scores(plain, teacher="base", requests=REQUESTS, question=QUESTION)
        np.testing.assert_allclose(numbers(scores), said_by(random_model()), atol=2e-3, rtol=1e-3)
        return [len(plain), len(full), len(small)]

    made = policy_teacher(folder, TeacherKind.BASE, payload_dtype=PayloadDtype.FLOAT16)
    plain, full, small = asyncio.run(run())
    # 16 tokens with 4 ids of 4 bytes and 6 log-probs each.
    assert full - plain == 16 * 6 * 2 and plain - small == 16 * 4 * 2
    made.close()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(TeacherKind.LIVE, [(0,), (2,), (3,)]), (TeacherKind.EMA, [(0,), (0, 2, 2), (0, 2, 2, 3)])],
)
def test_a_teacher_follows_the_published_versions(folder: str, kind: TeacherKind, expected: list[Any]) -> None:
    async def run() -> None:
        for version, versions in zip((0, 2, 3), expected, strict=True):
            report = await made.pull(payload(version), check(version))
            assert (report.version, report.checksum) == (version, payload(version).identity.checksum)
            # An average is the policy's own weights with its first version only.
            assert (report.weight_check_mean is not None) == (kind is TeacherKind.LIVE or version == 0)
            scores = await ask(made)
            np.testing.assert_allclose(numbers(scores), said_by(blended(*versions)), atol=1e-4)
            assert {each.version for each in scores} == {version}

    made = policy_teacher(folder, kind)
    asyncio.run(run())
    health = made.health()
    assert (health.version, health.checksum) == (3, payload(3).identity.checksum)
    assert [span.name for span in made.drain().spans] == ["pull", "score"] * 3
    assert made.drain().events == ()
    made.close()


@pytest.mark.parametrize("kind", [TeacherKind.LIVE, TeacherKind.EMA])
def test_an_older_version_and_the_same_change_nothing(folder: str, kind: TeacherKind) -> None:
    async def run() -> None:
        await made.pull(payload(1))
        await made.pull(payload(2))
        before = numbers(await ask(made))
        for version in (1, 2, 0):
            report = await made.pull(payload(version), check(version))
            assert (report.version, report.checksum) == (2, payload(2).identity.checksum)
            assert report.weight_check_mean is None
        assert np.array_equal(numbers(await ask(made)), before)

    made = policy_teacher(folder, kind)
    asyncio.run(run())
    made.close()


def test_an_average_that_begins_late_with_nothing_to_go_on_from_is_told(folder: str) -> None:
    made = policy_teacher(folder, TeacherKind.EMA)
    asyncio.run(made.pull(payload(2)))
    [event] = made.drain().events
    assert event.kind is EventKind.WARNING and "begins at version 2" in event.detail["detail"]
    made.close()


def test_a_score_waits_for_the_first_weights(folder: str) -> None:
    async def run() -> list[TeacherScores]:
        asked = asyncio.ensure_future(ask(made))
        await asyncio.sleep(0)
        assert not asked.done() and made.health().busy_since is None
        await made.pull(payload(0))
        return await asked

    made = policy_teacher(folder, TeacherKind.LIVE)
    np.testing.assert_allclose(numbers(asyncio.run(run())), said_by(POLICIES[0]), atol=1e-5)
    made.close()


def test_a_score_gives_up_on_weights_that_do_not_come(folder: str) -> None:
    made = policy_teacher(folder, TeacherKind.EMA, timeout_s=0.05)
    with pytest.raises(TeacherError, match=r"teacher ema must be given weights.*got none within 0\.05 s"):
        asyncio.run(ask(made))
    assert made.health().problem is None
    made.close()


def test_damaged_weights_are_refused_and_the_teacher_goes_on_with_those_it_had(folder: str) -> None:
    async def run() -> None:
        await made.pull(payload(0))
        bad = payload(1).buffer.copy()
        bad[7] ^= 1
        with pytest.raises(WeightError, match="checksum"):
            await made.pull(WeightPayload(identity=payload(1).identity, manifest=payload(1).manifest, buffer=bad))
        with pytest.raises(WeightError, match="wrong shape"):
            other = random_model(family="qwen2", tied=True)
            short = [(name, tensor[:1]) for name, tensor in other.named_parameters()]
            await made.pull(export_weights(short, version=1))
        scores = await ask(made)
        assert {each.version for each in scores} == {0}
        np.testing.assert_allclose(numbers(scores), said_by(POLICIES[0]), atol=1e-5)

    made = policy_teacher(folder, TeacherKind.LIVE)
    asyncio.run(run())
    assert made.health().problem is None
    made.close()


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_failed_weight_check_makes_the_actor_ask_to_be_replaced(folder: str, shift: float) -> None:
    async def run() -> None:
        with pytest.raises(WeightError, match=r"must agree with the learner.*within 0\.001 nats"):
            await made.pull(payload(1), check(1, shift=shift))
        waiting = asyncio.ensure_future(ask(made))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()

    made = policy_teacher(folder, TeacherKind.LIVE)
    asyncio.run(run())
    assert "must agree with the learner" in (made.health().problem or "")
    made.close()


def test_a_weight_check_of_another_version_proves_nothing(folder: str) -> None:
    made = policy_teacher(folder, TeacherKind.LIVE)
    with pytest.raises(WeightError, match="a weight check of version 0 cannot prove version 1"):
        asyncio.run(made.pull(payload(1), check(0)))
    made.close()


def test_a_restored_average_goes_on_as_if_nothing_had_been(folder: str, tmp_path: Path) -> None:
    async def run() -> None:
        await whole.pull(payload(0))
        await whole.pull(payload(1))
        assert await whole.save(str(tmp_path / "step-1" / "teacher"))
        # It answers before any weights are pulled; those of the checkpoint's step are pulled again.
        waiting = asyncio.ensure_future(ask(again))
        await asyncio.sleep(0)
        await again.restore(str(tmp_path / "step-1" / "teacher"))
        for scores in (await waiting, await ask(again)):
            assert {each.version for each in scores} == {1}
            np.testing.assert_allclose(numbers(scores), said_by(blended(0, 1)), atol=1e-4)
        report = await again.pull(payload(1), check(1))
        assert (report.version, report.checksum) == (1, payload(1).identity.checksum)
        for made in (whole, again):
            await made.pull(payload(3))
        np.testing.assert_array_equal(numbers(await ask(again)), numbers(await ask(whole)))

    whole, again = (policy_teacher(folder, TeacherKind.EMA) for _ in range(2))
    asyncio.run(run())
    assert again.drain().events == ()
    for made in (whole, again):
        made.close()


def test_a_checkpoint_without_an_average_is_refused(folder: str, tmp_path: Path) -> None:
    made = policy_teacher(folder, TeacherKind.EMA)
    with pytest.raises(CheckpointError, match="must hold the teacher's average"):
        asyncio.run(made.restore(str(tmp_path)))
    made.close()


@pytest.mark.parametrize("kind", [TeacherKind.LIVE, TeacherKind.BASE])
def test_a_teacher_without_an_average_keeps_nothing(folder: str, tmp_path: Path, kind: TeacherKind) -> None:
    async def run() -> bool:
        await made.restore(str(tmp_path / "teacher"))
        return await made.save(str(tmp_path / "teacher"))

    made = policy_teacher(folder, kind)
    assert asyncio.run(run()) is False and not (tmp_path / "teacher").exists()
    made.close()


def test_scores_and_pulls_side_by_side_are_of_one_version_each(folder: str) -> None:
    async def run() -> None:
        await made.pull(payload(0))
        tasks = [asyncio.ensure_future(ask(made)) for _ in range(3)]
        pulls = []
        for version in (1, 2, 3):
            pulls.append(asyncio.ensure_future(made.pull(payload(version))))
            tasks += [asyncio.ensure_future(ask(made)) for _ in range(3)]
        await asyncio.gather(*pulls)
        for scores in await asyncio.gather(*tasks):
            [version] = {each.version for each in scores}
            np.testing.assert_allclose(numbers(scores), expected[version], atol=1e-4)

    expected = [said_by(blended(version)) for version in range(4)]
    made = policy_teacher(folder, TeacherKind.LIVE)
    asyncio.run(run())
    made.close()


def test_a_wrong_question_is_not_the_teachers_failure(folder: str) -> None:
    async def run() -> None:
        with pytest.raises(ConfigError, match="but knows 260"):
            await made.score(REQUESTS, TeacherQuestion(vocab_size=300))
        with pytest.raises(DataError, match="at most 512 tokens"):
            await made.score(make_requests([512]), QUESTION)

    made = policy_teacher(folder, TeacherKind.BASE)
    asyncio.run(run())
    made.close()


def test_a_teacher_that_lacks_the_students_tokens_is_refused_at_the_start(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher big must know the student's 261 tokens, but knows 260"):
        external(TeacherOptions(name="big", model_name_or_path=folder), vocab_size=261)


def test_a_gpu_that_is_not_there_is_missed_at_the_start(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"teacher big: num_gpus=0\.5 needs a GPU"):
        external(TeacherOptions(name="big", model_name_or_path=folder, num_gpus=0.5))


def test_a_server_is_asked_and_its_failures_are_the_teachers() -> None:
    async def run(made: Teacher) -> list[TeacherScores]:
        asked = make_requests([3, 5])
        question = TeacherQuestion(vocab_size=50, top_k=3)
        frame = await made.score(asked, question)
        return decode_scores(frame, teacher="far", requests=asked, question=question)

    with serving(frame_answer, Reply(status=500)) as server:
        options = TeacherOptions(
            name="far", server={"url": server.url, "retry_delay_s": 0.01}, max_attempts=3, timeout_s=10
        )
        made = external(options, vocab_size=50)
        scores = asyncio.run(run(made))
        assert [len(each.logprobs) for each in scores] == [3, 5]
        with pytest.raises(TeacherError, match="500"):
            asyncio.run(run(made))
        # Who asks the actor asks again, and the actor does not.
        assert len(server.seen) == 2
        assert made.health().problem is None and len(made.drain().spans) == 2
        made.close()


class FakeEngine:
    """An engine that answers as a model on a thread would; `broken` is what a test says."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.broken: str | None = None
        self.closed = False

    def score_completions(
        self, requests: Sequence[TeacherRequest], question: TeacherQuestion, *, deadline_s: float, teacher: str
    ) -> list[TeacherScores]:
        self.asked.append((deadline_s, teacher))
        model = TeacherModel(random_model(), name=teacher, max_tokens_per_batch=99)
        model.version = 0
        return model.score(requests, question)

    def close(self) -> None:
        self.closed = True


def test_an_engine_on_this_actor_is_asked_with_the_teachers_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(teacher_module, "open_teacher_engine", lambda options: engine)
    made = external(
        TeacherOptions(name="fast", model_name_or_path="some/model", engine=TeacherEngine.VLLM, timeout_s=7)
    )
    scores = asyncio.run(ask(made))
    np.testing.assert_allclose(numbers(scores), said_by(random_model()), atol=1e-5)
    assert {each.version for each in scores} == {None}
    assert engine.asked == [(7.0, "fast")]
    engine.broken = "no step finished for 7 s"
    assert made.health().problem == "no step finished for 7 s"
    made.close()
    assert engine.closed


def test_a_hanging_model_is_a_problem_while_probes_are_answered(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        asked = asyncio.ensure_future(ask(made))
        await until(lambda: made.health().busy_since is not None)
        with pytest.raises(TeacherError, match=r"within 0\.1 s"):
            await asked
        go.set()

    go = threading.Event()
    made = policy_teacher(folder, TeacherKind.BASE, timeout_s=0.1)
    monkeypatch.setattr(TeacherModel, "forward", lambda *_: go.wait(20))
    asyncio.run(run())
    assert "must finish a forward pass" in (made.health().problem or "")
    made.close()
