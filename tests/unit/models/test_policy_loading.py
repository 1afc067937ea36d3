"""Loading models, and what is said when one cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from tiny_models import build_tiny_model, random_model
from trl_ray.config.sections import Dtype, ModelConfig
from trl_ray.engines.checkpoint_facts import read_facts
from trl_ray.errors import ModelError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.adapters.merging import export_merged
from trl_ray.models.policy_loading import (
    config_changes,
    find_source,
    load_policy,
    load_tokenizer,
    max_positions,
    quantization,
)
from trl_ray.models.scoring.head import check_head
from trl_ray.pipelines.run.end_of_turn import end_of_turn_warning


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny model's directory."""
    return Path(build_tiny_model(tmp_path / "tiny", tied=False))


def test_a_model_loads_for_training_with_its_head_and_without_dropout(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tiny / "config.json").write_text(json.dumps(config))
    model = load_policy(ModelConfig(model_name_or_path=str(tiny)))
    assert model.training and model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(layer.self_attn.attention_dropout == 0.0 for layer in model.model.layers)
    frozen = load_policy(ModelConfig(model_name_or_path=str(tiny)), trainable=False)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_path_is_called_a_missing_directory(name: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_policy(ModelConfig(model_name_or_path=name))


def test_a_hub_name_without_a_hub_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no directory here, and the hub gave"):
        load_policy(ModelConfig(model_name_or_path="nobody/nothing"))


def test_no_name_no_config_and_no_weights_are_told_apart(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ModelError, match="must name a model"):
        load_policy(ModelConfig())
    with pytest.raises(ModelError, match=r"config\.json"):
        load_policy(ModelConfig(model_name_or_path=str(tmp_path)))
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has none"):
        load_policy(ModelConfig(model_name_or_path=str(tiny)))


def test_truncated_weights_are_called_damaged(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated or damaged"):
        load_policy(ModelConfig(model_name_or_path=str(tiny)))


def test_a_weight_that_would_be_random_is_refused(tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_policy(ModelConfig(model_name_or_path=str(tiny)))


def test_logits_changed_after_the_head_are_refused() -> None:
    model = random_model()
    check_head(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 30 * torch.tanh(output / 30))
    with pytest.raises(ModelError, match="soft-capping"):
        check_head(model)


def test_a_tokenizer_gets_a_padding_token_and_the_configured_template(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny), chat_template=str(template)))
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    with pytest.raises(ModelError, match="chat_template"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tiny), chat_template=str(tmp_path / "none")))


def test_another_end_token_is_the_tokenizers_the_configurations_and_a_checkpoints(tiny: Path, tmp_path: Path) -> None:
    plain = load_policy(ModelConfig(model_name_or_path=str(tiny)))
    before = plain.generation_config.eos_token_id
    model = ModelConfig(model_name_or_path=str(tiny), eos_token="<|endoftext|>")
    tokenizer, policy = load_tokenizer(model), load_policy(model)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, policy.config.eos_token_id) == (256, 256)
    assert saved.eos_token_id == policy.generation_config.eos_token_id == [256, before] == [256, 258]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 256
    facts = read_facts(str(tmp_path), dtype="float32", trust_remote_code=False)
    assert (facts.tokenizer.eos_token, facts.stop_ids) == ("<|endoftext|>", (256, 258))
    engine = read_facts(str(tiny), dtype="float32", trust_remote_code=False, eos_token="<|endoftext|>")
    assert engine.stop_ids == (256, 258)
    assert read_facts(str(tiny), dtype="float32", trust_remote_code=False).stop_ids == (258,)
    for load in (load_tokenizer, load_policy):
        with pytest.raises(ModelError, match=r"eos_token must be a token of the tokenizer of .*, got '<end>'"):
            load(ModelConfig(model_name_or_path=str(tiny), eos_token="<end>"))


def test_a_merged_adapter_ends_with_the_token_that_it_was_trained_with(tiny: Path, tmp_path: Path) -> None:
    model = ModelConfig(model_name_or_path=str(tiny), use_peft=True, eos_token="<|endoftext|>")
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(load_policy(model), folder)
    load_tokenizer(model).save_pretrained(folder)
    merged = export_merged(folder, tmp_path / "merged")
    facts = read_facts(str(merged), dtype="float32", trust_remote_code=False)
    assert (facts.tokenizer.eos_token_id, facts.stop_ids) == (256, (256, 258))


