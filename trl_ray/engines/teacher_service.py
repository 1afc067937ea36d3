"""A teacher behind HTTP: what `trl-ray teacher-serve` answers, and whom it refuses.

    POST /v1/teacher/score: token? ─► room? ─► body ─► frame ─► limits ─► teacher.score ─► frame, in pieces
                            401       503      413     400      413, 400   400 500 504     200
    GET /health: 200 while the teacher works, else 503

503, 500 and 504 may pass, so that clients ask again (`engines.teacher_transport`); after all others they give up.
Requests whose client has gone are given up as well.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.engines.teacher_clients import SCORE_PATH
from trl_ray.errors import DeadlineError, InputError, RunError, TeacherError
from trl_ray.types import Health, TeacherQuestion, TeacherRequest
from trl_ray.wire.teacher_frames import MEDIA_TYPE
from trl_ray.wire.teacher_requests import TeacherCall, decode_requests

HEALTH_PATH = "/health"
_PIECE = 2**18
"""Bytes of an answer that are written at once; between two pieces a slow client is waited for."""
_COME_BACK_S = 1


class AskedTeacher(Protocol):
    """Who computes the answers (`actors.teacher.Teacher`)."""

    async def score(
        self,
        requests: Sequence[TeacherRequest],
        question: TeacherQuestion,
        *,
        dtype: PayloadDtype | None = None,
        ids: PayloadIds | None = None,
    ) -> NDArray[np.uint8]:
        """A frame of scores. InputError where the question cannot be answered, RunError where the teacher fails."""
        ...

    def health(self) -> Health:
        """How it is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What is asked at most."""

    in_flight: int = 16
    """HTTP requests read or computed at once."""
    body_bytes: int = 2**26
    tokens: int = 65536
    """Contexts and completions of one HTTP request."""
    top_k: int = 256
    """Tokens that one place of an answer holds."""
    timeout_s: float = 120.0
    """For reading a request, for its answer, and for writing that; each."""


class TeacherService:
    """The HTTP application of one teacher.

    Args:
        teacher: computes the answers; requests that come together reach it together.
        name: of the teacher.
        limits: what is asked at most.
        token: that clients must send; None lets everyone in.
    """

    def __init__(self, teacher: AskedTeacher, *, name: str, limits: ServiceLimits, token: str | None = None) -> None:
        self._teacher, self._name, self._limits = teacher, name, limits
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._asked: set[asyncio.Future[NDArray[np.uint8]]] = set()
        self._problem: str | None = None
        self.in_flight = 0
        self.answered = 0

    def application(self) -> web.Application:
        """Paths and handlers."""
        application = web.Application(client_max_size=self._limits.body_bytes)
        application.router.add_post(SCORE_PATH, self._score)
        application.router.add_get(HEALTH_PATH, self._health)
        return application

    def give_up(self, problem: str) -> None:
        """Tell whoever waits that the teacher will not answer any more."""
        self._problem = problem
        for asked in self._asked:
            asked.cancel()

    async def _health(self, request: web.Request) -> web.Response:
        health = self._teacher.health()
        told = {
            "status": "ok" if health.problem is None else "failed",
            "teacher": self._name,
            "version": health.version,
            "in_flight": self.in_flight,
            "answered": self.answered,
        }
        return web.json_response(told, status=200 if health.problem is None else 503)

    async def _score(self, request: web.Request) -> web.StreamResponse:
        """One request.

        consumes: a frame of requests; produces: a frame of scores; waits for: the client's bytes, the teacher, and the
        client's reading; unblocked by: each, or `timeout_s`, or the client's leaving.
        """
        self._authorise(request)
        with self._seat():
            call = await self._read(request)
            self._check_size(call)
            frame = await self._ask(call)
            response = await self._write(request, frame)
        self.answered += 1
        return response

    def _authorise(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            raise web.HTTPUnauthorized(
                text="the header Authorization must hold the token of this server",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @contextmanager
    def _seat(self) -> Iterator[None]:
        if self.in_flight >= self._limits.in_flight:
            raise web.HTTPServiceUnavailable(
                text=f"{self.in_flight} requests are under way, which is as many as this server takes; ask again",
                headers={"Retry-After": str(_COME_BACK_S)},
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def _read(self, request: web.Request) -> TeacherCall:
        limit = self._limits.body_bytes
        if request.content_length is not None and request.content_length > limit:
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                body = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout(
                text=f"the request did not arrive within {self._limits.timeout_s:g} s"
            ) from None
        try:
            return await asyncio.to_thread(decode_requests, body)
        except TeacherError as error:
            raise web.HTTPBadRequest(text=str(error)) from None

    def _check_size(self, call: TeacherCall) -> None:
        tokens = sum(len(each.prompt_ids) + len(each.completion_ids) for each in call.requests)
        if tokens > self._limits.tokens:
            raise web.HTTPRequestEntityTooLarge(
                max_size=self._limits.tokens,
                actual_size=tokens,
                text=f"a request must have at most {self._limits.tokens} tokens of contexts and completions, got "
                f"{tokens}; lower max_tokens_per_request or chunk_size of whoever asks",
            )
        support = call.requests[0].support_ids
        width = call.question.top_k + (0 if support is None else support.shape[1])
        if width > self._limits.top_k:
            raise web.HTTPBadRequest(
                text=f"a place of the answer must hold at most {self._limits.top_k} tokens, got {width}; ask for fewer"
            )

    async def _ask(self, call: TeacherCall) -> NDArray[np.uint8]:
        limit = self._limits.timeout_s
        asked = asyncio.ensure_future(self._teacher.score(call.requests, call.question, dtype=call.dtype, ids=call.ids))
        self._asked.add(asked)
        try:
            async with asyncio.timeout(limit):
                return await asked
        except asyncio.CancelledError:
            if self._problem is None:
                raise
            raise web.HTTPInternalServerError(text=self._problem) from None
        except (TimeoutError, DeadlineError) as error:
            late = str(error) or f"teacher {self._name} did not answer within {limit:g} s"
            raise web.HTTPGatewayTimeout(text=late) from None
        except InputError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        except RunError as error:
            raise web.HTTPInternalServerError(text=str(error)) from None
        finally:
            self._asked.discard(asked)

    async def _write(self, request: web.Request, frame: NDArray[np.uint8]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": MEDIA_TYPE})
        response.content_length = frame.nbytes
        view = frame.data
        async with asyncio.timeout(self._limits.timeout_s):
            await response.prepare(request)
            for start in range(0, len(view), _PIECE):
                await response.write(view[start : start + _PIECE])
            await response.write_eof()
        return response
