"""The head's transform is found in the model's configuration, proved, and used for log-probs and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from tiny_architectures import random_architecture
from tiny_models import random_model
from trl_ray.config.sections import SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.scoring.head import check_head, head_module, hidden_states, logit_transform
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "cohere": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0)
    ),
    "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
}
EXPECTED = {"cohere": (0.25, None), "granite": (0.25, None), "gemma": (1.0, 2.0)}


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().float().eval()


@pytest.mark.parametrize("name", MODELS)
def test_scale_and_cap_come_from_the_configuration_and_are_proved(name: str) -> None:
    model = _model(name)
    found = logit_transform(model)
    assert (found.scale, found.softcap) == EXPECTED[name]
    check_head(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_otherwise_than_its_configuration_says_is_refused(name: str) -> None:
    model = _model(name)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: 1.5 * output)
    with pytest.raises(ModelError, match="soft-cap"):
        check_head(model)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    model = _model("granite")
    model.config.logits_scaling = 0.0
    with pytest.raises(ModelError, match="logits_scaling"):
        logit_transform(model)


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_of_a_transformed_head_are_those_of_the_models_logits(name: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model, other = _model(name), _model(name)
    logprobs, entropy = ScoringModule(model, chunk_size=7)(
        ids, torch.arange(5)[None], None, torch.arange(4), ids[0, 1:], 0.7
    )
    log_p = torch.log_softmax(other(input_ids=ids).logits[0, :-1] / 0.7, dim=-1)
    want = log_p.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logprobs, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)
    logprobs.sum().backward()
    want.sum().backward()
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_the_head_of_a_peft_model_is_its_base_models_and_the_adapter_still_counts() -> None:
    base = random_model()
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert head_module(wrapped) is base.lm_head
    check_head(wrapped)
    ids = torch.tensor([[5, 6, 7]])
    scorer = SampleScorer(ScoringModule(wrapped, chunk_size=None), share_prompt=SharePrompt.NEVER, temperature=1.0)
    actual = scorer.sequence_logprobs(np.array([5, 6, 7], dtype=np.int32))
    with torch.no_grad():
        log_p = torch.log_softmax(wrapped(input_ids=ids).logits[0, :-1], dim=-1)
        plain = hidden_states(wrapped, input_ids=ids)
        with wrapped.disable_adapter():
            assert not torch.allclose(plain, hidden_states(wrapped, input_ids=ids))
    np.testing.assert_allclose(actual, log_p.gather(1, ids[0, 1:, None])[:, 0].numpy(), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = random_model()
    model.set_output_embeddings(nn.Identity())
    with pytest.raises(ModelError, match="linear head"):
        head_module(model)


def test_a_model_that_sees_what_comes_after_is_refused_when_it_is_loaded() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2, initializer_range=0.4)).eval()
    with pytest.raises(ModelError, match=r"must not see the tokens that come after.*second token changes"):
        check_head(encoder)


def test_a_model_that_cannot_be_computed_in_its_dtype_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("granite").to(torch.bfloat16)

    def mixed(*args: object, **named: object) -> None:
        raise RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16\nat aten")

    monkeypatch.setattr(model.model, "forward", mixed)
    with pytest.raises(ModelError, match=r"GraniteForCausalLM of two tokens in bfloat16, but.*same dtype.*float32"):
        check_head(model)


def test_a_text_model_that_is_not_where_its_prefix_says_is_found() -> None:
    model = random_architecture("llama4")
    ids = torch.tensor([[1, 2, 3]])
    assert model.base_model is model
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(head_module(model)(hidden_states(model, input_ids=ids)), expected)
