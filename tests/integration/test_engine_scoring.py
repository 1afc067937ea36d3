"""A real engine scores completions as a forward pass of the same model does, also while it generates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from completion_scores import check_scores
from teacher_batches import make_requests
from tiny_models import VOCAB_SIZE, build_tiny_model, random_model
from trl_ray.engines.factory import create_engine
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import ConfigError
from trl_ray.models.weight_payload import export_weights
from trl_ray.types import GenerationRequest, SamplingParams, TeacherQuestion, TeacherRequest

pytestmark = pytest.mark.integration
OLD, NEW = random_model(seed=0), random_model(seed=1)
REQUESTS = make_requests([5, 40, 17, 1, 100, 3, 9, 2, 30], vocab_size=256)
DEADLINE_S = 120.0


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineThread]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    made = create_engine(
        request.param,
        model=build_tiny_model(tmp_path_factory.mktemp("tiny")),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        max_logprobs=40,
    )
    yield made
    made.close()


@pytest.mark.parametrize("top_k", [0, 1, 40])
def test_an_engine_says_what_a_forward_pass_says(engine: EngineThread, top_k: int) -> None:
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=top_k, tail=top_k > 0)
    scores = engine.score_completions(REQUESTS, question, deadline_s=DEADLINE_S, teacher="big")
    check_scores(OLD, REQUESTS, question, scores, tolerance=1e-5)
    assert {(each.teacher, each.version) for each in scores} == {("big", 0)}


def test_a_cached_prefix_swallows_no_logprobs(engine: EngineThread) -> None:
    # Longer than several blocks of the cache, which the generation fills with prompt and completion alike.
    prompt = (np.arange(200) * 7 % 256).astype(np.int32)
    sampling = SamplingParams(max_tokens=100, min_tokens=100)
    generate = GenerationRequest(request_id="r", prompt_ids=prompt, n=1, sampling=sampling, seed=3)
    [completion] = engine.submit([generate])[0].result(timeout=DEADLINE_S)
    request = TeacherRequest(prompt_ids=prompt, completion_ids=completion.token_ids)
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=3, tail=True)
    for _ in range(2):
        scores = engine.score_completions([request], question, deadline_s=DEADLINE_S)
        check_scores(OLD, [request], question, scores, tolerance=1e-5)


def test_completions_are_scored_while_others_are_generated(engine: EngineThread) -> None:
    sampling = SamplingParams(max_tokens=400, min_tokens=400)
    prompt = np.arange(20, dtype=np.int32)
    # More rows than run at once: some wait while the scores are computed.
    generate = GenerationRequest(request_id="crowd", prompt_ids=prompt, n=12, sampling=sampling, seed=0)
    [crowd] = engine.submit([generate])
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=2)
    scores = engine.score_completions(REQUESTS, question, deadline_s=DEADLINE_S)
    check_scores(OLD, REQUESTS, question, scores, tolerance=1e-5)
    assert not crowd.done()
    assert [len(each.token_ids) for each in crowd.result(timeout=DEADLINE_S)] == [400] * 12


def test_tokens_beyond_the_students_vocabulary_are_left_out(engine: EngineThread) -> None:
    question = TeacherQuestion(vocab_size=256, top_k=30, tail=True)
    scores = engine.score_completions(REQUESTS, question, deadline_s=DEADLINE_S)
    # vLLM's probabilities sum to 1 over the tokens that are left out, too: they count to the tail.
    over = None if type(engine).__name__ == "VLLMEngine" else 256
    check_scores(OLD, REQUESTS, question, scores, tolerance=1e-5, over=over)


def test_vllm_refuses_what_it_would_answer_wrongly(engine: EngineThread) -> None:
    if type(engine).__name__ != "VLLMEngine":
        pytest.skip("transformers answers all of it")
    hot = TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=0.7)
    with pytest.raises(ConfigError, match="temperature must be 1"):
        engine.score_completions(REQUESTS, hot, deadline_s=DEADLINE_S)
    with pytest.raises(ConfigError, match="own most probable tokens"):
        asked = make_requests([3], support=2, vocab_size=256)
        engine.score_completions(asked, TeacherQuestion(vocab_size=VOCAB_SIZE), deadline_s=DEADLINE_S)
    with pytest.raises(ConfigError, match="max_logprobs"):
        asked_for = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=100)
        engine.score_completions(REQUESTS, asked_for, deadline_s=DEADLINE_S)


def test_transformers_answers_at_any_temperature_about_any_tokens(engine: EngineThread) -> None:
    if type(engine).__name__ == "VLLMEngine":
        pytest.skip("vLLM refuses all of it")
    requests = make_requests([5, 40, 1], support=4, vocab_size=256)
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, temperature=0.6, top_k=8, tail=True)
    scores = engine.score_completions(requests, question, deadline_s=DEADLINE_S)
    check_scores(OLD, requests, question, scores, tolerance=1e-5)


def test_scores_are_those_of_the_weights_whose_version_they_bear(engine: EngineThread) -> None:
    """The last test of the module: it leaves other weights behind."""
    payload = export_weights(list(NEW.named_parameters()), version=7)
    engine.pause()
    engine.load_weights(payload)
    engine.resume()
    question = TeacherQuestion(vocab_size=VOCAB_SIZE, top_k=5)
    scores = engine.score_completions(REQUESTS, question, deadline_s=DEADLINE_S)
    check_scores(NEW, REQUESTS, question, scores, tolerance=1e-5)
    assert {each.version for each in scores} == {7}
