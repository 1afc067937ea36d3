"""A real HTTP server on this machine that answers as a list of behaviours says, one after the other.

POST --> the next behaviour: a reply, or a way to misbehave; the last one is repeated --> seen: what was asked
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from teacher_batches import make_scores
from trl_ray.types import TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.teacher_payload import encode_scores
from trl_ray.wire.teacher_requests import decode_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request that came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer."""

    body: bytes = b""
    status: int = 200
    announced: int | None = None
    """Content-Length, if another than the body's."""


class Close:
    """The connection ends without a word, as when the server is killed."""


class Hang:
    """Nothing comes until the test is over."""


class Drip:
    """An answer is announced, and a byte of it comes whenever the client has had time to wait for it."""


class Babble:
    """What comes is not HTTP."""


Behaviour = Reply | Close | Hang | Drip | Babble | Callable[[bytes], bytes]
"""A function makes the body of a good answer out of the request's."""


@dataclass(slots=True, kw_only=True)
class Server:
    """What a test sees of its server."""

    url: str
    seen: list[Seen] = field(default_factory=list)


@contextmanager
def serving(*behaviours: Behaviour) -> Iterator[Server]:
    """A server with these behaviours, gone when the block ends."""
    over, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                server.seen.append(Seen(path=self.path, headers=dict(self.headers), body=body))
                behaviour = behaviours[min(len(server.seen), len(behaviours)) - 1]
            answer(self, behaviour, body, over)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Listening(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients go away when they have waited long enough."""

    listening = Listening(("127.0.0.1", 0), Handler)
    server = Server(url=f"http://127.0.0.1:{listening.server_port}")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        over.set()
        listening.shutdown()
        listening.server_close()
        thread.join()


def answer(handler: BaseHTTPRequestHandler, behaviour: Behaviour, body: bytes, over: threading.Event) -> None:
    handler.close_connection = True
    if isinstance(behaviour, Hang):
        over.wait()
    elif isinstance(behaviour, Babble):
        handler.wfile.write(b"\x00\x01 this is not HTTP \xff\r\n\r\n")
    elif isinstance(behaviour, Drip):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not over.wait(0.01):
            handler.wfile.write(b"x")
            handler.wfile.flush()
    elif not isinstance(behaviour, Close):
        reply = behaviour if isinstance(behaviour, Reply) else Reply(body=behaviour(body))
        handler.send_response(reply.status)
        handler.send_header("Content-Length", str(len(reply.body) if reply.announced is None else reply.announced))
        handler.end_headers()
        handler.wfile.write(reply.body)


def frame_answer(body: bytes, change: Callable[[list[TeacherScores]], Sequence[TeacherScores]] = list) -> bytes:
    """What `trl-ray teacher-serve` answers, with the scores changed."""
    call = decode_requests(body)
    scores = change(make_scores(call.requests, call.question))
    return encode_scores(scores, question=call.question, dtype=call.dtype, ids=call.ids).tobytes()


def vllm_answer(body: bytes, *, vocab_size: int, change: Callable[[Any], Any] = lambda answer: answer) -> bytes:
    """What vLLM's OpenAI server answers, with the parsed JSON changed; the logits are those of `make_scores`."""
    asked = json.loads(body)
    top_k = asked["prompt_logprobs"]
    requests = [_behind_first(sequence) for sequence in asked["prompt"]]
    scores = make_scores(requests, TeacherQuestion(vocab_size=vocab_size, top_k=vocab_size))
    choices = []
    for index, (request, each) in enumerate(zip(requests, scores, strict=True)):
        assert each.top_ids is not None and each.top_logprobs is not None
        places: list[Any] = [None]
        for ids, logprobs, sampled in zip(
            each.top_ids.tolist(), each.top_logprobs.tolist(), request.completion_ids.tolist(), strict=True
        ):
            known = {"logprob": logprobs[ids.index(sampled)], "rank": ids.index(sampled) + 1}
            ranked = [(ids[rank], {"logprob": logprobs[rank], "rank": rank + 1}) for rank in range(top_k)]
            places.append({str(key): value for key, value in [(sampled, known), *ranked]})
        choices.append({"index": index, "text": "", "prompt_logprobs": places})
    return json.dumps(change({"object": "text_completion", "choices": choices})).encode()


def trl_answer(body: bytes, *, vocab_size: int, change: Callable[[Any], Any] = lambda answer: answer) -> bytes:
    """What TRL v1.1's server answers, with the arrays changed before they are encoded."""
    asked = json.loads(body)
    top_k = asked["top_logprobs"]
    requests = [
        TeacherRequest(
            prompt_ids=np.array(sequence[:length], np.int32), completion_ids=np.array(sequence[length:], np.int32)
        )
        for sequence, length in zip(asked["sequences"], asked["prompt_lengths"], strict=True)
    ]
    scores = make_scores(requests, TeacherQuestion(vocab_size=vocab_size, top_k=top_k))
    sizes = [len(request.completion_ids) for request in requests]
    shape = (len(requests), max(sizes), top_k)
    arrays = {
        "logprobs_b64": np.full(shape, -np.inf, "<f4"),
        "token_ids_b64": np.zeros(shape, "<i4"),
        "actual_logprobs_b64": np.full((*shape[:2], 1), -np.inf, "<f4"),
        "actual_token_ids_b64": np.zeros((*shape[:2], 1), "<i4"),
    }
    for row, (request, each) in enumerate(zip(requests, scores, strict=True)):
        arrays["logprobs_b64"][row, : sizes[row]] = each.top_logprobs
        arrays["token_ids_b64"][row, : sizes[row]] = each.top_ids
        arrays["actual_logprobs_b64"][row, : sizes[row], 0] = each.logprobs
        arrays["actual_token_ids_b64"][row, : sizes[row], 0] = request.completion_ids
    whole = change({**arrays, "shape": list(shape), "completion_lengths": sizes})
    texts = {
        name: base64.b64encode(value.tobytes()).decode() if isinstance(value, np.ndarray) else value
        for name, value in whole.items()
    }
    return json.dumps(texts).encode()


def _behind_first(sequence: list[int]) -> TeacherRequest:
    """All of a sequence but its first token, which nothing predicts."""
    ids = np.array(sequence, np.int32)
    return TeacherRequest(prompt_ids=ids[:1], completion_ids=ids[1:])
