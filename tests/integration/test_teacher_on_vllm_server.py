"""A teacher on vLLM's own OpenAI server says what the same model says in this process."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_batches import make_requests
from tiny_models import VOCAB_SIZE, build_tiny_model, random_model
from trl_ray.engines.teacher_clients import Chunking, VllmTeacher
from trl_ray.engines.teacher_transport import ServerAddress, TeacherServer
from trl_ray.errors import TeacherError
from trl_ray.types import FloatArray, TeacherQuestion, TeacherRequest

pytestmark = [pytest.mark.integration, pytest.mark.slow]
pytest.importorskip("vllm")
READY_S = 300.0
MODEL = random_model()
REQUESTS = make_requests([5, 40, 17, 1, 100, 3, 9, 2, 30], vocab_size=256)


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's server with a tiny model, as a user would start it."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", build_tiny_model(folder / "tiny"), "--served-model-name", "big", "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager", "--max-logprobs", "20"]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_S
        while not is_ready(port):
            assert server.poll() is None, Path(folder / "log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"vLLM's server was not ready within {READY_S} s"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def teacher(url: str, *, model: str = "big") -> VllmTeacher:
    address = ServerAddress(url=url, max_attempts=1)
    return VllmTeacher(TeacherServer(teacher="big", address=address), Chunking(size=3), model=model)


def local(request: TeacherRequest) -> FloatArray:
    """[L, V] of the same model in this process."""
    ids = torch.tensor([[*request.prompt_ids.tolist(), *request.completion_ids.tolist()]])
    with torch.no_grad():
        logits = MODEL(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
    logprobs: FloatArray = logits.log_softmax(-1).numpy()
    return logprobs


@pytest.mark.parametrize("top_k", [0, 1, 20])
def test_a_teacher_on_a_server_says_what_it_says_here(url: str, top_k: int) -> None:
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=top_k, tail=top_k > 0)
    for request, scores in zip(REQUESTS, teacher(url).score(REQUESTS, question), strict=True):
        logprobs = local(request)
        own = np.take_along_axis(logprobs, request.completion_ids[:, None].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(scores.logprobs, own, rtol=1e-5, atol=1e-5)
        if top_k:
            assert scores.top_ids is not None and scores.top_logprobs is not None and scores.tail is not None
            top = np.sort(logprobs, axis=1)[:, ::-1][:, :top_k]
            np.testing.assert_allclose(scores.top_logprobs, top, rtol=1e-5, atol=1e-5)
            at_ids = np.take_along_axis(logprobs, scores.top_ids.astype(np.int64), axis=1)
            np.testing.assert_allclose(scores.top_logprobs, at_ids, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(scores.tail, np.log1p(-np.exp(top.astype(np.float64)).sum(1)), atol=1e-4)


def test_what_the_server_does_not_allow_is_told_in_its_words(url: str) -> None:
    with pytest.raises(TeacherError, match="greater than max allowed: 20"):
        teacher(url).score(REQUESTS, TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=21))
    with pytest.raises(TeacherError, match="The model `other` does not exist"):
        teacher(url, model="other").score(REQUESTS, TeacherQuestion(vocab_size=VOCAB_SIZE))
    with pytest.raises(TeacherError, match="maximum context length is 512"):
        teacher(url).score(make_requests([600], vocab_size=256), TeacherQuestion(vocab_size=VOCAB_SIZE))
