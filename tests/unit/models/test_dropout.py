"""disable_dropout reaches every dropout there is, and what is left is found before training."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    OPTConfig,
    PhimoeConfig,
    PretrainedConfig,
    Starcoder2Config,
)

from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.checkpoint import begin_checkpoint, finish_checkpoint
from trl_ray.models.dropout import check_without_dropout, switch_off_dropout
from trl_ray.models.policy_loading import load_policy

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "starcoder2": Starcoder2Config(
        **SIZES,
        intermediate_size=32,
        num_key_value_heads=2,
        residual_dropout=0.3,
        embedding_dropout=0.3,
        attention_dropout=0.3,
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.5, activation_dropout=0.3),
    "bloom": BloomConfig(
        vocab_size=260, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3
    ),
    "falcon": FalconConfig(**SIZES, hidden_dropout=0.3, attention_dropout=0.3),
    "gpt2": GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "phimoe": PhimoeConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3
    ),
}


def random_model(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_training_computes_what_evaluation_does_in_families_that_keep_dropout_elsewhere(family: str) -> None:
    model = random_model(CONFIGS[family])
    with pytest.raises(ModelError, match="must compute the same in training as elsewhere"):
        check_without_dropout(model)
    switch_off_dropout(model)
    check_without_dropout(model)


class Shaken(nn.Module):
    """Noise that no name gives away."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return nn.functional.dropout(self.inner(*args, **kwargs), 0.1, self.training)


def test_what_is_left_is_refused_when_the_policy_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = build_tiny_model(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def shaken(*args: object, **kwargs: object) -> object:
        model, info = load(*args, **kwargs)
        model.model.layers[0].mlp = Shaken(model.model.layers[0].mlp)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", shaken)
    with pytest.raises(ModelError, match=r"something random is left in it\. Set disable_dropout=false"):
        load_policy(ModelConfig(model_name_or_path=name))
    assert load_policy(ModelConfig(model_name_or_path=name), disable_dropout=False).training


def test_checkpoints_state_the_dropout_of_the_model_that_training_began_with(tmp_path: Path) -> None:
    random_model(CONFIGS["starcoder2"]).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    build_tokenizer().save_pretrained(tmp_path / "model")
    policy = load_policy(ModelConfig(model_name_or_path=str(tmp_path / "model")))
    assert policy.config.residual_dropout == 0.0
    begin_checkpoint(tmp_path, step=1)
    path = finish_checkpoint(tmp_path, step=1, model=policy, trainer_state={})
    assert json.loads((Path(path) / "config.json").read_text())["residual_dropout"] == 0.3
    assert AutoConfig.from_pretrained(path).embedding_dropout == 0.3
    assert policy.config.residual_dropout == 0.0
