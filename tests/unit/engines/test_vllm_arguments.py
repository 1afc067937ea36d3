"""What vLLM is started with: changes of the configuration side by side, and random weights only where some are fed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.engines.checkpoint_facts import read_facts
from trl_ray.engines.vllm import VLLMBackend
from trl_ray.errors import ConfigError

# 260 tokens and rows; with one token more the next multiple of 64 is 320.
GROWN = 320
THETA = {"rope_theta": 5.0}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer has a token more than it has rows."""
    path = build_tiny_model(tmp_path_factory.mktemp("longer"))
    one_more().save_pretrained(path)
    return path


def one_more() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    return tokenizer


def arguments(
    model: str, *, is_fed: bool, changes: dict[str, Any] | None = None, **engine_kwargs: Any
) -> dict[str, Any]:
    common = {
        "dtype": "float32",
        "max_num_seqs": 1,
        "tensor_parallel_size": 1,
        "kv_cache_memory_bytes": 1 << 20,
        "model": model,
    }
    tokenizer = one_more() if is_fed else None
    backend = VLLMBackend(
        common, max_model_len=32, overrides=engine_kwargs, tokenizer=tokenizer, config_changes=changes
    )
    facts = read_facts(model, dtype="float32", trust_remote_code=False, tokenizer=tokenizer)
    return backend._arguments(facts)


def test_a_teacher_reads_its_files_however_long_its_tokenizer_is(longer: str) -> None:
    made = arguments(longer, is_fed=False)
    assert not {"load_format", "hf_overrides", "tokenizer"} & made.keys()
    assert arguments(longer, is_fed=True)["load_format"] == "dummy"


def test_changes_of_model_rows_and_engine_stand_side_by_side(longer: str) -> None:
    given = {"max_position_embeddings": 64, "rope_parameters": {"factor": 2.0}}
    made = arguments(longer, is_fed=True, changes={"rope_parameters": THETA}, hf_overrides=given)
    assert made["hf_overrides"] == {
        "rope_parameters": {"rope_theta": 5.0, "factor": 2.0},
        "vocab_size": GROWN,
        "max_position_embeddings": 64,
    }
    assert arguments(longer, is_fed=False, hf_overrides=given)["hf_overrides"] == given


def test_a_function_may_not_take_the_place_of_changes(longer: str) -> None:
    def change(config: Any) -> Any:
        return config

    assert arguments(longer, is_fed=False, hf_overrides=change)["hf_overrides"] is change
    with pytest.raises(ConfigError, match=r"hf_overrides must be a mapping beside .*\['vocab_size'\]"):
        arguments(longer, is_fed=True, hf_overrides=change)


def test_new_rows_reach_the_part_of_the_configuration_that_states_them(tmp_path: Path) -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 260,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    build_tokenizer().save_pretrained(tmp_path)
    assert arguments(str(tmp_path), is_fed=True)["hf_overrides"] == {"text_config": {"vocab_size": GROWN}}
