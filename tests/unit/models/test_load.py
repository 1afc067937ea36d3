"""Loading models, and what is said when one cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_models import build_tiny_model, random_model
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.load import check_head, load_policy, load_tokenizer, max_positions


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


def test_max_positions_come_from_the_config(tiny: Path) -> None:
    assert max_positions(ModelConfig(model_name_or_path=str(tiny))) == 512
