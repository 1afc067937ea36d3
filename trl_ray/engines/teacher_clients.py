"""Teachers behind HTTP, whatever they speak, with one face: requests in, checked scores out.

    requests ─► chunks ─► HTTP, a few at a time ─► answers, checked ─► scores, in the order of the requests
                  FrameTeacher   trl-ray teacher-serve: frames both ways, read by `decode_scores`
                  JsonTeacher    JSON both ways; like an engine's, its answers go through `answer_of`, `finish_answers`
                    VllmTeacher    vLLM's OpenAI server
                    TrlTeacher     TRL v1.1's server: base64 in JSON

Neither of the last two can be asked about given tokens, and both leave the temperature out: vLLM applies it to what it
samples, not to the tokens of a prompt, among which the completion stands. Such questions are refused rather than
answered wrongly.
"""

from __future__ import annotations

import base64
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype, PayloadIds, TeacherConfig, TeacherProtocol, TeacherServerConfig
from trl_ray.engines.completion_scoring import answer_of, finish_answers
from trl_ray.engines.teacher_transport import ServerAddress, TeacherServer
from trl_ray.errors import ConfigError, TeacherError
from trl_ray.types import IntArray, TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.teacher_answers import TeacherAnswer
from trl_ray.wire.teacher_frames import MEDIA_TYPE
from trl_ray.wire.teacher_payload import decode_scores
from trl_ray.wire.teacher_requests import TeacherCall, encode_requests

