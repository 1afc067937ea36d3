"""Fields of generation_kwargs in the transformers engine, on logits counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_models import build_tokenizer, random_model
from trl_ray.engines.logit_rules import LogitRules
from trl_ray.engines.transformers import TransformersEngine
from trl_ray.errors import EngineError
from trl_ray.types import Completion, FinishReason, GenerationRequest, SamplingParams

INF = float("inf")
PROMPT = [3, 4]


def rules(vocab_size: int = 6, **fields: Any) -> LogitRules:
    return LogitRules(fields, tokenizer=build_tokenizer(), vocab_size=vocab_size, device=torch.device("cpu"))


def before(tokens: list[int], *, min_tokens: int = 0, **fields: Any) -> list[float]:
    logits = torch.zeros(6)
    return rules(**fields).before(logits, prompt=PROMPT, tokens=tokens, min_tokens=min_tokens).tolist()


def test_biases_are_added_under_keys_of_a_file_and_of_python() -> None:
    assert before([], logit_bias={"1": 2.5, 4: -1}) == [0, 2.5, 0, 0, -1, 0]


def test_only_allowed_tokens_are_left() -> None:
    assert before([], allowed_token_ids=[2, 5]) == [-INF, -INF, 0, -INF, -INF, 0]


def test_tokens_are_suppressed_always_or_at_the_beginning() -> None:
    fields = {"suppress_tokens": [0], "begin_suppress_tokens": [1]}
    assert before([], **fields) == [-INF, -INF, 0, 0, 0, 0]
    assert before([2], **fields) == [-INF, 0, 0, 0, 0, 0]


def test_stop_tokens_are_barred_until_min_tokens_are_there() -> None:
    assert before([2], min_tokens=2, stop_token_ids=[5]) == [0, 0, 0, 0, 0, -INF]
    assert before([2, 2], min_tokens=2, stop_token_ids=[5]) == [0, 0, 0, 0, 0, 0]


def test_a_banned_word_loses_its_last_token_once_its_beginning_is_there() -> None:
    # In bytes: "ab" is two tokens, and the completion has the first.
    tokenizer = build_tokenizer()
    first, last = tokenizer.encode("ab", add_special_tokens=False)
    made = LogitRules({"bad_words": ["ab"]}, tokenizer=tokenizer, vocab_size=260, device=torch.device("cpu"))
    logits = torch.zeros(260)
    assert made.before(logits, prompt=PROMPT, tokens=[first], min_tokens=0)[last] == -INF
    assert made.before(logits, prompt=PROMPT, tokens=[last], min_tokens=0).isfinite().all()
    assert made.before(logits, prompt=[first], tokens=[], min_tokens=0).isfinite().all(), "the prompt may begin one"


def test_no_pair_of_tokens_comes_twice_the_prompt_included() -> None:
    assert before([2, 3], no_repeat_ngram_size=2) == [0, 0, 0, 0, -INF, 0]


def test_penalties_count_tokens_of_the_completion_alone() -> None:
    taken = rules(presence_penalty=0.5, frequency_penalty=0.25).penalties([1, 1, 2])
    assert taken.tolist() == [0, 1.0, 0.75, 0, 0, 0]
    assert rules().penalties([1, 1]).tolist() == [0] * 6


def test_improbable_tokens_are_cut_off() -> None:
    scores = torch.tensor([0.6, 0.3, 0.08, 0.02]).log()
    kept = rules(vocab_size=4, epsilon_cutoff=0.05).after(scores, prompt=PROMPT, tokens=[])
    assert kept.isfinite().tolist() == [True, True, True, False]


def complete(engine: TransformersEngine, **fields: Any) -> list[Completion]:
    sampling = SamplingParams(max_tokens=12, fields=fields)
    request = GenerationRequest(
        request_id="a", prompt_ids=np.array([65, 66, 67], dtype=np.int32), n=4, sampling=sampling, seed=3
    )
    return list(engine.submit([request])[0].result(timeout=60.0))


def test_the_engine_samples_by_them_and_gives_the_log_probs_it_sampled_from() -> None:
    model: Any = random_model()
    engine = TransformersEngine(model=model, tokenizer=build_tokenizer(), max_model_len=64, max_num_seqs=4)
    try:
        [allowed, *_] = found = complete(engine, allowed_token_ids=[70, 71])
        assert {int(token) for each in found for token in each.token_ids} <= {70, 71}
        stopped = complete(engine, logit_bias={80: 50.0}, stop_token_ids=[80])
        plain, penalised = complete(engine), complete(engine, presence_penalty=100.0)
    finally:
        engine.close()
    ids = torch.tensor([[65, 66, 67, *allowed.token_ids.tolist()]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits[0, 2:-1, 70:72]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(allowed.token_ids.astype(np.int64) - 70)[:, None])[:, 0]
    assert np.allclose(allowed.logprobs, expected.numpy(), atol=1e-4)
    assert [(each.token_ids.tolist(), each.finish_reason) for each in stopped] == [([80], FinishReason.STOP)] * 4
    assert all(len(set(each.token_ids.tolist())) == len(each.token_ids) for each in penalised)
    assert any(len(set(each.token_ids.tolist())) < len(each.token_ids) for each in plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {6: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"allowed_token_ids": [6]},
        {"suppress_tokens": [6]},
        {"begin_suppress_tokens": [6]},
        {"bad_words_ids": [[1, 6]]},
        {"sequence_bias": [[[6], 1.0]]},
    ],
)
def test_tokens_that_the_model_has_not_are_refused_by_name(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(
        ValueError, match=rf"generation_kwargs .*: {name} must hold token ids of the model, 0 to 5, but"
    ):
        rules(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": [1]},
        {"logit_bias": {1: "much"}},
        {"presence_penalty": []},
        {"typical_p": 2.0},
        {"bad_words": [3]},
        {"suppress_tokens": 3},
        {"bad_words_ids": [3]},
    ],
)
def test_values_of_another_kind_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="generation_kwargs"):
        rules(**fields)


def test_a_stop_token_that_the_model_has_not_bars_nothing() -> None:
    assert before([2], min_tokens=2, stop_token_ids=[5, 99]) == [0, 0, 0, 0, 0, -INF]


def test_a_request_that_cannot_be_used_fails_alone() -> None:
    model: Any = random_model()
    engine = TransformersEngine(model=model, tokenizer=build_tokenizer(), max_model_len=64, max_num_seqs=4)
    try:
        for fields in ({"logit_bias": {99999: 1}}, {"begin_suppress_tokens": [99999]}, {"suppress_tokens": 3}):
            with pytest.raises(EngineError, match=r"refused .*generation_kwargs"):
                complete(engine, **fields)
        assert len(complete(engine)) == 4
    finally:
        engine.close()


@pytest.mark.parametrize("mode", ["list", "mapping"])
def test_a_bias_for_a_sequence_is_read_in_both_forms(mode: str) -> None:
    bias: Any = [[[1, 2], 4.0]] if mode == "list" else {(1, 2): 4.0}
    assert before([1], sequence_bias=bias) == [0, 0, 4.0, 0, 0, 0]
