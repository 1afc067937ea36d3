"""Models that heed neither places nor padding are read as they are; others keep their cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_architectures import random_architecture
from trl_ray.engines.start.cache_proof import keeps_cache

# Decoders of translation models count their places from the first token of a row, padding or not.
BART = {
    "vocab_size": 260,
    "d_model": 64,
    "decoder_layers": 1,
    "encoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2", "mixtral"])
def test_a_model_that_takes_positions_or_a_mask_keeps_its_cache(name: str) -> None:
    assert keeps_cache(random_architecture(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_counts_its_places_by_itself_does_not(dtype: torch.dtype) -> None:
    config: Any = AutoConfig.for_model("bart", **BART)
    assert not keeps_cache(AutoModelForCausalLM.from_config(config).to(dtype).eval())


def test_a_state_that_padding_would_enter_does_not() -> None:
    assert not keeps_cache(random_architecture("mamba2"))


def test_a_model_that_reads_its_mask_wrongly_is_found_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = random_architecture("llama")
    original = model.forward

    def forward(*, attention_mask: torch.Tensor | None = None, **given: Any) -> Any:
        return original(**given)

    monkeypatch.setattr(model, "forward", forward)
    assert not keeps_cache(model)
