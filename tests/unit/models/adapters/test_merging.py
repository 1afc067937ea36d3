"""Merged weights are the plain model that computes what the policy computes, and nothing that is trained moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tiny_models import build_tiny_model, random_model
from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.adapters.merging import export_merged, merged_weights
from trl_ray.models.policy_loading import Policy, load_policy

IDS = torch.tensor([[5, 6, 7, 8, 9, 250, 3, 40, 41, 77]])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pattern": {"lora_kwargs": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 7}}},
    "saved": {"lora_modules_to_save": ["norm", "k_proj"], "lora_target_modules": ["q_proj", "up_proj"]},
    "block": {"lora_modules_to_save": ["mlp"]},
    "ends": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with biases and tied embeddings."""
    return build_tiny_model(tmp_path_factory.mktemp("merging") / "tiny")


def adapted(path: str, **options: Any) -> Policy:
    """A policy whose adapter, magnitudes included, is far from where it starts."""
    chosen = {"lora_r": 4, "lora_alpha": 6, "lora_target_modules": "all-linear"} | options
    policy = load_policy(ModelConfig(model_name_or_path=path, use_peft=True, gradient_checkpointing=False, **chosen))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy.eval()


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.log_softmax(-1)


def plain(path: str, policy: Policy) -> nn.Module:
    """The model of an engine: built from the base, its weights replaced by those published."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=policy.dtype).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in merged_weights(policy):
            own.pop(name).copy_(weight)
    assert not own
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_policy_computes(tiny: str, kind: str) -> None:
    # In float64, because rounding alone changes float32 log-probs of this model by 1e-5 when a product is split in two.
    policy = adapted(tiny, **KINDS[kind]).double()
    merged = logprobs(plain(tiny, policy))
    assert (merged - logprobs(policy)).abs().max() < 1e-9
    base = logprobs(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64))
    assert (merged - base).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_it_in_float32_up_to_rounding(tiny: str, kind: str) -> None:
    policy = adapted(tiny, **KINDS[kind])
    assert (logprobs(plain(tiny, policy)) - logprobs(policy)).abs().mean() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_every_bit_of_the_training_weights_alone(tiny: str, kind: str) -> None:
    policy = adapted(tiny, **KINDS[kind])
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    for _, weight in merged_weights(policy):
        assert not weight.requires_grad
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == flags


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_names_shapes_dtypes_and_order_are_those_of_the_plain_model(tmp_path: Path, kind: str, tied: bool) -> None:
    path = build_tiny_model(tmp_path / "m", family="qwen3", tied=tied)
    merged = [(name, weight.shape, weight.dtype) for name, weight in merged_weights(adapted(path, **KINDS[kind]))]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert merged == [(name, weight.shape, weight.dtype) for name, weight in model.named_parameters()]
    assert ("lm_head.weight" in [name for name, *_ in merged]) is not tied


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layers_stored_the_other_way_round_merge_too(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=260, n_positions=32)).save_pretrained(path)
    policy = adapted(path, lora_target_modules=["c_attn", "c_fc", "c_proj"], **KINDS[kind]).double()
    assert (logprobs(plain(path, policy)) - logprobs(policy)).abs().max() < 1e-9


def test_a_lora_layer_merges_to_the_sum_computed_by_hand(tiny: str) -> None:
    policy = adapted(tiny)
    layer = policy.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 6 / 4 * (b @ a)
    actual = dict(merged_weights(policy))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(actual, expected, atol=1e-6)


def test_the_rows_of_a_dora_layer_have_the_lengths_of_its_magnitude(tiny: str) -> None:
    policy = adapted(tiny, use_dora=True)
    magnitude = policy.get_submodule("model.layers.1.mlp.up_proj").lora_magnitude_vector["default"].weight
    merged = dict(merged_weights(policy))["model.layers.1.mlp.up_proj.weight"]
    assert torch.allclose(merged.norm(dim=1), magnitude.abs(), rtol=1e-5)


def test_merged_weights_have_the_dtype_of_the_frozen_ones_and_adapters_are_float32(tiny: str) -> None:
    policy = adapted(tiny, dtype=Dtype.BFLOAT16, use_dora=True)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {weight.dtype for _, weight in merged_weights(policy)} == {torch.bfloat16}


def test_without_an_adapter_the_parameters_themselves_are_given() -> None:
    model = random_model()
    given = dict(merged_weights(model))
    assert list(given) == [name for name, _ in model.named_parameters()]
    assert all(weight.data_ptr() == model.get_parameter(name).data_ptr() for name, weight in given.items())


def test_all_that_a_result_needs_is_gathered_while_it_is_made(tiny: str) -> None:
    policy = adapted(tiny, use_dora=True, lora_modules_to_save=["norm"])
    gathered: set[int] = set()

    @contextmanager
    def gather(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        gathered.update(map(id, parameters))
        yield

    list(merged_weights(policy, gather=gather))
    needed = {id(parameter) for name, parameter in policy.named_parameters() if ".original_module." not in name}
    assert gathered == needed and len(needed) < len(list(policy.parameters()))


def test_an_exported_checkpoint_is_a_plain_model_with_its_tokenizer(tiny: str, tmp_path: Path) -> None:
    policy = adapted(tiny, use_dora=True)
    (tmp_path / "adapter").mkdir()
    save_adapter(policy, tmp_path / "adapter")
    out = export_merged(tmp_path / "adapter", tmp_path / "plain")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    received = dict(merged_weights(policy))
    assert all(torch.equal(parameter, received[name]) for name, parameter in model.named_parameters())
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        export_merged(tiny, tmp_path / "other")
