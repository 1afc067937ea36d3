import dataclasses
import pickle
import threading

import numpy as np
import pytest
import torch

from tiny_models import build_tiny_model, random_model
from trl_ray.engines.factory import create_engine
from trl_ray.errors import EngineError, WeightError
from trl_ray.models.weight_payload import export_weights
from trl_ray.types import FinishReason, GenerationRequest, SamplingParams, VersionSpan

pytestmark = pytest.mark.integration
EOS = 258
PROMPT = np.frombuffer(b"the quick brown fox", dtype=np.uint8).astype(np.int32)
OLD, NEW = random_model(seed=0), random_model(seed=1)


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def shared_engine(request, tmp_path_factory):
    """One engine for the whole module: starting vLLM costs seconds."""
    if request.param == "vllm":
        pytest.importorskip("vllm")
    path = build_tiny_model(tmp_path_factory.mktemp("tiny"))
    engine = create_engine(request.param, model=path, dtype="float32", max_model_len=512, max_num_seqs=32)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine):
    """The shared engine with the weights of OLD, whatever a test before has loaded."""
    if shared_engine.version.version != 0:
        shared_engine.load_weights(payload_of(OLD, version=0))
    return shared_engine


def payload_of(model, *, version):
    return export_weights(list(model.named_parameters()), version=version)


def request_of(prompt=PROMPT, *, n=1, seed=0, name="r", **sampling):
    params = SamplingParams(**{"max_tokens": 24, **sampling})
    return GenerationRequest(request_id=name, prompt_ids=np.asarray(prompt, np.int32), n=n, sampling=params, seed=seed)


def is_vllm(engine):
    return type(engine).__name__ == "VLLMEngine"


def run(engine, *requests):
    return [future.result(timeout=120) for future in engine.submit(requests)]