@pytest.mark.parametrize(
    ("end", "told"), [("<|im_end|>", None), ("<|pad|>", r"ends a turn with '<\|pad\|>'.*Set eos_token='<\|pad\|>'")]
)
def test_a_template_that_ends_turns_otherwise_than_generation_stops_is_told(
    tiny: Path, end: str, told: str | None
) -> None:
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny)))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", end)
    warning = end_of_turn_warning(ModelConfig(model_name_or_path=str(tiny)), tokenizer)
    assert warning is None if told is None else re.search(told, warning or "") is not None
    tokenizer.eos_token = end
    assert end_of_turn_warning(ModelConfig(model_name_or_path=str(tiny)), tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn_warning(ModelConfig(model_name_or_path=str(tiny)), tokenizer) is None


def test_max_positions_come_from_the_config(tiny: Path) -> None:
    assert max_positions(ModelConfig(model_name_or_path=str(tiny))) == 512


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """The folder of an adapter for the tiny model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(load_policy(ModelConfig(model_name_or_path=str(tiny), use_peft=True)), folder)
    return folder


def test_an_adapter_folder_stands_for_its_base_model_and_the_adapter(tiny: Path, adapter: Path) -> None:
    model = ModelConfig(model_name_or_path=str(adapter), use_peft=True)
    source = find_source(model)
    assert (source.base, source.revision) == (str(tiny), None)
    assert source.adapter == source.initial_adapter == str(adapter)
    assert max_positions(model) == 512 and load_tokenizer(model).pad_token == "<|pad|>"
    policy = load_policy(model)
    assert policy.name_or_path == str(tiny) and any(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in load_policy(model, trainable=False).parameters())


def test_a_checkpoint_of_an_adapter_takes_its_base_from_the_configuration(tiny: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/moved/away"}))
    source = find_source(ModelConfig(model_name_or_path=str(tiny), use_peft=True), path=str(adapter))
    assert (source.base, source.adapter, source.initial_adapter) == (str(tiny), str(adapter), None)
    with pytest.raises(ModelError, match=r"must name its base model.*/moved/away"):
        find_source(ModelConfig(model_name_or_path=str(adapter), use_peft=True))


def test_the_tokenizer_beside_an_adapter_is_preferred_to_its_base_models(tiny: Path, adapter: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny)))
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(ModelConfig(model_name_or_path=str(adapter), use_peft=True)).chat_template == "mine"


def test_adapters_and_whole_models_are_not_taken_for_each_other(tiny: Path, adapter: Path) -> None:
    with pytest.raises(ModelError, match="use_peft must be true"):
        load_policy(ModelConfig(model_name_or_path=str(adapter)))
    with pytest.raises(ModelError, match="use_peft must be false"):
        load_policy(ModelConfig(model_name_or_path=str(tiny), use_peft=True), path=str(tiny))


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_need_a_gpu_and_bitsandbytes(
    tiny: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(model_name_or_path=str(tiny), use_peft=True, **{option: True})
    with pytest.raises(ModelError, match=f"{option}=true needs a GPU"):
        load_policy(model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"{option}=true needs the package bitsandbytes"):
        load_policy(model, device="cuda")


def test_quantised_weights_are_computed_with_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    gpu = torch.device("cuda")
    model = ModelConfig(use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True, dtype=Dtype.BFLOAT16)
    config = quantization(model, gpu)
    assert config.load_in_4bit and config.bnb_4bit_use_double_quant and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization(ModelConfig(use_peft=True, load_in_8bit=True), gpu).load_in_8bit


def test_ligers_kernels_need_a_gpu_and_the_library(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(model_name_or_path=str(tiny), use_liger_kernel=True)
    with pytest.raises(ModelError, match="needs a GPU, but the model is on cpu"):
        load_policy(model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install liger-kernel"):
        load_policy(model, device="cuda")


def test_changes_of_the_configuration_reach_policy_reference_and_whoever_asks_for_it(tiny: Path) -> None:
    changes = {"max_position_embeddings": 64, "rms_norm_eps": 0.5}
    model = ModelConfig(model_name_or_path=str(tiny), model_init_kwargs=changes)
    plain = load_policy(ModelConfig(model_name_or_path=str(tiny)), trainable=False)
    changed, reference = load_policy(model, trainable=False), load_policy(model, trainable=False)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first, second, other = (each(input_ids=ids).logits for each in (changed, reference, plain))
    assert torch.equal(first, second) and not torch.allclose(first, other, atol=1e-2)
    assert max_positions(model) == 64
    assert config_changes(model) == changes
    with pytest.raises(ModelError, match=r"the configuration of qwen2, got rms_norm_epz\. Did you mean 'rms_norm_eps'"):
        load_policy(model.replace(model_init_kwargs={"rms_norm_epz": 0.5}))


def test_a_scaled_rope_is_known_by_the_name_that_the_configuration_has(tiny: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0}
    model = ModelConfig(model_name_or_path=str(tiny), model_init_kwargs={"rope_scaling": scaled})
    [(name, value)] = config_changes(model).items()
    assert name == "rope_parameters" and value == {**scaled, "rope_theta": 10000.0}
    assert load_policy(model).config.rope_parameters["rope_type"] == "linear"
