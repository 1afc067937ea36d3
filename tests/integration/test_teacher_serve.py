"""`trl-ray teacher-serve` as a user starts it: what it serves is what its model says in this process."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from completion_scores import check_scores
from teacher_batches import make_requests
from tiny_models import VOCAB_SIZE, build_tiny_model, random_model
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds
from trl_ray.engines.teacher_clients import Chunking, FrameTeacher
from trl_ray.engines.teacher_transport import ServerAddress, TeacherServer
from trl_ray.errors import TeacherError
from trl_ray.types import TeacherQuestion
from warm_processes import warm_python

pytestmark = [pytest.mark.integration, pytest.mark.slow]
READY_S = 300.0
MODEL = random_model()
REQUESTS = make_requests([5, 40, 17, 1, 100, 3, 9, 2, 30], vocab_size=256)
TOKEN = "s3cret"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that is ready."""

    engine: str
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def served(folder: Path, engine: str, *options: str) -> Iterator[Served]:
    model = build_tiny_model(folder / "tiny")
    command = [warm_python(), "-m", "trl_ray.cli.main", "teacher-serve", f"model_name_or_path={model}", "port=0"]
    command += [f"engine={engine}", "name=big", "token_variable=BIG_TOKEN", "kv_cache_memory_gib=0.25", *options]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {"BIG_TOKEN": TOKEN},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY_S
        while (found := re.search(r"served at (\S+)", log.read_text(errors="replace"))) is None:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"the server was not ready within {READY_S} s"
            time.sleep(0.1)
        yield Served(engine=engine, url=found[1], process=process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    with served(tmp_path_factory.mktemp(request.param), request.param) as ready:
        yield ready


def client(url: str, *, token: str = TOKEN, dtype: PayloadDtype = PayloadDtype.FLOAT32) -> FrameTeacher:
    address = ServerAddress(url=url, token=token, max_attempts=3)
    server = TeacherServer(teacher="big", address=address)
    return FrameTeacher(server, Chunking(size=3), dtype=dtype, ids=PayloadIds.COMPACT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(PayloadDtype.FLOAT32, 1e-5), (PayloadDtype.FLOAT16, 1e-3), (PayloadDtype.BFLOAT16, 1e-2)]
)
@pytest.mark.parametrize("top_k", [0, 20])
def test_a_served_teacher_says_what_it_says_here(
    server: Served, dtype: PayloadDtype, tolerance: float, top_k: int
) -> None:
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=top_k, tail=top_k > 0)
    scores = client(server.url, dtype=dtype).score(REQUESTS, question)
    check_scores(MODEL, REQUESTS, question, scores, tolerance=tolerance)
    assert {(each.teacher, each.version) for each in scores} == {("big", None)}


def test_many_clients_at_once_each_get_their_own_answer(server: Served) -> None:
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=3)
    batches = [make_requests([8, 3, 20], vocab_size=256, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as executor:
        answers = list(executor.map(lambda requests: client(server.url).score(requests, question), batches))
    for requests, scores in zip(batches, answers, strict=True):
        check_scores(MODEL, requests, question, scores, tolerance=1e-5)


def test_temperatures_and_given_tokens_are_for_transformers_alone(server: Served) -> None:
    requests = make_requests([5, 12], support=4, vocab_size=256)
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=0.6, top_k=8, tail=True)
    if server.engine == "transformers":
        check_scores(MODEL, requests, question, client(server.url).score(requests, question), tolerance=1e-5)
    else:
        with pytest.raises(TeacherError, match=r"400.*temperature must be 1"):
            client(server.url).score(requests, question)


def test_what_the_model_cannot_read_is_refused_in_its_words(server: Served) -> None:
    with pytest.raises(TeacherError, match=r"refused the request with 400.*tokens"):
        client(server.url).score(make_requests([600], vocab_size=256), TeacherQuestion(vocab_size=VOCAB_SIZE))
    with pytest.raises(TeacherError, match="refused the request with 401"):
        client(server.url, token="other").score(REQUESTS, TeacherQuestion(vocab_size=VOCAB_SIZE))


def test_health_is_told_and_sigterm_ends_the_server_with_code_0(server: Served) -> None:
    """The last test of the module for each server."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/health")
    told = json.loads(connection.getresponse().read())
    connection.close()
    assert told["status"] == "ok" and told["teacher"] == "big" and told["answered"] > 0 and told["in_flight"] == 0
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
