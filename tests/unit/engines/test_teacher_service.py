"""A teacher behind HTTP: it answers our own client, and refuses what it should in words and status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, ClientTimeout
from aiohttp.test_utils import TestServer

from fakes import health, until
from teacher_batches import VOCAB, make_requests, make_scores
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.engines.teacher_clients import SCORE_PATH, Chunking, FrameTeacher
from trl_ray.engines.teacher_service import ServiceLimits, TeacherService
from trl_ray.engines.teacher_transport import ServerAddress, TeacherServer
from trl_ray.errors import ConfigError, DeadlineError, TeacherError
from trl_ray.types import Health, TeacherQuestion, TeacherRequest
from trl_ray.wire.teacher_frames import MEDIA_TYPE
from trl_ray.wire.teacher_payload import encode_scores
from trl_ray.wire.teacher_requests import TeacherCall, encode_requests

REQUESTS = make_requests([5, 1, 9, 3])
QUESTION = TeacherQuestion(vocab_size=VOCAB, temperature=0.5, top_k=4, tail=True)
BODY = encode_requests(TeacherCall(requests=tuple(REQUESTS), question=QUESTION)).tobytes()
FLIPPED = BODY[:-9] + bytes([BODY[-9] ^ 1]) + BODY[-8:]


class FakeTeacher:
    """Says what `make_scores` says, once it may; or fails."""

    def __init__(self, *, error: Exception | None = None, problem: str | None = None) -> None:
        self.error, self.problem = error, problem
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.calls: list[tuple[PayloadDtype | None, PayloadIds | None]] = []
        self.given_up = 0

    async def score(
        self,
        requests: Sequence[TeacherRequest],
        question: TeacherQuestion,
        *,
        dtype: PayloadDtype | None = None,
        ids: PayloadIds | None = None,
    ) -> Any:
        self.calls.append((dtype, ids))
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error is not None:
            raise self.error
        scores = make_scores(requests, question)
        return encode_scores(
            scores, question=question, dtype=dtype or PayloadDtype.FLOAT32, ids=ids or PayloadIds.INT32
        )

    def health(self) -> Health:
        return health(problem=self.problem)


@asynccontextmanager
async def serving(
    teacher: FakeTeacher, *, token: str | None = None, **limits: Any
) -> AsyncIterator[tuple[TeacherService, str, ClientSession]]:
    service = TeacherService(teacher, name="ours", limits=ServiceLimits(**limits), token=token)
    server = TestServer(service.application(), handler_cancellation=True)
    await server.start_server()
    async with ClientSession(timeout=ClientTimeout(total=20)) as session:
        try:
            yield service, str(server.make_url("")).rstrip("/"), session
        finally:
            teacher.may_answer.set()
            await server.close()


async def post(session: ClientSession, url: str, body: Any = BODY, **options: Any) -> tuple[int, str, Any]:
    async with session.post(url + SCORE_PATH, data=body, **options) as response:
        return response.status, (await response.read()).decode("utf-8", "replace"), response.headers


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def client(url: str, *, token: str | None = None, max_attempts: int = 1) -> FrameTeacher:
    address = ServerAddress(url=url, token=token, max_attempts=max_attempts, timeout_s=20)
    server = TeacherServer(teacher="ours", address=address, sleep=lambda seconds: None)
    return FrameTeacher(server, Chunking(size=2), dtype=PayloadDtype.BFLOAT16, ids=PayloadIds.COMPACT)


def test_our_client_is_answered_in_the_formats_it_asked_for() -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        async with serving(teacher, token="secret") as (service, url, _):
            scores = await asyncio.to_thread(client(url, token="secret").score, REQUESTS, QUESTION)
        assert set(teacher.calls) == {(PayloadDtype.BFLOAT16, PayloadIds.COMPACT)}
        assert service.answered == len(teacher.calls) == 2 and service.in_flight == 0
        # Each chunk is a batch of its own for `make_scores`.
        wanted = [*make_scores(REQUESTS[:2], QUESTION), *make_scores(REQUESTS[2:], QUESTION)]
        for found, want in zip(scores, wanted, strict=True):
            np.testing.assert_allclose(found.logprobs, want.logprobs, rtol=1e-2)
            assert found.top_ids is not None and want.top_ids is not None
            np.testing.assert_array_equal(found.top_ids, want.top_ids)

    run(test)


def test_an_answer_of_many_pieces_arrives_whole() -> None:
    async def test() -> None:
        requests = make_requests([3000])
        question = TeacherQuestion(vocab_size=VOCAB, top_k=VOCAB)
        async with serving(FakeTeacher()) as (_, url, _):
            [scores] = await asyncio.to_thread(client(url).score, requests, question)
        assert scores.top_logprobs is not None and scores.top_logprobs.shape == (3000, VOCAB)

    run(test)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "secret", "Bearer sécret"])
def test_whoever_has_not_the_token_is_turned_away_before_the_body_is_read(header: str | None) -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        async with serving(teacher, token="secret", body_bytes=1) as (_, url, session):
            headers = {} if header is None else {"Authorization": header}
            status, words, answered = await post(session, url, headers=headers)
        assert status == 401 and answered["WWW-Authenticate"] == "Bearer" and "secret" not in words
        assert teacher.calls == []

    run(test)


@pytest.mark.parametrize("body", [b"", b"garbage" * 100, BODY[:-8], FLIPPED, BODY + b"more"])
def test_what_is_no_frame_is_a_bad_request(body: bytes) -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        async with serving(teacher) as (_, url, session):
            status, words, _ = await post(session, url, body)
            assert status == 400 and "asked by a client" in words and teacher.calls == []
            # And the server goes on.
            assert (await post(session, url))[0] == 200

    run(test)


def test_a_body_beyond_the_limit_is_not_read() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 1000

    async def test() -> None:
        async with serving(FakeTeacher(), body_bytes=10_000) as (_, url, session):
            assert (await post(session, url, b"x" * 10_001))[0] == 413
            # Without an announced length.
            assert (await post(session, url, pieces()))[0] == 413
            assert (await post(session, url, b"x" * 9_000))[0] == 400

    run(test)


def test_more_tokens_or_wider_answers_than_allowed_are_refused_by_number() -> None:
    # Prompts of 1, 2, 3 and 4 tokens with completions of 5, 1, 9 and 3.
    async def test() -> None:
        async with serving(FakeTeacher(), tokens=27) as (_, url, session):
            status, words, _ = await post(session, url)
            assert status == 413 and "at most 27 tokens" in words and "got 28" in words
        async with serving(FakeTeacher(), tokens=28, top_k=4) as (_, url, session):
            assert (await post(session, url))[0] == 200
            asked = TeacherCall(requests=tuple(make_requests([2], support=1)), question=QUESTION)
            status, words, _ = await post(session, url, encode_requests(asked).tobytes())
            assert status == 400 and "at most 4 tokens, got 5" in words

    run(test)


def test_a_full_server_says_come_back_and_has_room_again_afterwards() -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        teacher.may_answer.clear()
        async with serving(teacher, in_flight=2) as (service, url, session):
            first = [asyncio.create_task(post(session, url)) for _ in range(2)]
            await until(lambda: len(teacher.calls) == 2)
            status, words, headers = await post(session, url)
            assert status == 503 and "2 requests are under way" in words and headers["Retry-After"] == "1"
            teacher.may_answer.set()
            assert [(await each)[0] for each in first] == [200, 200]
            assert (await post(session, url))[0] == 200
            assert service.in_flight == 0 and service.answered == 3

    run(test)


def test_our_client_comes_back_to_a_full_server() -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        teacher.may_answer.clear()
        async with serving(teacher, in_flight=1) as (_, url, session):
            first = asyncio.create_task(post(session, url))
            await until(lambda: len(teacher.calls) == 1)
            asking = client(url, max_attempts=2)
            loop = asyncio.get_running_loop()
            # The server has room before the second attempt.
            asking._server._sleep = lambda seconds: asyncio.run_coroutine_threadsafe(leave(first), loop).result(20)

            async def leave(task: asyncio.Task[Any]) -> None:
                teacher.may_answer.set()
                await task

            assert len(await asyncio.to_thread(asking.score, REQUESTS[:1], QUESTION)) == 1

    run(test)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TeacherError("the model exploded"), 500),
        (DeadlineError("too late"), 504),
        (ConfigError("no such temperature"), 400),
        (RuntimeError("a secret of the model's"), 500),
    ],
)
def test_a_failure_of_the_teacher_is_told_by_its_kind(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(FakeTeacher(error=error)) as (service, url, session):
            found, words, _ = await post(session, url)
        assert found == status and service.in_flight == 0 and service.answered == 0
        assert (str(error) in words) == isinstance(error, (TeacherError, DeadlineError, ConfigError))

    with caplog.at_level(logging.CRITICAL):
        run(test)


def test_a_teacher_that_does_not_answer_in_time_is_given_up() -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        teacher.may_answer.clear()
        async with serving(teacher, timeout_s=0.05) as (service, url, session):
            status, words, _ = await post(session, url)
            assert status == 504 and "within 0.05 s" in words
            assert teacher.given_up == 1 and service.in_flight == 0

    run(test)


def test_a_client_that_dawdles_is_not_waited_for() -> None:
    async def test() -> None:
        over = asyncio.Event()

        async def dawdling() -> AsyncIterator[bytes]:
            yield BODY[:100]
            await over.wait()

        async with serving(FakeTeacher(), timeout_s=0.05) as (service, url, session):
            status, _, _ = await post(session, url, dawdling())
            over.set()
            assert status == 408
            await until(lambda: service.in_flight == 0)

    run(test)


def test_nothing_is_computed_for_a_client_that_has_gone() -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        teacher.may_answer.clear()
        async with serving(teacher) as (service, url, session):
            asking = asyncio.create_task(post(session, url))
            await until(lambda: len(teacher.calls) == 1)
            asking.cancel()
            await until(lambda: service.in_flight == 0)
            assert teacher.given_up == 1

    run(test)


def test_whoever_waits_for_a_teacher_that_has_failed_for_good_is_told() -> None:
    async def test() -> None:
        teacher = FakeTeacher()
        teacher.may_answer.clear()
        async with serving(teacher) as (service, url, session):
            asking = asyncio.create_task(post(session, url))
            await until(lambda: len(teacher.calls) == 1)
            service.give_up("a pass hangs")
            assert (await asking)[:2] == (500, "a pass hangs")

    run(test)


def test_health_tells_how_the_teacher_is_and_asks_for_no_token() -> None:
    async def told(teacher: FakeTeacher) -> tuple[int, Any]:
        async with (
            serving(teacher, token="secret") as (_, url, session),
            session.get(url + "/health") as response,
        ):
            return response.status, await response.json()

    wanted = {"status": "ok", "teacher": "ours", "version": None, "in_flight": 0, "answered": 0}
    assert asyncio.run(told(FakeTeacher())) == (200, wanted)
    assert asyncio.run(told(FakeTeacher(problem="hangs"))) == (503, wanted | {"status": "failed"})


def test_other_paths_and_methods_are_not_there() -> None:
    async def test() -> None:
        async with serving(FakeTeacher()) as (_, url, session):
            async with session.get(url + SCORE_PATH) as response:
                assert response.status == 405
            async with session.post(url + "/v1/else", data=b"") as response:
                assert response.status == 404

    run(test)


def test_an_answer_is_announced_as_what_it_is() -> None:
    async def test() -> None:
        async with serving(FakeTeacher()) as (_, url, session):
            status, _, headers = await post(session, url)
            assert status == 200 and headers["Content-Type"] == MEDIA_TYPE

    run(test)