def reference(model, prompt, tokens, *, temperature=1.0, barred=()):
    """[L] log-probs of a completion by one forward over prompt and completion."""
    ids = torch.tensor(np.concatenate([prompt, tokens])[None].astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].clone()
    logits[:, list(barred)] = -torch.inf
    return (logits / temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def same(one, other):
    return [c.token_ids.tolist() for c in one] == [c.token_ids.tolist() for c in other]


def test_logprobs_are_those_of_a_forward_pass(engine):
    [completions] = run(engine, request_of(n=4, seed=1))
    assert len(completions) == 4
    for completion in completions:
        expected = reference(OLD, PROMPT, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert completion.versions == (VersionSpan(version=0, start=0, end=len(completion.token_ids)),)


def test_logprobs_are_those_of_the_tempered_distribution(engine):
    [[completion]] = run(engine, request_of(temperature=0.5))
    expected = reference(OLD, PROMPT, completion.token_ids, temperature=0.5)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_logprobs_are_renormalised_after_filters(engine):
    [[completion]] = run(engine, request_of(top_k=1, min_tokens=24))
    assert completion.logprobs.tolist() == [0.0] * 24


RESHAPED = {
    "top-p": {"top_p": 0.7},
    "top-k": {"top_k": 5},
    "min-p": {"min_p": 0.2},
    "all-at-a-temperature": {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    "penalty": {"repetition_penalty": 1.5},
    "presence": {"fields": {"presence_penalty": 2.0, "frequency_penalty": 0.5}},
    "bias": {"temperature": 0.6, "fields": {"logit_bias": {70: 4.0}}},
    "allowed": {"fields": {"allowed_token_ids": list(range(65, 91))}},
    "banned": {"fields": {"bad_words": ["e"]}},
}


@pytest.mark.parametrize("reshaping", RESHAPED.values(), ids=RESHAPED)
def test_logprobs_are_the_policys_whatever_reshapes_sampling(engine, reshaping):
    [completions] = run(engine, request_of(n=4, seed=4, policy_logprobs=True, **reshaping))
    temperature = reshaping.get("temperature", 1.0)
    for completion in completions:
        expected = reference(OLD, PROMPT, completion.token_ids, temperature=temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)
        assert np.abs(completion.logprobs - expected).mean() < 1e-5


def test_logprobs_are_the_policys_where_a_grammar_masks_tokens(engine):
    if not is_vllm(engine):
        pytest.skip("the transformers engine has no grammars")
    [completions] = run(
        engine, request_of(n=4, policy_logprobs=True, fields={"structured_outputs": {"regex": "[ab]{8}"}})
    )
    for completion in completions:
        assert set(completion.text) <= {"a", "b"}
        np.testing.assert_allclose(completion.logprobs, reference(OLD, PROMPT, completion.token_ids), atol=5e-5)


def test_neighbours_may_want_other_logprobs(engine):
    plain = request_of(n=2, seed=6, temperature=0.8, name="plain")
    filtered = request_of(n=2, seed=7, temperature=0.8, top_k=1, name="filtered")
    asked = dataclasses.replace(filtered, sampling=dataclasses.replace(filtered.sampling, policy_logprobs=True))
    [alone] = run(engine, plain)
    [among, renormalised, of_policy] = run(engine, plain, filtered, asked)
    for one, other in zip(alone, among, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=5e-5)
    assert same(renormalised, of_policy)
    assert not any(completion.logprobs.any() for completion in renormalised)
    for completion in of_policy:
        expected = reference(OLD, PROMPT, completion.token_ids, temperature=0.8)
        np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)


def test_samples_of_a_group_differ_and_a_seed_reproduces_them(engine):
    [first] = run(engine, request_of(n=8, seed=5))
    [again] = run(engine, request_of(n=8, seed=5))
    [other] = run(engine, request_of(n=8, seed=6))
    assert same(first, again) and not same(first, other)
    assert len({tuple(completion.token_ids) for completion in first}) == 8


def test_a_sample_does_not_depend_on_its_neighbours_nor_on_n(engine):
    [alone] = run(engine, request_of(n=2, seed=3, min_tokens=24))
    # Together longer than one vLLM step takes, so that some prompts wait, and more rows than max_num_seqs.
    crowd = [
        request_of(np.arange(seed, seed + 300) % 256, n=3, seed=seed, name=f"crowd-{seed}", min_tokens=20)
        for seed in range(16)
    ]
    [*_, among] = run(engine, *crowd, request_of(n=4, seed=3, min_tokens=24))
    assert same(alone, among[:2])


def test_the_same_requests_on_an_idle_engine_give_the_same_bits(engine):
    requests = [request_of(PROMPT[: 5 + seed], n=3, seed=seed, name=str(seed)) for seed in range(4)]
    first, again = run(engine, *requests), run(engine, *requests)
    for one, other in zip(sum(first, ()), sum(again, ()), strict=True):
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.text == other.text
        # vLLM may find the prompt in its cache the second time, and then computes less of it.
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5 if is_vllm(engine) else 0)


def test_length_and_end_of_sequence_are_told_apart_and_the_last_token_is_kept(engine):
    [completions] = run(engine, request_of(n=32, seed=2, max_tokens=100))
    stopped = [c for c in completions if c.finish_reason is FinishReason.STOP]
    cut_off = [c for c in completions if c.finish_reason is FinishReason.LENGTH]
    assert len(stopped) + len(cut_off) == 32 and stopped and cut_off
    assert all(c.token_ids[-1] == EOS and EOS not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == 100 and EOS not in c.token_ids for c in cut_off)
    assert all("<|im_end|>" not in c.text for c in stopped)


def test_a_stop_string_ends_a_completion_and_stays_in_it(engine):
    [free] = run(engine, request_of(n=8, seed=9))
    index = next(i for i, completion in enumerate(free) if sum(map(str.isascii, completion.text)) > 3)
    stop = [character for character in free[index].text if character.isascii()][1]
    cut = run(engine, request_of(n=8, seed=9, stop=(stop,)))[0][index]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text.endswith(stop) and cut.text.count(stop) == 1
    assert free[index].token_ids[: len(cut.token_ids)].tolist() == cut.token_ids.tolist()
    assert len(cut.logprobs) == len(cut.token_ids) == cut.versions[-1].end


def test_min_tokens_bars_the_end_of_sequence_and_counts_in_the_logprobs(engine):
    [completions] = run(engine, request_of(n=8, seed=2, max_tokens=100, min_tokens=100))
    for completion in completions:
        expected = reference(OLD, PROMPT, completion.token_ids, barred=[EOS])
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        assert len(completion.token_ids) == 100


def test_generation_ends_where_the_model_ends(engine):
    prompt = np.arange(500) % 256
    [[completion]] = run(engine, request_of(prompt, max_tokens=100, min_tokens=50))
    assert completion.finish_reason is FinishReason.LENGTH and len(completion.token_ids) == 12


def test_scores_are_logprobs_at_temperature_one(engine):
    sequences = [np.arange(length, dtype=np.int32) % 256 for length in (1, 2, 40, 512)]
    scores = engine.score(sequences, deadline_s=60)
    assert [len(score) for score in scores] == [0, 1, 39, 511]
    for sequence, score in zip(sequences[1:], scores[1:], strict=True):
        np.testing.assert_allclose(score, reference(OLD, sequence[:1], sequence[1:]), atol=1e-4)


def pause_after(engine, monkeypatch, *, steps):
    """An event that is set once the backend has made so many steps; the next step then waits for the pause."""
    reached, go_on, count = threading.Event(), threading.Event(), iter(range(1, 10**6))
    original = engine._backend.step

    def step():
        result = original()
        if next(count) == steps:
            reached.set()
            go_on.wait(30)
        return result

    monkeypatch.setattr(engine._backend, "step", step)
    return reached, go_on


def test_tokens_before_and_after_an_update_in_flight_are_those_of_old_and_new_weights(engine, monkeypatch):
    payload = payload_of(NEW, version=4)
    reached, go_on = pause_after(engine, monkeypatch, steps=11)
    requests = [request_of(PROMPT[: 6 + i], n=2, seed=i, name=str(i), max_tokens=40, min_tokens=40) for i in range(3)]
    futures = engine.submit(requests)
    assert reached.wait(60)
    threading.Timer(0.2, go_on.set).start()
    engine.pause()
    engine.load_weights(payload)
    assert engine.version == payload.identity and engine.in_flight == 6
    engine.resume()
    for request, future in zip(requests, futures, strict=True):
        for completion in future.result(60):
            assert completion.versions == (
                VersionSpan(version=0, start=0, end=11),
                VersionSpan(version=4, start=11, end=40),
            )
            old = reference(OLD, request.prompt_ids, completion.token_ids, barred=[EOS])
            new = reference(NEW, request.prompt_ids, completion.token_ids, barred=[EOS])
            np.testing.assert_allclose(completion.logprobs[:11], old[:11], atol=1e-4)
            np.testing.assert_allclose(completion.logprobs[11:], new[11:], atol=1e-4)
            assert np.abs(old - new).max() > 1  # The two models could not be mistaken for each other.


def test_prompts_cached_under_old_weights_are_not_used_after_an_update(engine):
    prompt = np.arange(200) % 256
    run(engine, request_of(prompt, n=4))
    engine.load_weights(payload_of(NEW, version=9))
    [[completion]] = run(engine, request_of(prompt))
    np.testing.assert_allclose(completion.logprobs, reference(NEW, prompt, completion.token_ids), atol=1e-4)


def test_damaged_or_foreign_weights_are_refused_and_the_engine_works_on(engine):
    good = payload_of(NEW, version=5)
    flipped = good.buffer.copy()
    flipped[1000] ^= 1
    with pytest.raises(WeightError, match="checksum"):
        engine.load_weights(dataclasses.replace(good, buffer=flipped))
    with pytest.raises(WeightError, match="missing"):
        engine.load_weights(export_weights(list(NEW.named_parameters())[1:], version=5))
    with pytest.raises(WeightError, match="q_norm"):
        engine.load_weights(payload_of(random_model(family="qwen3"), version=5))
    assert engine.version.version == 0 and engine.broken is None
    [[completion]] = run(engine, request_of())
    np.testing.assert_allclose(completion.logprobs, reference(OLD, PROMPT, completion.token_ids), atol=1e-4)


def test_an_aborted_request_is_cancelled_and_the_others_finish(engine, monkeypatch):
    reached, go_on = pause_after(engine, monkeypatch, steps=3)
    gone, kept = engine.submit([request_of(n=4, name="gone", min_tokens=24), request_of(n=2, name="kept", seed=3)])
    assert reached.wait(60)
    engine.abort(["gone"])
    go_on.set()
    assert gone.cancelled() and len(kept.result(60)) == 2
    [alone] = run(engine, request_of(n=2, seed=3))
    assert same(alone, kept.result()) and engine.in_flight == 0


def test_a_step_that_fails_breaks_the_engine_with_an_error_that_pickles(shared_engine, monkeypatch):
    """Last: the engine is of no use afterwards."""

    def explode():
        raise RuntimeError("no more memory")

    if is_vllm(shared_engine):
        monkeypatch.setattr(shared_engine._backend._llm, "step", explode)
    else:
        monkeypatch.setattr(shared_engine._backend, "_forward", lambda batch: explode())
    for future in shared_engine.submit([request_of(), request_of()]):
        error = pickle.loads(pickle.dumps(future.exception(60)))
        assert isinstance(error, EngineError) and "no more memory" in str(error)
    assert "no more memory" in shared_engine.broken
    with pytest.raises(EngineError, match="no more memory"):
        shared_engine.submit([request_of()])