SCORE_PATH = "/v1/teacher/score"
"""Of our own endpoint: a frame of requests is posted, a frame of scores comes back."""
_VLLM_NOTHING = -9999.0
"""What vLLM's server writes for -inf."""
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading an answer of another form ends in."""


@runtime_checkable
class TeacherClient(Protocol):
    """Whoever can be asked what a teacher says."""

    @property
    def name(self) -> str:
        """The teacher's, as scores and messages bear it."""
        ...

    def score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """Scores in the order of the requests; may be called from many threads at once.

        Raises:
            ConfigError: this kind of teacher cannot answer such a question.
            TeacherError: it failed, did not answer in time, or answered what cannot be true.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """How requests are cut for HTTP."""

    size: int = 8
    """Completions of one HTTP request."""
    tokens: int = 32768
    """Prompts and completions of one HTTP request, unless one alone has more."""
    concurrent: int = 4
    """HTTP requests under way at once."""


class HttpTeacher(ABC):
    """Cuts requests into chunks and asks a server about each.

    Args:
        server: of the teacher.
        chunking: how requests are cut.
    """

    path: ClassVar[str]
    """Below the server's address."""
    media_type: ClassVar[str]
    """Of what is posted."""

    def __init__(self, server: TeacherServer, chunking: Chunking) -> None:
        self._server, self._chunking = server, chunking

    @property
    def name(self) -> str:
        return self._server.teacher

    def score(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        assert all(len(each.prompt_ids) and len(each.completion_ids) for each in requests), "no request is empty"
        self.check(requests, question)
        chunks = list(cut(requests, self._chunking))
        if not chunks:
            return []
        # After a failure, `map` cancels the chunks that still wait.
        with ThreadPoolExecutor(min(self._chunking.concurrent, len(chunks)), thread_name_prefix="teacher") as executor:
            answers = executor.map(lambda chunk: self.ask(chunk, question), chunks)
            return [scores for answer in answers for scores in answer]

    @abstractmethod
    def check(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """Refuse, by ConfigError, what this kind of server cannot answer."""

    @abstractmethod
    def message(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> bytes | memoryview:
        """What is posted."""

    @abstractmethod
    def read(self, content: bytes, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """Checked scores of what came back; TeacherError if it cannot be true."""

    def ask(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        """One HTTP request, repeated within bounds."""
        return self._server.post(
            self.path,
            self.message(chunk, question),
            media_type=self.media_type,
            read=lambda content: self.read(content, chunk, question),
        )


class FrameTeacher(HttpTeacher):
    """``trl-ray teacher-serve``.

    Args:
        server, chunking: as for `HttpTeacher`.
        dtype: of log-probs on their way.
        ids: of token ids on their way.
    """

    path = SCORE_PATH
    media_type = MEDIA_TYPE

    def __init__(
        self,
        server: TeacherServer,
        chunking: Chunking,
        *,
        dtype: PayloadDtype = PayloadDtype.FLOAT32,
        ids: PayloadIds = PayloadIds.INT32,
    ) -> None:
        super().__init__(server, chunking)
        self._dtype, self._ids = dtype, ids

    def check(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        """It answers all that can be asked."""

    def message(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> bytes | memoryview:
        call = TeacherCall(requests=tuple(chunk), question=question, dtype=self._dtype, ids=self._ids)
        return encode_requests(call).data

    def read(self, content: bytes, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        return decode_scores(content, teacher=self.name, requests=chunk, question=question)


class JsonTeacher(HttpTeacher):
    """A server that runs vLLM and speaks JSON."""

    media_type = "application/json"

    def check(self, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
        _check_plain(self.name, requests, question)

    def message(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> bytes | memoryview:
        return json.dumps(self.body(chunk, question)).encode()

    def read(self, content: bytes, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
        try:
            answers = self.answers(json.loads(content), chunk, question)
        except _MALFORMED as error:
            raise _malformed(
                self.name, f"what {self.path} is known to answer", f"{content[:200]!r} ({error!r})"
            ) from error
        return finish_answers(answers, requests=chunk, question=question, teacher=self.name)

    @abstractmethod
    def body(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> Mapping[str, Any]:
        """The question as the server understands it."""

    @abstractmethod
    def answers(self, told: Any, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherAnswer]:
        """One answer for each request, by `answer_of`; whatever of `_MALFORMED` is raised means another form."""


class VllmTeacher(JsonTeacher):
    """vLLM's OpenAI server, whose ``--max-logprobs`` must be at least `top_k`.

    Args:
        server, chunking: as for `HttpTeacher`.
        model: the name under which it is served.
    """

    path = "/v1/completions"

    def __init__(self, server: TeacherServer, chunking: Chunking, *, model: str) -> None:
        super().__init__(server, chunking)
        self._model = model

    def body(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> Mapping[str, Any]:
        return {
            "model": self._model,
            "prompt": [_sequence(request) for request in chunk],
            # A server samples at least one token.
            "max_tokens": 1,
            "temperature": question.temperature,
            "prompt_logprobs": question.top_k,
        }

    def answers(self, told: Any, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherAnswer]:
        choices = {choice["index"]: choice["prompt_logprobs"] for choice in told["choices"]}
        if choices.keys() != set(range(len(chunk))):
            raise _malformed(self.name, f"choices 0 to {len(chunk) - 1}", f"choices {sorted(choices)[:8]}")
        return [self._read_one(choices[index], index, request, question) for index, request in enumerate(chunk)]

    def _read_one(
        self, places: Any, completion: int, request: TeacherRequest, question: TeacherQuestion
    ) -> TeacherAnswer:
        start, length, top_k = len(request.prompt_ids), len(request.completion_ids), question.top_k
        if len(places) != start + length:
            raise _malformed(self.name, f"{start + length} places for completion {completion}", f"{len(places)}")
        logprobs = np.empty(length, np.float32)
        top_ids, top_logprobs = np.empty((length, top_k), np.int64), np.empty((length, top_k), np.float32)
        for token, (place, sampled) in enumerate(zip(places[start:], request.completion_ids.tolist(), strict=True)):
            where = f"completion {completion}, token {token}"
            if place is None or str(sampled) not in place:
                raise _malformed(self.name, f"a log-prob of {where}", "none")
            logprobs[token] = place[str(sampled)]["logprob"]
            ranked = sorted(place.items(), key=lambda item: item[1]["rank"])[:top_k]
            if len(ranked) < top_k:
                raise _malformed(self.name, f"{top_k} tokens at {where}", f"{len(ranked)}")
            top_ids[token] = [int(key) for key, _ in ranked]
            top_logprobs[token] = [value["logprob"] for _, value in ranked]
        for values in (logprobs, top_logprobs):
            values[values <= _VLLM_NOTHING] = -np.inf
        return answer_of(logprobs, _as_ids(top_ids), top_logprobs, question=question)


class TrlTeacher(JsonTeacher):
    """TRL v1.1's server."""

    path = "/get_sequence_logprobs/"

    def body(self, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> Mapping[str, Any]:
        return {
            "sequences": [_sequence(request) for request in chunk],
            "prompt_lengths": [len(request.prompt_ids) for request in chunk],
            "top_logprobs": _trl_width(question),
            "temperature": question.temperature,
            "response_format": "binary",
        }

    def answers(self, told: Any, chunk: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherAnswer]:
        lengths = [len(request.completion_ids) for request in chunk]
        if told["completion_lengths"] != lengths:
            raise _malformed(self.name, f"completions of {lengths} tokens", f"{told['completion_lengths']!r:.200}")
        shape = (len(chunk), max(lengths), _trl_width(question))
        if list(told["shape"]) != list(shape):
            raise _malformed(self.name, f"arrays of shape {shape}", f"{told['shape']!r:.200}")
        logprobs = _array(told, "logprobs_b64", "<f4", shape)
        ids = _array(told, "token_ids_b64", "<i4", shape)
        sampled = _array(told, "actual_logprobs_b64", "<f4", (*shape[:2], 1))
        sampled_ids = _array(told, "actual_token_ids_b64", "<i4", (*shape[:2], 1))
        for row, request in enumerate(chunk):
            if (sampled_ids[row, : lengths[row], 0] != request.completion_ids).any():
                raise _malformed(self.name, f"the tokens of completion {row} as they were sent", "others")
        return [
            answer_of(sampled[row, :length, 0], ids[row, :length], logprobs[row, :length], question=question)
            for row, length in enumerate(lengths)
        ]


def teacher_client(*, name: str, server: TeacherServerConfig, teacher: TeacherConfig) -> TeacherClient:
    """The client that the options describe.

    Args:
        name: of the teacher.
        server: where it is and what it speaks.
        teacher: time limit, attempts, and number formats on the way.

    Raises:
        ConfigError: the url or the token cannot be used, or the variable of the token is not set.
    """
    token = None
    if server.token_variable is not None:
        token = os.environ.get(server.token_variable)
        if not token:
            raise ConfigError(
                f"the environment variable {server.token_variable} must hold the token of teacher {name}, and is not "
                "set. Set it where the run starts, or leave token_variable out."
            )
    connected = TeacherServer(
        teacher=name,
        address=ServerAddress(
            url=server.url,
            token=token,
            timeout_s=teacher.timeout_s,
            max_attempts=teacher.max_attempts,
            retry_delay_s=server.retry_delay_s,
        ),
    )
    chunking = Chunking(
        size=server.chunk_size, tokens=server.max_tokens_per_request, concurrent=server.max_concurrent_requests
    )
    if server.protocol is TeacherProtocol.TRL:
        return TrlTeacher(connected, chunking)
    if server.protocol is TeacherProtocol.VLLM:
        assert server.model is not None, "checked by the configuration"
        return VllmTeacher(connected, chunking, model=server.model)
    return FrameTeacher(connected, chunking, dtype=teacher.payload_dtype, ids=teacher.payload_ids)


def cut(requests: Sequence[TeacherRequest], chunking: Chunking) -> Iterator[list[TeacherRequest]]:
    """Chunks in order, each within the bounds unless one request alone is beyond them."""
    chunk: list[TeacherRequest] = []
    tokens = 0
    for request in requests:
        more = len(request.prompt_ids) + len(request.completion_ids)
        if chunk and (len(chunk) == chunking.size or tokens + more > chunking.tokens):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(request)
        tokens += more
    if chunk:
        yield chunk


def _check_plain(teacher: str, requests: Sequence[TeacherRequest], question: TeacherQuestion) -> None:
    """What a server that runs vLLM can be asked."""
    if question.temperature != 1:
        raise ConfigError(
            f"the temperature must be 1 with teacher {teacher}, got {question.temperature}: vLLM leaves it out of "
            "log-probs of given tokens. Set distillation_temperature=1, or serve the teacher by trl-ray teacher-serve."
        )
    if any(request.support_ids is not None for request in requests):
        raise ConfigError(
            f"teacher {teacher} must be asked about its own most probable tokens only, got others: its server cannot "
            "score given ones. Set support to teacher or sampled, or serve the teacher by trl-ray teacher-serve."
        )


def _trl_width(question: TeacherQuestion) -> int:
    """Tokens asked for at each place: this server gives one at least, and `answer_of` leaves it out again."""
    return max(1, question.top_k)


def _sequence(request: TeacherRequest) -> list[int]:
    return [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]


def _as_ids(ids: NDArray[np.int64]) -> IntArray:
    """int32, with -1 for what does not fit, so that it is found outside the vocabulary."""
    return np.where((ids >= 0) & (ids < 2**31), ids, -1).astype(np.int32)


def _array(answer: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """One base64 array; ValueError if it is none or of another size."""
    return np.frombuffer(base64.b64decode(answer[name], validate=True), dtype=dtype).reshape(shape)


def _malformed(teacher: str, wanted: str, got: str) -> TeacherError:
    return TeacherError(
        f"teacher {teacher}: the answer must hold {wanted}, got {got}. Check that its server is of the kind that "
        "protocol says."
    )
