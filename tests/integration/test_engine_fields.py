"""Fields of generation_kwargs and changes of the model's configuration, on the engine that has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.engines.factory import create_engine
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import EngineError
from trl_ray.types import Completion, GenerationRequest, SamplingParams

pytestmark = pytest.mark.integration
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
IDS = np.arange(65, 95, dtype=np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


def start(kind: str, model: str, **changes: Any) -> EngineThread:
    return create_engine(
        kind, model=model, dtype="float32", max_model_len=64, max_num_seqs=4, tokenizer=build_tokenizer(), **changes
    )


@pytest.fixture(scope="module")
def vllm(model: str) -> Iterator[EngineThread]:
    pytest.importorskip("vllm")
    engine = start("vllm", model, config_changes=ROPE)
    yield engine
    engine.close()


def complete(engine: EngineThread, **fields: Any) -> list[Completion]:
    sampling = SamplingParams(max_tokens=12, fields=fields)
    request = GenerationRequest(request_id=str(fields), prompt_ids=IDS[:3], n=2, sampling=sampling, seed=3)
    return list(engine.submit([request])[0].result(timeout=120.0))


def test_vllm_samples_by_them(vllm: EngineThread) -> None:
    texts = [each.text for each in complete(vllm, structured_outputs={"regex": "[ab]{4}"})]
    assert all(len(text) == 4 and set(text) <= {"a", "b"} for text in texts)
    [stopped, _] = complete(vllm, stop_token_ids=[70], logit_bias={"70": 100.0})
    assert stopped.token_ids.tolist() == [70]
    allowed = complete(vllm, allowed_token_ids=[70, 71])
    assert {int(token) for each in allowed for token in each.token_ids} <= {70, 71}


def test_a_request_that_vllm_refuses_fails_alone(vllm: EngineThread) -> None:
    with pytest.raises(EngineError, match="refused"):
        complete(vllm, thinking_token_budget=3)
    assert len(complete(vllm)) == 2


def test_both_engines_compute_with_the_changed_configuration(vllm: EngineThread, model: str) -> None:
    engines = [start("transformers", model, **changes) for changes in ({"config_changes": ROPE}, {})]
    try:
        [changed], [plain] = ([*engine.score([IDS], deadline_s=60.0)] for engine in engines)
    finally:
        for engine in engines:
            engine.close()
    [scored] = vllm.score([IDS], deadline_s=60.0)
    assert np.abs(scored - changed).max() < 1e-4
    assert np.abs(changed - plain).mean() > 0.1
