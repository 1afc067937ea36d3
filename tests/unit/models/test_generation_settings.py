"""Generation settings that transformers would not save are mended when a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from tiny_models import build_tiny_model
from trl_ray.config.sections import ModelConfig
from trl_ray.models.policy_loading import load_policy


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
        ({"temperature": 0.6, "length_penalty": 2.0, "num_beams": 1}, {"temperature": None, "length_penalty": None}),
    ],
)
def test_a_model_is_saved_whatever_its_settings_say(said: dict[str, Any], kept: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_tiny_model(folder)
    (folder / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [258, 256]}), encoding="utf-8")
    load_policy(ModelConfig(model_name_or_path=str(folder))).save_pretrained(tmp_path / "saved")
    found = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert found.eos_token_id == [258, 256]
    assert {name: getattr(found, name) for name in kept} == kept
